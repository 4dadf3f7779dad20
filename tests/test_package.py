"""The house: what imports what, what works without the hosts, and that the texts are in step."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import hf_sai


ROOT = Path(__file__).parent.parent
FLOORS = {
    "hf_sai.activations": 3,
    "hf_sai.config": 1,
    "hf_sai.files": 1,
    "hf_sai.optim": 1,
    "hf_sai.upload": 1,
    "model_cards": 1,
    "hf_sai.report": 2,
    "trainer_patches": 2,
    "hf_sai.integration": 3,
    "hf_sai.live": 3,
    "hf_sai.memory": 3,
    "hf_sai.model_build": 3,
    "hf_sai.model_shapes": 3,
    "hf_sai.quantization": 3,
    "hf_sai.registration": 4,
    "hf_sai.hub": 4,
    "hf_sai.callback": 5,
    "hf_sai.script_report": 5,
    "hf_sai.stand_in": 5,
    "hf_sai.trainer": 5,
    "hf_sai.cli": 6,
    "hf_sai.run": 7,
}


def floor_of(module):
    parts = module.split(".")
    for length in range(len(parts), 0, -1):
        name = ".".join(parts[:length])
        if name in FLOORS:
            return FLOORS[name], name
    return None


def imports(path):
    """Absolute names of what a file imports, relative imports resolved."""
    package = list(path.relative_to(ROOT).with_suffix("").parts[:-1])
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            yield ".".join([*base, *([node.module] if node.module else [])])


def sources():
    files = [p for name in ("hf_sai", "trainer_patches", "model_cards") for p in (ROOT / name).rglob("*.py")]
    return [p for p in files if p != ROOT / "hf_sai" / "__init__.py"]


def test_imports_go_down():
    checked = 0
    for path in sources():
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        own = floor_of(module)
        assert own is not None, f"{module} stands on no floor"
        for target in imports(path):
            other = floor_of(target)
            if other is not None and other[1] != own[1]:
                checked += 1
                assert other[0] < own[0] or other[0] == own[0] in (3, 5), f"{module} -> {target}"
    assert checked > 10


def test_optim_works_where_no_host_is_installed():
    code = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("transformers", "huggingface_hub", "accelerate", "jinja2", "wrapt", "typer"):
            raise ModuleNotFoundError(name)
import importlib.util
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == "transformers" else real(name, package)
sys.meta_path.insert(0, Missing())
import hf_sai.optim, torch
param = torch.nn.Parameter(torch.ones(3))
optimizer = hf_sai.optim.SGDSaI([param]); param.grad = torch.tensor([1., 2., 4.]); optimizer.step()
assert "transformers" not in sys.modules
print(optimizer.gsnr_statistics()[0].status)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "measured\n"


@pytest.mark.parametrize("name", hf_sai.__all__)
def test_the_face_hands_every_name_on(name):
    assert getattr(hf_sai, name).__name__ == name
    assert name in dir(hf_sai)


def test_an_unknown_name_of_the_face_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'SGDSAI'"):
        _ = hf_sai.SGDSAI


def test_public_names_have_docstrings():
    for name in hf_sai.__all__:
        assert (getattr(hf_sai, name).__doc__ or "").strip(), name


def test_versions_are_in_step():
    assert f"## {hf_sai.__version__}" in (ROOT / "CHANGELOG.md").read_text()
    assert f"version: {hf_sai.__version__}" in (ROOT / "CITATION.cff").read_text()


def test_no_path_of_one_machine_and_no_token():
    import re

    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    pattern = re.compile(r"/(home|Users)/[a-z]+/|hf_[A-Za-z0-9]{30,}")
    texts = {f: (ROOT / f).read_text(errors="ignore") for f in files if (ROOT / f).is_file()}
    assert [f for f, text in texts.items() if pattern.search(text) and f != "tests/test_card.py"] == []
