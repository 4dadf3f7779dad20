"""Names added to the host's enum and table, by the real host, in processes of their own where order matters."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import types
import warnings

import pytest
from transformers import HfArgumentParser, Trainer, TrainingArguments
from transformers.training_args import OptimizerNames

import hf_sai
import trainer_patches
from trainer_patches import compat, deepspeed_optimizer, training_moments


def run_python(code, *arguments, cwd=None):
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=cwd, check=True
    ).stdout


def handler(context):
    return str, {"value": context.optim_args}


@pytest.fixture
def added():
    trainer_patches.add_optimizer("a_name", handler)
    yield "a_name"
    trainer_patches.remove_optimizer("a_name")


def test_any_name_and_handler(added, tmp_path):
    args = TrainingArguments(str(tmp_path), optim=added, optim_args="x=1")
    assert args.optim is OptimizerNames("a_name") is OptimizerNames.A_NAME is OptimizerNames["A_NAME"]
    assert args.optim in list(OptimizerNames)
    assert Trainer.get_optimizer_cls_and_kwargs(args) == (str, {"value": {"x": "1"}})
    (parsed,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses(["--optim", "a_name"])
    assert parsed.optim == "a_name"


def test_removal_leaves_the_host_as_it_was(added):
    trainer_patches.remove_optimizer(added)
    assert not hasattr(OptimizerNames, "A_NAME")
    assert "a_name" not in [member.value for member in OptimizerNames]
    with pytest.raises(ValueError, match="a_name is not a valid OptimizerNames"):
        OptimizerNames("a_name")
    trainer_patches.remove_optimizer(added)  # again: nothing to do


def test_the_same_twice_is_fine_and_another_handler_is_not(added):
    trainer_patches.add_optimizer(added, handler)
    with pytest.raises(ValueError, match="'a_name' is taken by"):
        trainer_patches.add_optimizer(added, lambda context: handler(context))


def test_a_name_of_the_host_is_refused_and_kept():
    before = Trainer.get_optimizer_cls_and_kwargs(TrainingArguments("unused", optim="sgd"))
    with pytest.raises(ValueError, match="'sgd' is one of the host's own"):
        trainer_patches.add_optimizer("sgd", handler)
    assert Trainer.get_optimizer_cls_and_kwargs(TrainingArguments("unused", optim="sgd")) == before
    assert "sgd" not in trainer_patches.added_optimizers()


def test_members_are_pickled_as_strings_and_those_of_the_host_as_members(added):
    assert type(pickle.loads(pickle.dumps(OptimizerNames("a_name")))) is str
    assert pickle.loads(pickle.dumps(OptimizerNames.SGD)) is OptimizerNames.SGD
    assert copy.deepcopy(OptimizerNames("a_name")) == "a_name"


def test_importing_hf_sai_is_undone_by_unregister_and_imports_no_host():
    code = """
import sys, hf_sai
assert not any(name in sys.modules for name in ("transformers.trainer", "transformers.training_args", "trl", "peft",
                                                "matplotlib", "diffusers", "datasets"))
import transformers.training_args as t, transformers.trainer as tr, transformers.trainer_optimizer as to
names = [m.value for m in t.OptimizerNames]
assert "sgd_sai" in names and "sgd_sai" in to._OPTIMIZER_HANDLERS
hf_sai.register()
assert [m.value for m in t.OptimizerNames] == names
hf_sai.unregister()
assert "sgd_sai" not in [m.value for m in t.OptimizerNames] and "sgd_sai" not in to._OPTIMIZER_HANDLERS
assert type(tr._parse_optim_args).__name__ == type(to._parse_optim_args).__name__ == "function"
import copyreg
assert t.OptimizerNames not in copyreg.dispatch_table
assert all(getattr(hf_sai, name) for name in hf_sai.__all__)
# What the host's Trainer imports by itself (PEFT, datasets, jinja2) is not ours to leave out.
print(*(name for name in ("trl", "diffusers", "matplotlib", "evaluate", "typer") if name in sys.modules), "fine")
"""
    assert run_python(code).split() == ["fine"]


def test_importing_hf_sai_after_the_host_works_too():
    code = """
import transformers.trainer, transformers
import hf_sai
args = transformers.TrainingArguments("unused", optim="sgd_sai", optim_args="momentum=0.5", learning_rate=0.25)
cls, kwargs = transformers.Trainer.get_optimizer_cls_and_kwargs(args)
print(cls.__module__, cls.__name__, sorted(kwargs.items()))
"""
    assert run_python(code) == "hf_sai.optim.sgd_sai SGDSaI [('lr', 0.25), ('momentum', 0.5), ('weight_decay', 0.0)]\n"


def test_sft_config_and_its_parser():
    from trl import SFTConfig

    assert SFTConfig("unused", optim="sgd_sai", bf16=False).optim == "sgd_sai"
    (parsed,) = HfArgumentParser(SFTConfig).parse_args_into_dataclasses(["--optim", "sgd_sai", "--bf16", "False"])
    assert parsed.optim == "sgd_sai"


@pytest.mark.parametrize("version", ["4.57.0", "5.3.9", "6.0.0", "6.0.0rc1"])
def test_unsupported_versions_are_refused_with_those_that_work(version, monkeypatch):
    monkeypatch.setattr(compat.importlib.metadata, "version", lambda package: version)
    with pytest.raises(trainer_patches.UnsupportedHostError, match=rf">= 5.4 and < 6, but {version} is installed"):
        hf_sai.register()


def test_unsupported_version_at_import_is_a_warning_and_the_optimizers_work():
    code = """
import importlib.metadata as m, warnings
real = m.version
m.version = lambda package: "4.57.0" if package == "transformers" else real(package)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import hf_sai.optim
print([str(w.message)[:60] for w in caught if "4.57.0" in str(w.message)], hf_sai.optim.SGDSaI.__name__)
"""
    assert run_python(code) == "['optimizer names can be added to transformers >= 5.4 and < 6,'] SGDSaI\n"


def test_a_handler_of_others_in_the_table_is_refused_and_kept(monkeypatch):
    from transformers import trainer_optimizer

    def theirs(context):
        return None

    monkeypatch.setitem(trainer_optimizer._OPTIMIZER_HANDLERS, "their_name", theirs)
    with pytest.raises(ValueError, match=r"'their_name' is taken by .*theirs in the host's table"):
        trainer_patches.add_optimizer("their_name", handler)
    assert trainer_optimizer._OPTIMIZER_HANDLERS["their_name"] is theirs
    assert not hasattr(OptimizerNames, "THEIR_NAME")


def test_a_host_that_got_the_name_itself_still_imports():
    code = """
import warnings, hf_sai
from trainer_patches import add_optimizer
def handler(context): ...
add_optimizer("sgd", handler)  # the host is not imported yet
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    from transformers import Trainer, TrainingArguments
print([str(w.message)[:60] for w in caught if "was not added" in str(w.message)])
print(Trainer.get_optimizer_cls_and_kwargs(TrainingArguments("unused", optim="sgd"))[0].__name__)
print(TrainingArguments("unused", optim="sgd_sai").optim.value)
"""
    assert run_python(code).split("\n")[:3] == [
        "[\"'sgd' was not added: the optimizer name 'sgd' is one of the \"]",
        "SGD",
        "sgd_sai",
    ]


def test_importing_hf_sai_anew_is_fine():
    code = """
import sys, transformers.trainer, hf_sai
for name in [name for name in sys.modules if name.split(".")[0] == "hf_sai"]:
    del sys.modules[name]
import hf_sai
args = transformers.TrainingArguments("unused", optim="sgd_sai")
print(transformers.Trainer.get_optimizer_cls_and_kwargs(args)[0] is hf_sai.SGDSaI)
"""
    assert run_python(code) == "True\n"


def test_a_host_without_the_table_is_refused(monkeypatch):
    from transformers import trainer_optimizer

    monkeypatch.delattr(trainer_optimizer, "_OPTIMIZER_HANDLERS")
    with pytest.raises(trainer_patches.UnsupportedHostError, match="has no such table"):
        trainer_patches.add_optimizer("another", handler)


def test_a_newer_host_that_lacks_what_is_patched_still_imports_and_is_named(monkeypatch):
    """One warning for each thing that is gone, with what does not work and what to install."""
    monkeypatch.setattr(compat.importlib.metadata, "version", lambda package: "5.99.0")
    newer = types.ModuleType("transformers.trainer")
    newer.Trainer = type("Trainer", (), {"__module__": "transformers.trainer"})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        training_moments._apply(newer)
        deepspeed_optimizer._wrap(types.ModuleType("transformers.integrations.deepspeed"))
    assert [str(each.message) for each in caught] == [
        f"transformers.{name} is needed but transformers 5.99.0 lacks it, so {lost}; install transformers <= 5.24.0, "
        "the newest that was tried"
        for name, lost in (
            ("trainer.CallbackHandler", "no training is checked before its first step"),
            ("trainer.Trainer.train", "no training is checked before its first step"),
            (
                "integrations.deepspeed.deepspeed_optim_sched",
                "an optimizer that DeepSpeed's configuration names is found later only",
            ),
        )
    ]
    arguments = types.ModuleType("transformers.training_args")
    with pytest.raises(trainer_patches.UnsupportedHostError, match=r"training_args\.OptimizerNames, but this .*5\.99"):
        compat.optimizer_names(arguments)


@pytest.mark.parametrize(
    ("version", "newer"), [("5.25.0", True), ("5.25.0.dev0", True), ("5.24.9", False), ("not installed", False)]
)
def test_newer_than_tried_is_a_matter_of_the_minor_version(version, newer):
    assert compat.is_newer_than_tried("transformers", version) is newer
    assert not compat.is_newer_than_tried("torch", version)


@pytest.mark.parametrize("text", ["momentum", "momentum=0.9,", "a=b=c", "betas=(0.9,0.95)"])
def test_optim_args_that_cannot_be_read(text, tmp_path):
    args = TrainingArguments(str(tmp_path), optim="sgd_sai", optim_args=text)
    with pytest.raises(ValueError, match="optim_args must be name=value entries with commas between"):
        Trainer.get_optimizer_cls_and_kwargs(args)


def test_trainer_patches_knows_nothing_of_ours():
    from pathlib import Path

    sources = Path(trainer_patches.__file__).parent.glob("*.py")
    assert [p.name for p in sources if any(w in p.read_text() for w in ("hf_sai", "sgd_sai", "SaI", "gsnr"))] == []
