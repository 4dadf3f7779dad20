"""The Trainer under DeepSpeed, LoRA and all: weights, report, card and resume; what is refused before it trains."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from support.zero import on_ranks
from support.zero_trainer import configuration, on_cpu, train_and_resume, trainer_of

from hf_sai import GSNRReport, SaITrainer


pytestmark = [
    pytest.mark.deepspeed,
    pytest.mark.skipif(
        importlib.util.find_spec("deepspeed") is None,
        reason="DeepSpeed is not installed; make test-deepspeed installs it",
    ),
]


def assert_same_report(found, expected):
    for one, other in zip(found.tensors, expected.tensors, strict=True):
        assert (one.name, one.shape, one.step, one.status) == (other.name, other.shape, other.step, other.status)
        assert one.gsnr == pytest.approx(other.gsnr, rel=1e-6)
        assert one.scale == pytest.approx(other.scale, rel=1e-6)
    assert [(row.name, row.shape, row.route) for row in found.routes] == [
        (row.name, row.shape, row.route) for row in expected.routes
    ]
    for key in ("options", "learning_rate", "weight_decay", "state_bytes", "adamw_state_bytes", "schedule"):
        assert getattr(found, key) == getattr(expected, key), key
    assert [entry["step"] for entry in found.history] == [entry["step"] for entry in expected.history]
    for one, other in zip(found.history, expected.history, strict=True):
        assert one["gsnr"] == pytest.approx(other["gsnr"], rel=1e-5)


@pytest.mark.parametrize(
    ("stage", "optim", "lora"),
    [(0, "sgd_sai", True), (1, "sgd_sai", True), (2, "sgd_sai", True), (3, "sgd_sai", True), (3, "swan", False)],
)
def test_a_trainer_and_its_resumed_run_equal_one_process(tmp_path, stage, optim, lora):
    settings = {"optim_args": "whitening_dtype=float32"} if optim == "swan" else {}
    found = on_ranks(2, train_and_resume, tmp_path, stage, lora, optim, settings)[0]
    from hf_sai import SaIConfig

    config = {"sai_config": SaIConfig(gsnr_track_steps=2)}
    trainer = trainer_of(SaITrainer, tmp_path / "one", None, lora, optim, trainer_options=config, **settings)
    trainer.train()
    for name, param in trainer.model.named_parameters():
        tolerance = 1e-6 if optim == "sgd_sai" else 1e-4
        torch.testing.assert_close(found["weights"][name], param.detach(), rtol=0, atol=tolerance)
        torch.testing.assert_close(found["resumed"][name], found["weights"][name], rtol=0, atol=1e-7)
    assert_same_report(found["report"], GSNRReport.load(tmp_path / "one"))
    assert_same_report(found["resumed_report"], found["report"])
    assert found["report"].run["world_size"] == 2
    assert {"gsnr_report.json", "gsnr_report.png"} <= set(found["checkpoint"])
    card = (tmp_path / "README.md").read_text()
    assert optim in card
    assert found["optimizer"] == "DeepSpeedOptimizerWrapper"
    prefix = "gsnr/measured" if optim == "sgd_sai" else "swan/whitened"
    assert any(prefix in entry for entry in found["log"])


def refused_worker(folder):
    """What each Trainer says of each configuration before it trains."""
    from transformers import Trainer

    on_cpu()
    offload = configuration(2)
    offload["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    with_optimizer = configuration(1, optimizer={"type": "AdamW", "params": {"lr": "auto", "torch_adam": True}})
    found = {}
    for cls in (Trainer, SaITrainer):
        for name, config, options in (
            ("optimizer", with_optimizer, {}),
            ("offload", offload, {}),
            ("layerwise", configuration(1), {"optim": "sgd_sai_layerwise", "max_grad_norm": 0.0}),
            ("paired", configuration(1), {"optim_args": "lora_policy=paired"}),
        ):
            try:
                trainer = trainer_of(cls, folder, config, lora=name == "paired", **options)
                trainer.train()
            except ValueError as error:
                found[cls.__name__, name] = (str(error), trainer.state.global_step)
    return found


def test_refusals_come_before_the_first_step_in_both_trainers(tmp_path):
    found = on_ranks(1, refused_worker, tmp_path)[0]
    for cls in ("Trainer", "SaITrainer"):
        for name, message in (
            ("optimizer", "the 'optimizer' section of the DeepSpeed configuration (AdamW) exclude each other"),
            ("offload", 'needs "zero_force_ds_cpu_optimizer": false in the DeepSpeed configuration'),
            ("layerwise", "which DeepSpeed has to itself; use optim='sgd_sai'"),
            ("paired", "lora_policy='paired' needs whole factors"),
        ):
            text, steps = found[cls, name]
            assert message in text
            assert steps == 0
