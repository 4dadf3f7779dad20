"""Records and typed options."""

from __future__ import annotations

import ast
import dataclasses
import inspect
from pathlib import Path

import pytest
import torch
from support.models import tiny_llama, token_blocks
from support.trainers import arguments
from transformers import Trainer
from typer.testing import CliRunner

import hf_sai
from hf_sai import GSNRReport, SaITrainer
from hf_sai.cli import app
from hf_sai.memory import memory_rows
from hf_sai.model_shapes import named_shapes
from hf_sai.optim import (
    OptimizerRecord,
    OptionError,
    SGDSaI,
    get_record,
    list_records,
    parse_options,
    register_record,
    unregister_record,
)
from hf_sai.optim.registry import Option


def test_every_option_is_an_argument_of_its_class_and_every_argument_an_option():
    for record in list_records():
        arguments = set(inspect.signature(record.cls).parameters) - {"params", "lr", "weight_decay", "unknown"}
        routing = {option.name for option in record.options if option.routing}
        assert {option.name for option in record.options if not option.routing} == arguments - routing
        assert routing == ({"lora_whitening", "split_qkv"} if record.needs_modules else {"lora_policy"})


def test_defaults_read_as_text_give_themselves():
    for record in list_records():
        for option in record.options:
            assert option.parse(str(record.default(option.name))) == record.default(option.name)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ({"momentum": "0.8"}, {"momentum": 0.8}),
        ({"momentum": 0}, {"momentum": 0.0}),
        ({"maximize": "False"}, {"maximize": False}),  # bool("False") is True: the host's own trap
        ({"maximize": "true"}, {"maximize": True}),
        ({"measure_steps": "4"}, {"measure_steps": 4}),
        ({"normalize": "max", "eps": "1e-10"}, {"normalize": "max", "eps": 1e-10}),
        ({"normalize": None}, {"normalize": "none"}),  # as a host that reads literals hands on "none"
    ],
)
def test_typed_values(text, value):
    parsed = parse_options(get_record("sgd_sai"), text)
    assert parsed == value
    assert [type(parsed[name]) for name in parsed] == [type(value[name]) for name in value]


@pytest.mark.parametrize(
    "given", [{"momentum": True}, {"measure_steps": "1.5"}, {"measure_steps": 1.5}, {"eps": ""}, {"maximize": "2"}]
)
def test_values_of_another_type_are_refused(given):
    (name,) = given
    with pytest.raises(OptionError, match=f"{name} of sgd_sai must be "):
        parse_options(get_record("sgd_sai"), given)


def test_typed_values_of_swan():
    given = {
        "betas": "0.9/0.95",
        "ns_steps": "none",
        "split_qkv": "true",
        "whitening": "svd",
        "max_batch_bytes": "1024",
    }
    parsed = parse_options(get_record("swan"), given)
    assert parsed == {
        "betas": (0.9, 0.95), "ns_steps": None, "split_qkv": True, "whitening": "svd", "max_batch_bytes": 1024
    }  # fmt: skip
    assert parse_options(get_record("swan"), {"betas": (0.8, 0.9)}) == {"betas": (0.8, 0.9)}
    for bad in ({"betas": "0.9"}, {"betas": "a/b"}, {"betas": 0.9}, {"lora_policy": "B"}, {"whitening": "qr"}):
        with pytest.raises(OptionError, match="of swan must be "):
            parse_options(get_record("swan"), bad)


def test_unknown_names_list_the_known_ones():
    with pytest.raises(
        OptionError, match="'sgdsai' is not an optimizer of hf_sai; choose one of: sgd_sai, sgd_sai_layerwise, swan"
    ):
        get_record("sgdsai")
    with pytest.raises(OptionError, match="betas is not an option of sgd_sai; valid options: eps, foreach"):
        parse_options(get_record("sgd_sai"), {"betas": "1"})


def test_record_of_sgd_sai():
    record = get_record("sgd_sai")
    assert record.cls is SGDSaI
    assert record.default("momentum") == 0.9


class Dummy(torch.optim.SGD):
    """An optimizer that nobody has heard of."""

    def __init__(self, params, lr=0.25, weight_decay=0.0, momentum=0.5):
        super().__init__(params, lr=lr, weight_decay=weight_decay, momentum=momentum)


def dummy_record(**changed):
    momentum = Option("momentum", "a number", float, "decay of the buffer")
    record = OptimizerRecord("dummy", Dummy, "Dummy: of a test", (momentum,), "1609.04747", "start at 0.1")
    return dataclasses.replace(record, **changed)


@pytest.fixture
def dummy():
    register_record(dummy_record())
    yield
    unregister_record("dummy")


def test_one_record_is_an_optimizer_of_the_trainer(dummy, tmp_path):
    trained = []
    for optim in ("dummy", None):
        args = arguments(
            tmp_path, optim=optim or "sgd", optim_args="momentum=0.75" if optim else None, weight_decay=0.5
        )
        model = tiny_llama()
        groups = hf_sai.param_groups(model, "dummy", 0.5)
        assert [group["weight_decay"] for group in groups] == [0.5, 0.0]
        ours = (torch.optim.SGD(groups, lr=0.05, momentum=0.75), None)
        trainer = Trainer(model, args, train_dataset=token_blocks(), optimizers=(None, None) if optim else ours)
        trainer.train()
        trained.append([param.detach() for param in model.parameters()])
        if optim:
            hf_sai.assert_optimizer(trainer.optimizer, "dummy")
    assert all(torch.equal(one, other) for one, other in zip(*trained, strict=True))
    assert not torch.equal(trained[0][0], next(tiny_llama().parameters()))


def test_one_record_is_a_choice_everywhere_and_goes_again(tmp_path):
    with pytest.raises(ValueError, match="dummy"):
        arguments(tmp_path, optim="dummy")
    register_record(dummy_record(saved_keys=frozenset({"nesterov"})))
    try:
        assert arguments(tmp_path, optim="dummy").optim == "dummy"
        assert get_record("dummy") in list_records()
        optimizer = hf_sai.create_optimizer("dummy", tiny_llama())
        assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]
        (row,) = memory_rows(named_shapes("gpt2"), ["dummy"])
        assert (row.state, row.extra) == (124_439_808 * 4, 0)  # momentum; torch says nothing of what an update needs
        with pytest.raises(ValueError, match="SWAN loads only state that SWAN saved, but Dummy saved this one"):
            hf_sai.create_optimizer("swan", tiny_llama()).load_state_dict(optimizer.state_dict())
        with pytest.raises(OptionError, match="split_qkv, target_modules can't be set for dummy"):
            hf_sai.param_groups(tiny_llama(), "dummy", split_qkv=True, target_modules="all-linear")
        for other in (dummy_record(name="other"), dummy_record(cls=torch.optim.ASGD)):
            with pytest.raises(OptionError, match="a record must have a name and a class of its own, but"):
                register_record(other)
        with pytest.raises(ValueError, match="adamw_torch"):
            register_record(dummy_record(name="adamw_torch", cls=torch.optim.ASGD))
        assert "adamw_torch" not in {record.name for record in list_records()}
    finally:
        unregister_record("dummy")
    with pytest.raises(ValueError, match="dummy"):
        arguments(tmp_path, optim="dummy")
    with pytest.raises(OptionError, match="'dummy' is not an optimizer of hf_sai"):
        unregister_record("dummy")


@pytest.mark.parametrize("record", list_records(), ids=lambda record: record.name)
def test_defaults_are_what_an_optimizer_is_made_with(record):
    group = record.cls([torch.nn.Parameter(torch.ones(2, 2))]).param_groups[0]
    shown = {option.name for option in record.options if not option.routing and option.name in group}
    assert {"momentum", "eps", "maximize"} <= shown
    assert {name: record.default(name) for name in shown} == {name: group[name] for name in shown}


def test_defaults_are_the_papers():
    """Momentum and decay of arXiv 2412.11768, Algorithm 1; betas and eps of Adam where SWAN hands tensors to it."""
    sgd_sai, swan = get_record("sgd_sai"), get_record("swan")
    assert {name: sgd_sai.default(name) for name in ("momentum", "weight_decay", "eps", "measure_steps")} == {
        "momentum": 0.9, "weight_decay": 1e-2, "eps": 1e-8, "measure_steps": 1
    }  # fmt: skip
    assert {name: swan.default(name) for name in ("betas", "eps", "momentum", "weight_decay")} == {
        "betas": (0.9, 0.999), "eps": 1e-8, "momentum": 0.0, "weight_decay": 0.0
    }  # fmt: skip


def test_one_record_and_nothing_else_goes_the_whole_way(tmp_path, monkeypatch):
    """CONTRIBUTING's "Adding an optimizer": a run by its name, its report in every medium, card, list and memory."""
    monkeypatch.setenv("COLUMNS", "200")
    register_record(dummy_record())
    try:
        args = arguments(
            tmp_path, optim="dummy", learning_rate=0.1, weight_decay=0.5, optim_args="momentum=0.75", max_steps=2
        )
        trainer = SaITrainer(tiny_llama(), args, train_dataset=token_blocks(8))
        trainer.train()
        trainer.save_model()
        trainer.create_model_card()
        report = GSNRReport.load(tmp_path)
        assert (report.optimizer, report.kind, report.options) == ("dummy", "groups", {"momentum": 0.75})
        assert {row.route: row.reason for row in report.routes} == {
            "group 0": "lr=0.1, weight_decay=0.5, momentum=0.75",
            "group 1": "lr=0.1, weight_decay=0.0, momentum=0.75",
        }
        assert [line for line in report.to_text().splitlines() if "21 in 2 groups" in line]
        assert "| tensors | 21 in 2 groups |" in report.to_markdown()
        assert "<td>group 1</td>" in report.to_html()
        assert "21 in 2 groups" in report.plot().get_suptitle()
        assert (tmp_path / "gsnr_report.png").read_bytes()[:4] == b"\x89PNG"
        card = (tmp_path / "README.md").read_text()
        for line in (
            "- dummy",
            "- arxiv:1609.04747",
            "- optimizer: dummy of hf_sai with momentum=0.75; see the section Optimizer",
            "Trained with **dummy** ([paper](https://arxiv.org/abs/1609.04747)) by `hf_sai`: Dummy: of a test.",
            "| momentum | 0.75 |",
            "| `norm` | 1 | 16 | group 1 | lr=0.1, weight_decay=0.0, momentum=0.75 |",
            'args = TrainingArguments("out", optim="dummy", learning_rate=0.1, weight_decay=0.5, '
            'optim_args="momentum=0.75")',
        ):
            assert line in card.splitlines(), line
        assert not any(word in card for word in ("SGD-SaI", "SWAN", "g-SNR", "scales", "whitened"))
        listed = CliRunner().invoke(app, ["list"])
        assert listed.exit_code == 0
        assert "Dummy: of a test" in listed.stdout
        (row,) = memory_rows(named_shapes("gpt2"), ["dummy"])
        assert (row.state, row.extra) == (124_439_808 * 4, 0)
    finally:
        unregister_record("dummy")


NAMED = {record.name for record in list_records()}
CLASSES = {record.cls.__name__ for record in list_records()}
# Their classes and records; SWAN's routing, whose groups have a kind "swan"; a paper's figures beside those counted.
OF_THEIR_OWN = {
    "optim/sgd_sai.py",
    "optim/swan.py",
    "optim/layerwise.py",
    "optim/registry.py",
    "optim/routing.py",
    "cli/memory.py",
}


def branches_on_one_optimizer(source):
    """Lines that compare with an optimizer's name or class, or ask for an instance of it."""
    found = []
    for node in ast.walk(ast.parse(source)):
        asked = []
        if isinstance(node, ast.Compare):
            asked = [node.left, *node.comparators]
        elif isinstance(node, ast.MatchValue):
            asked = [node.value]
        elif isinstance(node, ast.Call):
            name = getattr(node.func, "id", getattr(node.func, "attr", ""))
            asked = node.args if name in ("isinstance", "issubclass", "startswith", "endswith", "hasattr") else []
        inside = [each for part in asked for each in ast.walk(part)]
        words = {getattr(each, "value", None) for each in inside if isinstance(each, ast.Constant)}
        words |= {getattr(each, "id", getattr(each, "attr", "")) for each in inside}
        if words & (NAMED | CLASSES):
            found.append(node.lineno)
    return found


@pytest.mark.parametrize(
    "line",
    [
        'x = record.name == "swan"',
        'if "sgd_sai" in names: pass',
        'y = name not in ("swan", "swan_layerwise")',
        "z = isinstance(optimizer, (SWAN, int))",
        "z = type(optimizer) is optim.SGDSaI",
        'w = name.startswith("swan")',
        'match name:\n    case "swan": pass',
    ],
)
def test_a_branch_on_one_optimizer_is_found(line):
    assert branches_on_one_optimizer(line)


def test_no_file_asks_which_of_our_optimizers_it_is():
    """But their own records and classes: a third one would not be asked for."""
    root = Path(hf_sai.__file__).parent
    files = [path for path in sorted(root.rglob("*.py")) if path.relative_to(root).as_posix() not in OF_THEIR_OWN]
    found = {path.name: lines for path in files if (lines := branches_on_one_optimizer(path.read_text()))}
    assert found == {}
    flags = [
        path.name
        for path in files
        if any(getattr(node, "attr", "") == "routed" for node in ast.walk(ast.parse(path.read_text())))
    ]
    assert flags == []
    assert len(files) > 40
