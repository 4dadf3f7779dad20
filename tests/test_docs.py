"""The texts: every code block is run, the site builds without a warning, and no link leads nowhere."""

from __future__ import annotations

import ast
import dataclasses
import re
import shlex
import tomllib
from pathlib import Path

import pytest
import torch
from hub_server import connected, loopback_hub
from peft import LoraConfig, get_peft_model
from support.models import tiny_llama, token_blocks
from typer.testing import CliRunner

import hf_sai
from hf_sai.cli import app
from hf_sai.optim.registry import list_records
from hf_sai.report import GSNRReport
from hf_sai.report.rows import RouteRow, TensorRow


ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(
    r"(?:<!-- not run: (?P<reason>[^\n]+) -->\n)?^```(?P<language>\w+)\n(?P<code>.*?)^```$", re.M | re.S
)
NOT_CODE = {"text", "bibtex", "yaml"}


def blocks(page, *languages):
    """Language and code of the blocks of a page that are to be run."""
    found = BLOCK.finditer(page.read_text())
    return [(each["language"], each["code"]) for each in found if each["language"] in languages and not each["reason"]]


def test_the_pages_have_blocks_and_each_is_run_or_says_why_not():
    languages = {each["language"] for page in PAGES for each in BLOCK.finditer(page.read_text())}
    assert languages <= {"python", "bash", *NOT_CODE}
    assert sum(len(blocks(page, "python")) for page in PAGES) >= 8
    for page in PAGES:
        assert page.read_text().count("```") == 2 * len(list(BLOCK.finditer(page.read_text()))), page.name


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder with the model that the pages name, and a Hub."""
    monkeypatch.chdir(tmp_path)
    tiny_llama().save_pretrained("your/model")
    monkeypatch.setenv("HF_TOKEN", "the-token-of-these-tests")
    with loopback_hub() as hub, connected(hub, monkeypatch):
        yield hub


@pytest.mark.parametrize(
    "page", [page for page in PAGES if blocks(page, "python", "bash")], ids=lambda page: page.stem
)
def test_what_a_page_shows_runs_from_its_first_block_to_its_last(page, workplace, capsys):
    names = {"data": token_blocks(16), "__name__": "__main__"}
    for language, code in blocks(page, "python", "bash"):
        if language == "bash":
            run_commands(code, page)
            continue
        exec(compile(code, str(page), "exec"), names)
        for comment in re.findall(r"^# (\{.*)$", code, re.MULTILINE):  # what a block says that it prints
            assert comment in capsys.readouterr().out
    pushes = any("push_to_hub()" in code for _, code in blocks(page, "python"))
    assert bool(workplace.repos) == pushes, "a push that fails is only a warning"


def run_commands(code, page):
    for line in code.replace("\\\n", " ").splitlines():
        program, *arguments = shlex.split(line, comments=True)
        assert program == "hf-sai", f"{page.name} has a command that this test can't run: {line}"
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, f"{line}: {result.output}"


def test_links_to_files_lead_somewhere():
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md"):
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text()):
            assert (ROOT / target).exists(), f"{page.name}: {target}"


def messages(path):
    """The texts of a module, each as its constant parts: what stands between values that are filled in."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.JoinedStr):
            parts = [part.value if isinstance(part, ast.Constant) else "%s" for part in node.values]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            parts = [node.value]
        else:
            continue
        yield re.sub(r"%[sdgr]|%\.\d\w", "\0", "".join(parts))


def test_messages_that_troubleshooting_quotes_are_those_of_the_code():
    sources = [path for folder in ("hf_sai", "trainer_patches") for path in (ROOT / folder).rglob("*.py")]
    known = {text for path in sources for text in messages(path)}
    cells = re.findall(r"^\| (`.*?) \|", (ROOT / "docs/troubleshooting.md").read_text(), re.M)
    quotes = [cell.strip("`") for cell in cells if "host's" not in cell]
    assert len(quotes) > 40
    for quote in quotes:
        pattern = re.compile(".*".join(map(re.escape, re.split(r" ?\.\.\. ?", quote))), re.S)
        assert any(pattern.search(text) for text in known), quote


def test_formats_has_every_key_of_a_state_and_every_field_of_a_report():
    page = (ROOT / "docs/formats.md").read_text()
    model = tiny_llama()
    with_adapter = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"]))
    keys = {field.name for cls in (GSNRReport, TensorRow, RouteRow) for field in dataclasses.fields(cls)}
    for optimizer in (
        hf_sai.create_optimizer("sgd_sai", model.bfloat16(), kahan_sum=True),
        hf_sai.create_optimizer("sgd_sai", with_adapter, lora_policy="paired"),
        hf_sai.create_optimizer("swan", model, momentum=0.9),
    ):
        held = {param for group in optimizer.param_groups for param in group["params"]}
        for param in held:
            param.grad = torch.ones_like(param)
        optimizer.step()
        state = optimizer.state_dict()
        keys.update(*state["state"].values(), *state["param_groups"])
    options = {option.name for record in list_records() for option in record.options}
    missing = {key for key in keys - options - {"params", "lr"} if f"`{key}`" not in page}
    assert not missing


def test_the_texts_name_the_oldest_python_of_the_package():
    oldest = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"].removeprefix(">=")
    texts = [*PAGES, ROOT / "RELEASE.md", ROOT / "constraints.txt"]
    named = {path.name: set(re.findall(r"Python (3\.\d+)(?![\d.]*\d)", path.read_text())) - {oldest} for path in texts}
    assert not any(named.values()), named
    assert all(f"Python {oldest} or later" in path.read_text() for path in PAGES if path.stem in ("README", "index"))
    assert f'python-version: "{oldest}"' in (ROOT / ".github/workflows/ci.yml").read_text()


def test_the_site_builds_without_a_warning(tmp_path, monkeypatch):
    monkeypatch.setenv("NO_MKDOCS_2_WARNING", "1")
    monkeypatch.chdir(ROOT)
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    config = load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path / "site"), strict=True)
    build(config)
    made = {path.relative_to(tmp_path / "site").as_posix() for path in (tmp_path / "site").rglob("index.html")}
    expected = {f"{page.stem}/index.html" for page in PAGES[1:] if page.stem != "index"}
    assert {"index.html", *expected} == made
    for script in re.findall(r'(?:src|href)="(https?://[^"]+)"', (tmp_path / "site" / "index.html").read_text()):
        assert not script.endswith((".js", ".css")), f"the site fetches {script}"
