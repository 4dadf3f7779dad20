"""The command line through its real entry point."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pty
import re
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

import hf_sai
from hf_sai import GSNRReport, SGDSaI
from hf_sai.cli import app


def test_list_names_every_option_with_its_default():
    result = CliRunner().invoke(app, ["list"])
    assert result.exit_code == 0
    assert result.output.startswith("sgd_sai: ")
    assert "  momentum=0.9  (a number)" in result.output
    assert max(len(line) for line in result.output.splitlines()) <= 80


def test_report_prints_the_table(tmp_path):
    param = torch.nn.Parameter(torch.zeros(4, 4))
    optimizer = SGDSaI([("layers.0.q.weight", param)])
    param.grad = torch.randn(4, 4)
    optimizer.step()
    GSNRReport.from_optimizer(optimizer).save(tmp_path, picture=False)
    result = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert result.exit_code == 0
    assert "1 tensors: 1 measured\n" in result.output


def test_report_of_a_damaged_file_is_one_sentence(tmp_path):
    (tmp_path / "gsnr_report.json").write_text("{")
    for path in (tmp_path, tmp_path / "missing"):
        result = CliRunner().invoke(app, ["report", str(path)])
        assert result.exit_code == 1
        assert result.stderr.startswith("hf-sai: ")
        assert result.stderr.count("\n") == 1


@pytest.fixture
def saved(tmp_path):
    """A folder with the report of a run whose parameter has a name that rich would read as markup."""
    param = torch.nn.Parameter(torch.zeros(4, 4))
    optimizer = SGDSaI([("layers.0.[bold]q.weight", param)])
    param.grad = torch.randn(4, 4)
    optimizer.step()
    report = GSNRReport.from_optimizer(optimizer)
    report.save(tmp_path, picture=False)
    return tmp_path, report


def test_report_into_a_pipe_has_no_colour_whatever_the_environment_says(saved, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "200")
    result = CliRunner().invoke(app, ["report", str(saved[0])])
    assert result.output == f"{saved[1].to_text()}\n"
    assert "\x1b" not in result.output


def test_report_on_a_terminal_has_colours_in_80_columns(saved):
    terminal, other = pty.openpty()
    code = "import sys; from hf_sai.cli import app; app(sys.argv[1:])"
    environment = {**{k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR")}, "TERM": "xterm"}
    command = [sys.executable, "-c", code, "report", str(saved[0])]
    subprocess.run(command, stdout=other, stderr=subprocess.PIPE, env=environment, check=True, timeout=240)
    os.close(other)
    shown = b""
    with contextlib.suppress(OSError):  # what a terminal says at its end
        while part := os.read(terminal, 4096):
            shown += part
    os.close(terminal)
    text = shown.decode().replace("\r\n", "\n")
    assert "\x1b[32m1 measured\x1b[0m" in text
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text)
    assert [line.rstrip() for line in plain.splitlines()] == saved[1].to_text().splitlines()


def test_report_writes_page_and_markdown(saved, tmp_path, monkeypatch):
    opened = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    monkeypatch.chdir(tmp_path)
    folder, report = str(saved[0]), saved[1]
    result = CliRunner().invoke(app, ["report", folder, "--html"])
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "wrote gsnr_report.html\n")
    assert (tmp_path / "gsnr_report.html").read_text(encoding="utf-8") == report.to_html()
    assert CliRunner().invoke(app, ["report", folder, "--open", "--output", "other.html"]).exit_code == 0
    assert opened == [(tmp_path / "other.html").as_uri()]
    assert (tmp_path / "other.html").read_text(encoding="utf-8") == report.to_html()
    assert CliRunner().invoke(app, ["report", folder, "--markdown"]).stdout == report.to_markdown()
    assert CliRunner().invoke(app, ["report", folder, "--output", "report.txt"]).exit_code == 0
    assert (tmp_path / "report.txt").read_text(encoding="utf-8") == f"{report.to_text()}\n"
    assert CliRunner().invoke(app, ["report", folder, "--html", "--markdown"]).exit_code == 2
    failed = CliRunner().invoke(app, ["report", folder, "--html", "--output", "no/folder.html"])
    assert (failed.exit_code, failed.stderr.count("\n")) == (1, 1)


# ---- what every command does ----

COMMANDS = ("run", "lr", "list", "memory", "report", "compare", "push", "env")
TORCH_FREE = """
import sys
from typer.testing import CliRunner
from hf_sai.cli import app
done = CliRunner().invoke(app, sys.argv[1:])
print(done.exit_code, sorted({"torch", "transformers", "huggingface_hub"} & set(sys.modules)))
"""


@pytest.mark.parametrize("command", [(), *((name,) for name in COMMANDS)])
def test_every_command_has_its_version(command):
    result = CliRunner().invoke(app, [*command, "--version"])
    assert (result.exit_code, result.output) == (0, f"hf-sai {hf_sai.__version__}\n")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        ["list"],
        ["env"],
        ["run", "--help"],
        ["lr", "--help"],
        ["report", "HERE"],
        ["compare", "HERE", "HERE"],
        ["report", "HERE", "--markdown"],
    ],
)
def test_what_needs_no_torch_does_not_wait_for_it(saved, arguments):
    arguments = [str(saved[0]) if each == "HERE" else each for each in arguments]
    done = subprocess.run([sys.executable, "-c", TORCH_FREE, *arguments], capture_output=True, text=True, check=True)
    assert done.stdout == "0 []\n"
    assert done.stderr == ""


def test_a_script_without_our_options_does_not_wait_for_torch(tmp_path):
    (tmp_path / "train.py").write_text("import sys\nprint('torch' in sys.modules)\n")
    command = [sys.executable, "-m", "hf_sai.run", "train.py"]
    assert subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout == "False\n"


def test_names_are_registered_without_torch_and_the_handler_finds_its_record():
    code = """
import sys, hf_sai
assert "torch" not in sys.modules
from trainer_patches import added_optimizers
names = list(added_optimizers())
hf_sai.register(); hf_sai.unregister(); assert not added_optimizers(); hf_sai.register()
from hf_sai.optim import list_records
assert names == list(added_optimizers()) == [record.name for record in list_records()]
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["list"], 1),
        (["--help"], 1),
        (["run", "--help"], 1),
        (["memory", "vit-s-16", "--optim", "sgd"], 1),
        (["report", "HERE"], 1),
        (["report", "HERE", "--markdown"], 1),
        (["compare", "HERE", "HERE"], 2),  # 1 means that the runs are apart
    ],
)
def test_a_full_disk_is_one_sentence(saved, arguments, code):
    arguments = [str(saved[0]) if each == "HERE" else each for each in arguments]
    command = [sys.executable, "-c", "from hf_sai.cli import app; app()", *arguments]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == code
    assert done.stderr == (
        "hf-sai: the output must be written whole but: No space left on device; free space, or send it elsewhere\n"
    )


@pytest.mark.parametrize("arguments", [["list"], ["report", "HERE"], ["memory", "gpt2", "--optim", "sgd"]])
def test_a_closed_pipe_is_one_sentence(saved, arguments):
    arguments = [str(saved[0]) if each == "HERE" else each for each in arguments]
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-c", "from hf_sai.cli import app; app()", *arguments]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert done.returncode == 1
    assert done.stderr == "hf-sai: the output must be written whole but: Broken pipe; read all of it\n"


# ---- which of two, and where ----


def broken_runs(tmp_path):
    """A folder of each kind that can't be read, with what its message says of the place."""
    kinds = {
        "empty": ("", "line 1 column 1"),
        "cut": ('{"schema": 2,\n"optimizer": ', "line 2 column"),
        "field": ('{"schema": 2, "optimizer": 3}', "tensors of a g-SNR report must be a list"),
        "newer": ('{"schema": 99}', "schema must be"),
    }
    for name, (content, _) in kinds.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "gsnr_report.json").write_text(content)
    (tmp_path / "none").mkdir()
    return {**{name: place for name, (_, place) in kinds.items()}, "none": "gsnr_report.json"}


@pytest.mark.parametrize("kind", ["empty", "cut", "field", "newer", "none"])
def test_the_broken_run_of_two_is_named(saved, tmp_path, kind):
    place, broken = broken_runs(tmp_path)[kind], str(tmp_path / kind)
    for which, pair in (("second", [str(saved[0]), broken]), ("first", [broken, str(saved[0])])):
        result = CliRunner().invoke(app, ["compare", *pair])
        assert result.exit_code == 2
        assert result.stderr.startswith(f"hf-sai: the {which} run {broken}: ")
        assert place in result.stderr
        assert result.stderr.count("\n") == 1
    single = CliRunner().invoke(app, ["report", broken])
    assert single.exit_code == 1
    assert single.stderr.startswith(f"hf-sai: {broken}: ")


def test_advice_of_the_hub_is_not_cut(monkeypatch):
    from huggingface_hub.errors import HFValidationError

    def refused(*args, **kwargs):
        raise HFValidationError("401 Client Error.\n\nRepository Not Found.\nIf it is private or gated, log in.")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", refused)
    result = CliRunner().invoke(app, ["report", "user/repo"])
    assert "401 Client Error. Repository Not Found. If it is private or gated, log in." in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_gate_over_nothing_does_not_pass(saved, tmp_path):
    folder, report = saved
    empty = dataclasses.replace(report, tensors=[])
    pending = dataclasses.replace(report, tensors=[dataclasses.replace(report.tensors[0], status="pending", step=0)])
    for name, each in (("nothing", empty), ("pending", pending)):
        each.save(tmp_path / name, picture=False)
        pair = [str(tmp_path / name)] * 2
        assert CliRunner().invoke(app, ["compare", *pair]).exit_code == 0
        result = CliRunner().invoke(app, ["compare", *pair, "--fail-over", "1.2"])
        assert result.exit_code == 2
        assert "--fail-over 1.2 needs at least one tensor to compare" in result.stderr
    assert CliRunner().invoke(app, ["compare", str(folder), str(folder), "--fail-over", "1.2"]).exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["report", "HERE", "--revision", "v2"], "--revision is of a repository of the Hub"),
        (["report", "HERE/gsnr_report.json", "--revision", "v2"], "is a file or folder here"),
        (["compare", "HERE", "HERE", "--revision", "v2"], "--revision is of a repository"),
        (["compare", "HERE", "HERE", "--other-revision", "v2"], "--other-revision is of a repository"),
        (["report", "HERE", "--open", "--output", "report.txt"], "is no name of a page"),
        (["report", "HERE", "--html", "--output", "report"], "write report.html"),
        (["report", "HERE", "--output", "report.html"], "add --html"),
        (["report", "HERE", "--html", "--markdown"], "exclude each other"),
    ],
)
def test_an_option_that_would_not_be_used_is_refused(saved, arguments, words, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    result = CliRunner().invoke(app, [each.replace("HERE", str(saved[0])) for each in arguments])
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("hf-sai: ")
    assert result.stderr.count("\n") == 1
    assert words in result.stderr
    assert sorted(tmp_path.iterdir()) == before
