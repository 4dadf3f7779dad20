"""The house: what imports what, what works without the hosts, and that the texts are in step."""

from __future__ import annotations

import ast
import graphlib
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import hf_sai
import hf_sai.optim


ROOT = Path(__file__).parent.parent
PACKAGES = ("hf_sai", "trainer_patches", "model_cards")
# Longest prefix of a module's name to its floor; a room's own floors stand behind the point.
FLOORS = {
    "trainer_patches.tokens": 0,
    "hf_sai.optimizer_facts": 0,
    "hf_sai.config": 1,
    "hf_sai.files": 1,
    "hf_sai.optim": 1,
    "hf_sai.upload": 1,
    "model_cards": 1,
    "trainer_patches": 2,
    "hf_sai.report.schema": 2.1,
    "hf_sai.report.rows": 2.15,
    "hf_sai.report.data": 2.2,
    "hf_sai.report.quantities": 2.25,
    "hf_sai.report.compare": 2.3,
    "hf_sai.report.facts": 2.3,
    "hf_sai.report.html": 2.4,
    "hf_sai.report.markdown": 2.4,
    "hf_sai.report.plots": 2.4,
    "hf_sai.report.terminal": 2.4,
    "hf_sai.report.report": 2.5,
    "hf_sai.report": 2.6,
    "hf_sai.activations": 3,
    "hf_sai.deepspeed_config": 3,
    "hf_sai.divergence": 4,
    "hf_sai.integration": 3,
    "hf_sai.live": 3,
    "hf_sai.memory": 3,
    "hf_sai.model_build": 3,
    "hf_sai.model_shapes": 3,
    "hf_sai.quantization": 3,
    "hf_sai.premeasure": 4,
    "hf_sai.hub": 4,
    "hf_sai.keeper": 4,
    "hf_sai.callback": 5,
    "hf_sai.lr_test": 5,
    "hf_sai.rehearsal": 4.5,
    "hf_sai.script_report": 5,
    "hf_sai.startup": 7,
    "hf_sai.stand_in": 5,
    "hf_sai.registration": 5,
    "hf_sai.trainer": 5,
    "hf_sai.cli": 6,
    "hf_sai.run": 7,
}
FACE = "hf_sai"  # above all; its own imports are lazy names


def room_of(module):
    """The key of [`FLOORS`] that a module belongs to, or `None`; a package that holds rooms is none."""
    parts = module.split(".")
    names = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
    return next((name for name in names if name in FLOORS), None)


def modules_of(root):
    """Path by module name; a package goes by its own name."""
    paths = (path for package in PACKAGES for path in (root / package).rglob("*.py"))
    named = {".".join(path.relative_to(root).with_suffix("").parts): path for path in paths}
    return {name.removesuffix(".__init__"): path for name, path in named.items()}


def imports(module, path, known):
    """
    Names of our modules that a file imports, in functions, under TYPE_CHECKING and by `import_module("...")` too.
    """
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            names = [f"{base}.{alias.name}" if f"{base}.{alias.name}" in known else base for alias in node.names]
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", None) == "import_module":
            names = [each.value for each in node.args[:1] if isinstance(each, ast.Constant)]
        else:
            continue
        yield from (name for name in names if name.split(".")[0] in PACKAGES)


def faults(root):
    """What is wrong with the imports of a tree, in sentences."""
    known = modules_of(root)
    graph = {name: set(imports(name, path, known)) for name, path in known.items() if name != FACE}
    found = [f"{name} stands on no floor" for name in graph if room_of(name) is None]
    for name, targets in graph.items():
        for target in targets:
            own, other = room_of(name), room_of(target)
            if other is None:
                found.append(f"{name} -> {target} goes to the face, or to no floor")
            elif own is not None and own != other and FLOORS[other] > FLOORS[own]:
                found.append(f"{name} -> {target} goes up")
            elif own is not None and own != other and FLOORS[other] == FLOORS[own] not in (3, 5):
                found.append(f"{name} -> {target} goes to a neighbour on the same floor")
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        found.append(f"{' <- '.join(error.args[1])} goes round")
    return found


def test_imports_go_down_and_never_round():
    assert faults(ROOT) == []
    known = modules_of(ROOT)
    assert len(known) > 50
    assert set(imports("hf_sai.report.data", known["hf_sai.report.data"], known)) == {
        "hf_sai.optim.registry",
        "hf_sai.optim.tensors",
        "hf_sai.optimizer_facts",
        "hf_sai.report.rows",
        "hf_sai.report.schema",
    }


@pytest.mark.parametrize(
    ("file", "line", "fault"),
    [
        ("hf_sai/report/data.py", "def f():\n    from .terminal import plain", "hf_sai.report.terminal goes up"),
        ("hf_sai/report/compare.py", "if TYPE_CHECKING:\n    from . import report", "hf_sai.report.report goes up"),
        ("hf_sai/report/html.py", "from .markdown import report_markdown", "to a neighbour"),
        ("hf_sai/report/plots.py", "from . import GSNRReport", "-> hf_sai.report goes up"),
        ("hf_sai/optim/gsnr.py", "def f():\n    from .sgd_sai import SGDSaI", "goes round"),
        ("hf_sai/optim/whitening.py", "import hf_sai.optim.swan", "goes round"),
        ("hf_sai/live.py", "if TYPE_CHECKING:\n    from .integration import register", "goes round"),
        ("hf_sai/files.py", "from .optim import SGDSaI", "hf_sai.files -> hf_sai.optim goes to a neighbour"),
        ("hf_sai/optim/base.py", "import importlib; importlib.import_module('hf_sai.files')", "to a neighbour"),
        ("hf_sai/optim/base.py", "from hf_sai import SGDSaI", "goes to the face"),
        ("hf_sai/hub/card.py", "from ..trainer import SaITrainer", "hf_sai.hub.card -> hf_sai.trainer goes up"),
        ("trainer_patches/compat.py", "from hf_sai.integration import register", "hf_sai.integration goes up"),
        ("hf_sai/attic.py", "", "hf_sai.attic stands on no floor"),
    ],
)
def test_one_import_upward_or_round_is_found(tmp_path, file, line, fault):
    for package in PACKAGES:
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    assert faults(tmp_path) == []
    with (tmp_path / file).open("a") as changed:
        changed.write(f"\n{line}\n")
    found = faults(tmp_path)
    assert found != []
    assert any(fault in each for each in found), found


def test_what_is_too_long_is_found(tmp_path):
    code = runpy.run_path(str(ROOT / "tools" / "check_house.py"))
    body = "".join(f"    x = {index}\n" for index in range(58))
    short, long = f"def f():\n{body}    pass\n", f"@d\nasync def g():\n{body}    pass\n"
    assert len(short.splitlines()) == 60
    assert [*code["too_long"](written(tmp_path / "a.py", short + "\n" * 390))] == []
    path = written(tmp_path / "b.py", "\n" * 391 + long)
    assert [each.removeprefix(f"{path}").split("; ")[0] for each in code["too_long"](path)] == [
        ": a file has at most 450 lines, but this one has 452",
        ":392: a function has at most 60 lines, but g has 61",
    ]


def written(path, text):
    path.write_text(text)
    return path


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


def test_a_type_checker_sees_the_names_of_the_face():
    """Each under its own name (`import x as x`), which hands it on in strict mode too."""
    blocks = [node for node in ast.parse(Path(hf_sai.__file__).read_text()).body if isinstance(node, ast.If)]
    block = next(node for node in blocks if isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING")
    seen = {(alias.asname, alias.name): f".{node.module}" for node in block.body for alias in node.names}
    assert seen == {(name, name): module for name, module in hf_sai._HOME.items()}


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

    if not (ROOT / ".git").exists():
        pytest.skip("outside git nobody says which files are ours")
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    pattern = re.compile(r"/(home|Users)/[a-z]+/|hf_[A-Za-z0-9]{30,}")
    texts = {f: (ROOT / f).read_text(errors="ignore") for f in files if (ROOT / f).is_file()}
    assert [f for f, text in texts.items() if pattern.search(text) and f != "tests/test_card.py"] == []


def test_no_test_file_imports_another():
    """Renaming a test would break the other: what they share is in tests/support."""
    files = sorted((ROOT / "tests").glob("test_*.py"))
    assert len(files) > 40
    names = {path.stem for path in files}
    nodes = [(path.name, node) for path in files for node in ast.walk(ast.parse(path.read_text()))]
    targets = [(file, alias.name) for file, node in nodes if isinstance(node, ast.Import) for alias in node.names]
    targets += [(file, node.module or "") for file, node in nodes if isinstance(node, ast.ImportFrom)]
    assert len(targets) > 200
    assert [(file, target) for file, target in targets if target.split(".")[0] in names] == []


@pytest.mark.parametrize("beside", ["{}", "é{}é", "x={},", "hf_oauth_{}"])
def test_one_pattern_finds_a_token_in_text_and_bytes(beside):
    from trainer_patches.tokens import TOKEN, TOKEN_BYTES

    token = "a1" * 17
    text = beside.format(token if "oauth" in beside else f"hf_{token}")
    assert TOKEN.search(text).group().endswith(token)
    assert TOKEN_BYTES.search(text.encode()).group().endswith(token.encode())
    assert TOKEN.search(text.replace(token, token[:29])) is None
