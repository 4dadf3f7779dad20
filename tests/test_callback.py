"""
GSNRCallback in trainers that nobody may subclass: report and scalars are SaITrainer's.

Unsloth and axolotl need a GPU to be imported. What stands here has the shapes of their trainers, written anew: other
signatures, optimizers that they build themselves, arguments with an __init__ of their own, methods put on instances.
"""

from __future__ import annotations

import datetime
import functools
import inspect
import logging
from dataclasses import dataclass, field

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from support.models import tiny_llama, tiny_lora, token_blocks
from support.trainers import arguments, trainable
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import hf_sai
from hf_sai import GSNRCallback, GSNRReport, OptionError, SaIConfig, SaITrainer, make_trainer
from hf_sai.callback import warn_of_learning_rate
from hf_sai.live import unwrap_optimizer


LEARNING_RATE = {"sgd_sai": 0.05, "swan": 2e-3}
BIAS = "modules_to_save.default.weight"


@dataclass
class LikeUnslothArguments(TrainingArguments):
    """Generated: a dataclass whose own __init__ has other defaults than its fields, and takes anything."""

    embedding_learning_rate: float | None = None
    chunks: int | None = field(default=-1, metadata={"help": "of the loss"})

    def __init__(self, output_dir=None, learning_rate=3e-5, embedding_learning_rate=None, chunks=-1, **kwargs):
        super().__init__(output_dir=output_dir, learning_rate=learning_rate, **kwargs)
        self.embedding_learning_rate, self.chunks = embedding_learning_rate, chunks


class LikeUnsloth(Trainer):
    """No model for `create_optimizer`, none for the host's table, groups without names, one of them may be empty."""

    def __init__(self, model=None, args=None, tokenizer=None, **kwargs):
        super().__init__(model=model, args=args, processing_class=tokenizer, **kwargs)
        inner = self.train

        @functools.wraps(inner)
        def train(*args, **kwargs):
            self.model.train()
            return inner(*args, **kwargs)

        self.train = train

    def create_optimizer(self):
        embedding = self.args.embedding_learning_rate
        if embedding is None:
            return super().create_optimizer()
        if self.optimizer is None:
            cls, kwargs = Trainer.get_optimizer_cls_and_kwargs(self.args)
            named = [(name, param) for name, param in self.model.named_parameters() if param.requires_grad]
            parts = {kind: [p for name, p in named if name.endswith(BIAS) == kind] for kind in (False, True)}
            decay = kwargs.get("weight_decay", 0.0)
            groups = [
                {"params": parts[kind], "weight_decay": decay, "lr": embedding if kind else kwargs["lr"]}
                for kind in (False, True)
            ]
            self.optimizer = cls(groups, **kwargs)
        return self.optimizer


@dataclass
class LikeAxolotlArguments(TrainingArguments):
    """Learning rates for parts of the model."""

    embedding_lr: float | None = None
    embedding_lr_scale: float | None = None
    lr_groups: list[dict] | None = None
    loraplus_lr_ratio: float | None = None


class LikeAxolotl(Trainer):
    """Groups of its own where parts have learning rates, unless the host's table gives some; metrics in `log`."""

    def log(self, logs, start_time=None):
        if "loss" in logs:
            logs["stored"] = 1.0
        return super().log(logs, start_time)

    def own_groups(self, model, rate):
        rates = {"embed_tokens": self.args.embedding_lr or rate * (self.args.embedding_lr_scale or 1.0)}
        rates |= {part: group["lr"] for group in self.args.lr_groups or [] for part in group["modules"]}
        parts = {}
        for name, param in model.named_parameters():
            if param.requires_grad:
                parts.setdefault(next((part for part in rates if part in name), None), []).append(param)
        return [
            {"params": params, "weight_decay": 0.0 if part else self.args.weight_decay, "lr": rates.get(part, rate)}
            for part, params in parts.items()
        ]

    def create_optimizer(self, model=None):
        args = self.args
        parts = (args.loraplus_lr_ratio, args.embedding_lr, args.embedding_lr_scale, args.lr_groups)
        if all(value is None for value in (*parts, self.optimizer_cls_and_kwargs)):
            with_model = "model" in inspect.signature(super().create_optimizer).parameters  # transformers 5.2 has none
            return super().create_optimizer(model) if with_model else super().create_optimizer()
        opt_model = self.model if model is None else model
        cls, kwargs = self.optimizer_cls_and_kwargs or self.get_optimizer_cls_and_kwargs(args, opt_model)
        if args.loraplus_lr_ratio is not None:
            self.optimizer = create_loraplus_optimizer(
                opt_model, cls, loraplus_lr_ratio=args.loraplus_lr_ratio, loraplus_weight_decay=0.0, **kwargs
            )
        else:
            groups = self.own_groups(opt_model, kwargs["lr"])
            groups = kwargs.pop("params", groups)
            self.optimizer = cls(groups, **kwargs)
        return self.optimizer


MadeUnsloth, MadeAxolotl = make_trainer(LikeUnsloth), make_trainer(LikeAxolotl)
ARGUMENTS = {
    **dict.fromkeys((LikeUnsloth, MadeUnsloth), LikeUnslothArguments),
    **dict.fromkeys((LikeAxolotl, MadeAxolotl), LikeAxolotlArguments),
}
pytestmark = pytest.mark.usefixtures("no_picture")


def run(folder, cls, optim, build=tiny_llama, callback=None, config=None, choice=None, **changed):
    """A training; `callback` says how ours comes into it: after the trainer was made, with it, or by the mixin."""
    settings = {"optim": optim, "learning_rate": LEARNING_RATE[optim], "weight_decay": 0.1, **changed}
    args = arguments(folder, cls=ARGUMENTS.get(cls, TrainingArguments), **settings)
    options = {"callbacks": [GSNRCallback()]} if callback == "given" else {}
    if choice is not None:
        options["optimizer_cls_and_kwargs"] = choice
    trainer = cls(build(), args, train_dataset=token_blocks(), **options)
    if callback == "added":
        trainer.add_callback(GSNRCallback(trainer, config))
    trainer.train()
    return trainer


def scalars(trainer):
    """What was logged of ours, step by step."""
    ours = [{k: v for k, v in entry.items() if "/" in k or k == "step"} for entry in trainer.state.log_history]
    return [entry for entry in ours if len(entry) > 1]


def assert_same(found, found_folder, expected, expected_folder):
    """Report, scalars and weights, by value."""
    assert GSNRReport.load(found_folder) == GSNRReport.load(expected_folder)
    assert scalars(found) == scalars(expected)
    assert scalars(expected)
    weights = trainable(expected.model)
    assert all(torch.equal(value, weights[name]) for name, value in trainable(found.model).items())


def rates(trainer):
    """Learning rates of the groups, by name of the parameter, at the peak."""
    groups = unwrap_optimizer(trainer.optimizer).param_groups
    return {name: group["initial_lr"] for group in groups for name in group["param_names"]}


@pytest.mark.parametrize(("callback", "build"), [("added", tiny_lora), ("given", tiny_llama)])
@pytest.mark.parametrize("optim", LEARNING_RATE)
@pytest.mark.parametrize("cls", [LikeUnsloth, LikeAxolotl])
def test_callback_gives_the_trainers_report_and_scalars(tmp_path, cls, optim, build, callback):
    found = run(tmp_path / "found", cls, optim, build, callback, save_strategy="steps", save_steps=3)
    expected = run(tmp_path / "expected", SaITrainer, optim, build, save_strategy="steps", save_steps=3)
    assert_same(found, tmp_path / "found", expected, tmp_path / "expected")
    for step in (3, 6):
        saved = [GSNRReport.load(tmp_path / name / f"checkpoint-{step}") for name in ("found", "expected")]
        assert saved[0] == saved[1]


@pytest.mark.parametrize("optim", LEARNING_RATE)
def test_the_hosts_own_logs_are_those_of_a_run_without_us(tmp_path, optim, monkeypatch):
    """In a step that both log, too."""
    config = SaIConfig(gsnr_track_steps=1 if optim == "sgd_sai" else 0)
    with monkeypatch.context() as patch:
        patch.setenv("HF_SAI_REPORT", "0")
        plain = run(tmp_path / "plain", Trainer, optim, tiny_lora, logging_steps=1)
    assert not [each for each in plain.callback_handler.callbacks if isinstance(each, GSNRCallback)]
    found = run(tmp_path / "found", Trainer, optim, tiny_lora, "added", config=config, logging_steps=1)
    kept = ("step", "loss", "grad_norm", "learning_rate", "epoch")
    logs = [
        [{key: entry.get(key) for key in kept} for entry in trainer.state.log_history if "loss" in entry]
        for trainer in (plain, found)
    ]
    assert logs[0] == logs[1]
    assert [entry["step"] for entry in logs[0]] == [1, 2, 3, 4, 5, 6]
    assert len(scalars(found)) == (8 if optim == "sgd_sai" else 1)


def save_head():
    return tiny_lora(modules_to_save=["lm_head"])


@pytest.mark.parametrize("build", [save_head, tiny_llama])
def test_unsloths_groups_have_names_and_their_learning_rates(tmp_path, build):
    options = {"embedding_learning_rate": 0.02}
    found = run(tmp_path / "found", LikeUnsloth, "sgd_sai", build, "added", **options)
    expected = run(tmp_path / "expected", MadeUnsloth, "sgd_sai", build, **options)
    assert_same(found, tmp_path / "found", expected, tmp_path / "expected")
    head = {name for name in trainable(found.model) if name.endswith(BIAS)}
    assert len(head) == (build is save_head)
    assert rates(found) == {name: 0.02 if name in head else 0.05 for name in trainable(found.model)}
    rows = GSNRReport.load(tmp_path / "found").tensors
    assert {row.name: row.learning_rate for row in rows} == pytest.approx(
        {row.name: (0.02 if row.name in head else 0.05) * row.scale for row in rows}
    )


@pytest.mark.parametrize(
    ("build", "changed", "expected"),
    [
        (tiny_llama, {"embedding_lr": 0.01}, {"embed_tokens": 0.01}),
        (tiny_llama, {"embedding_lr_scale": 0.5}, {"embed_tokens": 0.025}),
        (tiny_llama, {"lr_groups": [{"name": "a", "modules": ["q_proj"], "lr": 0.04}]}, {"q_proj": 0.04}),
        (tiny_lora, {"loraplus_lr_ratio": 4.0}, {"lora_B": 0.2}),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_axolotls_learning_rates_for_parts_are_kept(tmp_path, build, changed, expected):
    options = {**changed}
    found = run(tmp_path / "found", LikeAxolotl, "sgd_sai", build, "added", **options)
    by_mixin = run(tmp_path / "expected", MadeAxolotl, "sgd_sai", build, **options)
    assert_same(found, tmp_path / "found", by_mixin, tmp_path / "expected")
    ((part, rate),) = expected.items()
    assert rates(found) == {name: rate if part in name else 0.05 for name in trainable(found.model)}
    assert any(part in name for name in rates(found))
    stored = ["stored" in entry for entry in found.state.log_history if "loss" in entry]
    assert stored == [True] * 3
    assert not any("stored" in entry for entry in found.state.log_history if "gsnr/measured" in entry)


@pytest.mark.parametrize("optim", LEARNING_RATE)
def test_axolotl_takes_class_and_arguments_too(tmp_path, optim):
    """The groups of `optimizer_cls_and_kwargs`, where a plugin gives that, are those of optim=."""

    model = tiny_llama()
    choice = hf_sai.optimizer_cls_and_kwargs(optim, lr=LEARNING_RATE[optim], weight_decay=0.1, model=model)
    found = run(tmp_path / "found", LikeAxolotl, optim, lambda: model, "added", choice=choice)
    expected = run(tmp_path / "expected", SaITrainer, optim)
    assert_same(found, tmp_path / "found", expected, tmp_path / "expected")


@pytest.mark.parametrize(
    ("cls", "changed", "reason"),
    [
        (LikeUnsloth, {"embedding_learning_rate": 0.02}, "the trainer gives no model and makes"),
        (LikeAxolotl, {"embedding_lr": 0.02}, "the trainer's embedding_lr makes"),
    ],
)
@pytest.mark.parametrize(("optim", "options"), [("swan", {}), ("sgd_sai", {"optim_args": "lora_policy=paired"})])
def test_groups_that_know_no_modules_are_refused_where_they_matter(tmp_path, cls, changed, reason, optim, options):
    """SWAN would whiten embeddings, and what optim_args say of routes and pairs would be dropped."""
    message = f"optim='{optim}' is routed by the model's modules, but {reason} groups without them; leave out"
    with pytest.raises(OptionError, match=message):
        run(tmp_path, cls, optim, callback="added", **options, **changed)


@pytest.mark.parametrize(("given", "warnings"), [({}, 1), ({"learning_rate": 0.05}, 0)])
def test_the_default_learning_rate_of_generated_arguments_is_warned_about(tmp_path, caplog, given, warnings):
    args = LikeUnslothArguments(str(tmp_path), optim="sgd_sai", use_cpu=True, report_to="none", max_steps=1, **given)
    trainer = LikeUnsloth(tiny_llama(), args, train_dataset=token_blocks(), callbacks=[GSNRCallback()])
    with caplog.at_level(logging.WARNING, logger="hf_sai"):
        trainer.train()
    found = [record.getMessage() for record in caplog.records if "made for Adam" in record.getMessage()]
    assert len(found) == warnings
    assert all("3e-05, the default of LikeUnslothArguments" in message for message in found)


def loaded(folder):
    tiny_llama().save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder)


def loaded_with_adapter(folder):
    return get_peft_model(loaded(folder), LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))


def of_a_loaded_configuration(folder):
    return AutoModelForCausalLM.from_config(loaded(folder).config)


def loaded_but_for_its_head(folder):
    """What is trained is new."""
    model = loaded(folder).requires_grad_(False)
    model.lm_head = torch.nn.Linear(16, 32)
    return model


LOW = "the default of TrainingArguments, which is made for Adam; sgd_sai needs another: "
PRETRAINED = "0.0001 to 0.001 on pretrained weights that are trained as a whole; start at 0.001."
ANY = "with normalize=none start at 1e-3 on pretrained weights (1e-4 to 1e-3;"


@pytest.mark.parametrize(
    ("build", "rate", "options", "said"),
    [
        (loaded, 5e-5, "", LOW + PRETRAINED),
        (loaded, 1e-3, "", ""),
        (loaded, 1e-2, "", "learning_rate is 0.01, which is high for sgd_sai: it needs " + PRETRAINED),
        (loaded, 1e-2, "normalize=rms", ""),
        (loaded, 5e-5, "normalize=rms", ""),
        (loaded, 1e-2, "normalize=max", ""),
        (loaded, 5e-5, "normalize=max", LOW + ANY),
        (lambda folder: tiny_llama(), 5e-5, "", LOW + ANY),
        (lambda folder: tiny_llama(), 1e-2, "", ""),
        (of_a_loaded_configuration, 1e-2, "", ""),
        (loaded_with_adapter, 5e-5, "", LOW + ANY),
        (loaded_with_adapter, 1e-1, "", ""),
        (loaded_but_for_its_head, 1e-2, "", ""),
    ],
)
def test_a_rate_is_judged_by_the_weights_that_it_is_for(tmp_path, caplog, build, rate, options, said):
    args = arguments(tmp_path, learning_rate=rate, optim_args=options or None)
    trainer = Trainer(build(tmp_path / "model"), args)
    optimizer = trainer.create_optimizer()
    with caplog.at_level(logging.WARNING, logger="hf_sai"):
        warn_of_learning_rate(args, optimizer, trainer.model)
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == bool(said)
    assert all(said in message for message in messages)
    assert not any("1e-2" in message for message in messages if build is loaded and options == "")


class Broken(GSNRCallback):
    """Whose report can neither be read nor written."""

    def _read(self, *args, **kwargs):
        raise RuntimeError("broken report")


@pytest.mark.parametrize("optim", LEARNING_RATE)
def test_no_fault_of_a_report_ends_a_training(tmp_path, optim, caplog, monkeypatch):
    expected = run(tmp_path / "expected", Trainer, optim)
    monkeypatch.setattr("hf_sai.trainer.GSNRCallback", Broken)
    found = run(tmp_path / "found", Trainer, optim)
    assert "broken report" in caplog.text
    monkeypatch.setattr("hf_sai.trainer.GSNRCallback", lambda trainer: 1 / 0)
    without = run(tmp_path / "without", Trainer, optim)
    assert "There will be no report of this training" in caplog.text
    weights = [trainable(each.model) for each in (expected, found, without)]
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name])
        assert torch.equal(value, weights[2][name])
    assert not list(tmp_path.rglob("without/gsnr_report.json")) + list(tmp_path.rglob("found/gsnr_report.json"))


def test_a_schema_that_is_made_after_us_knows_the_names():
    """axolotl reads `optimizer:` by a pydantic model over the host's enum."""
    pydantic = pytest.importorskip("pydantic")
    from transformers.training_args import OptimizerNames

    schema = pydantic.create_model("Schema", optimizer=(OptimizerNames | None, None))
    assert [schema(optimizer=name).optimizer.value for name in ("sgd_sai", "swan", "sgd")] == [
        "sgd_sai",
        "swan",
        "sgd",
    ]
    with pytest.raises(ValueError, match="optimizer"):
        schema(optimizer="sgd_sai_")


@pytest.mark.parametrize(("source", "known"), [("user/base", ", user/base"), (".", ""), ("", "")])
def test_model_date_and_repository_are_facts_of_a_run(tmp_path, no_picture, source, known):
    """The repository that the base of an adapter came from, but no folder of this machine."""
    model = tiny_lora()
    model.get_base_model().config.name_or_path = str(tmp_path) if source == "." else source
    args = arguments(tmp_path, max_steps=1, hub_model_id="user/run" if known else str(tmp_path))
    SaITrainer(model, args, train_dataset=token_blocks(4)).train()
    run = GSNRReport.load(tmp_path).run
    assert (run["model"], run.get("repository")) == (f"LlamaForCausalLM{known}", "user/run" if known else None)
    assert datetime.date.fromisoformat(run["date"])
    assert str(tmp_path) not in (tmp_path / "gsnr_report.json").read_text()
