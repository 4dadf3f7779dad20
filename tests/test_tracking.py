"""Our own settings: g-SNR over training, scales from batches before the first update, and a run without a report."""

from __future__ import annotations

import json

import pytest
import torch
from support.models import tiny_llama, tiny_lora, token_blocks
from support.trainers import StopAt, arguments, trainable
from transformers import HfArgumentParser, TrainerCallback, TrainingArguments

import hf_sai
from hf_sai import GSNRCallback, GSNRReport, OptionError, SaIConfig, SaITrainer
from hf_sai.callback import schedule_range
from hf_sai.optim import gradient_moments, gradient_snr, measure_gsnr
from hf_sai.report import ReportError


class Gradients(TrainerCallback):
    """g-SNR of the gradients before each update, by another way."""

    def __init__(self):
        self.seen = {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        named = [(name, p.grad.clone()) for name, p in model.named_parameters() if p.grad is not None]
        moments = gradient_moments([gradient for _, gradient in named])
        self.seen[state.global_step + 1] = {
            name: gradient_snr(moment, 1e-8)
            for (name, _), moment in zip(named, moments, strict=True)
            if not moment.is_zero
        }


def test_tracked_gsnr_is_that_of_the_gradients_at_these_steps(tmp_path):
    gradients = Gradients()
    trainer = SaITrainer(
        tiny_lora(),
        arguments(tmp_path),
        train_dataset=token_blocks(),
        callbacks=[gradients],
        sai_config=SaIConfig(gsnr_track_steps=2),
    )
    trainer.train()
    report = GSNRReport.load(tmp_path)
    assert [entry["step"] for entry in report.history] == [2, 4, 6]
    for entry in report.history:
        assert entry["gsnr"] == pytest.approx(gradients.seen[entry["step"]], rel=1e-9)
    first = {row.name: row.gsnr for row in report.tensors}
    ratios = sorted(gsnr / first[name] for name, gsnr in report.history[1]["gsnr"].items())
    drift = report.drift()[1]
    assert (drift["min"], drift["median"], drift["max"]) == (ratios[0], ratios[len(ratios) // 2], ratios[-1])
    assert (tmp_path / "gsnr_history.png").read_bytes()[:4] == b"\x89PNG"
    logged = [entry for entry in trainer.state.log_history if "gsnr/ratio_to_first_median" in entry]
    assert [entry["gsnr/ratio_to_first_median"] for entry in logged] == [entry["median"] for entry in report.drift()]


def test_the_report_knows_the_range_of_the_schedule(tmp_path):
    """Its steps 1 to 6, of which the first moves nothing: 0, 1/2, 1, 3/4, 1/2, 1/4."""
    args = arguments(tmp_path, warmup_steps=2, logging_steps=1)
    trainer = SaITrainer(tiny_lora(), args, train_dataset=token_blocks())
    trainer.train()
    report = GSNRReport.load(tmp_path)
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert report.schedule == [0.25, 1.0]
    # One per step: our own scalars do not take the place of the host's log. Hosts differ in whether it is that of the
    # step before or after.
    assert sorted(rate / 0.05 for rate in rates) == pytest.approx([0.0, 0.25, 0.5, 0.5, 0.75, 1.0])
    row = report.tensors[0]
    assert report.learning_rate_range([row]) == pytest.approx((0.05 * row.scale / 4, 0.05 * row.scale))
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(trainer.optimizer.optimizer)
    assert schedule_range(plateau, 6) == []


def test_tracking_changes_no_weight_and_survives_a_resume(tmp_path):
    def run(folder, config=None, stop=None, resume=None):
        trainer = SaITrainer(
            tiny_llama(),
            arguments(folder, save_strategy="steps", save_steps=3),
            train_dataset=token_blocks(),
            callbacks=[StopAt(stop)] if stop else [],
            sai_config=config,
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainable(trainer.model)

    tracked = SaIConfig(gsnr_track_steps=1)
    plain, whole = run(tmp_path / "plain"), run(tmp_path / "whole", tracked)
    assert all(torch.equal(plain[name], whole[name]) for name in plain)
    assert GSNRReport.load(tmp_path / "plain").history == []
    run(tmp_path / "cut", tracked, stop=4)  # one step beyond the checkpoint
    run(tmp_path / "cut", tracked, resume=str(tmp_path / "cut" / "checkpoint-3"))
    assert GSNRReport.load(tmp_path / "cut").history == GSNRReport.load(tmp_path / "whole").history


def test_scales_come_from_batches_before_the_first_update(tmp_path):
    seen = []

    class First(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            seen.append(trainable(model))

    def run(folder, config, batches=None):
        trainer = SaITrainer(
            tiny_llama(), arguments(folder), train_dataset=token_blocks(), callbacks=[First()], sai_config=config
        )
        expected = None
        if batches:
            data = [batch for batch, _ in zip(trainer.get_train_dataloader(), range(batches), strict=False)]
            expected = {row.name: row.gsnr for row in measure_gsnr(trainer.model, data)}
        trainer.train()
        return trainer, expected

    trainer, expected = run(tmp_path / "given", SaIConfig(gsnr_premeasure_batches=3), batches=3)
    report = GSNRReport.load(tmp_path / "given")
    assert {row.status for row in report.tensors} == {"given"}
    assert {row.name: row.gsnr for row in report.tensors} == pytest.approx(expected, rel=1e-4)  # eps
    assert all(torch.equal(seen[0][name], value) for name, value in trainable(tiny_llama()).items())
    plain, _ = run(tmp_path / "plain", None)
    losses = [[entry["loss"] for entry in each.state.log_history if "loss" in entry] for each in (trainer, plain)]
    assert losses[0][0] == pytest.approx(losses[1][0], rel=0.05)  # the same batches, other scales
    assert report.tensors[0].gsnr != GSNRReport.load(tmp_path / "plain").tensors[0].gsnr


def test_what_no_batch_can_measure_is_measured_in_training(tmp_path):
    trainer = SaITrainer(
        tiny_lora(),
        arguments(tmp_path),
        train_dataset=token_blocks(),
        sai_config=SaIConfig(gsnr_premeasure_batches=2),
    )
    trainer.train()
    rows = {row.name: row for row in GSNRReport.load(tmp_path).tensors}
    assert {row.status for name, row in rows.items() if "lora_B" in name} == {"given"}
    assert {(row.status, row.step) for name, row in rows.items() if "lora_A" in name} == {("measured", 2)}


def test_measuring_before_is_refused_where_it_would_be_wrong(tmp_path):
    args = arguments(tmp_path, optim="swan", learning_rate=1e-3)
    trainer = SaITrainer(
        tiny_llama(), args, train_dataset=token_blocks(), sai_config=SaIConfig(gsnr_premeasure_batches=1)
    )
    with pytest.raises(OptionError, match="needs an optimizer that measures g-SNR, but SWAN runs; set it to 0"):
        trainer.train()
    optimizer = hf_sai.create_optimizer("sgd_sai", tiny_llama())
    from types import SimpleNamespace

    from hf_sai.premeasure import premeasure

    with pytest.raises(OptionError, match="works in one process, but there are 2"):
        premeasure(optimizer, SimpleNamespace(args=SimpleNamespace(world_size=2)), [], 1)
    param = torch.nn.Parameter(torch.ones(2, 2))
    param.grad = torch.randn(2, 2)
    stepped = hf_sai.SGDSaI([param])
    stepped.step()
    with pytest.raises(RuntimeError, match="before the first step only, but one was made"):
        stepped.take_scales([])


def test_no_report_where_none_is_wanted(tmp_path):
    trainer = SaITrainer(
        tiny_lora(), arguments(tmp_path), train_dataset=token_blocks(), sai_config=SaIConfig(sai_report=False)
    )
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()
    assert not list(tmp_path.rglob("gsnr_*"))
    assert "hf-sai:begin" not in (tmp_path / "README.md").read_text()
    assert trainer.gsnr_callback.report is not None


def test_settings_are_read_from_a_command_line():
    line = ["--output_dir", "out", "--gsnr_track_steps", "50", "--sai_report", "false"]
    _, config = HfArgumentParser((TrainingArguments, SaIConfig)).parse_args_into_dataclasses(line)
    assert config == SaIConfig(sai_report=False, gsnr_track_steps=50)
    with pytest.raises(ValueError, match="gsnr_track_steps must be >= 0 but is -1; 0 turns it off"):
        SaIConfig(gsnr_track_steps=-1)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (5, r"\] of a g-SNR report must be a step and g-SNR by name but is 5"),
        ({}, r"\] of a g-SNR report must be a step and g-SNR by name but is \{\}"),
        ({"step": 1}, r"\] of a g-SNR report must be a step and g-SNR by name"),
        ({"step": "1", "gsnr": {}}, r"\]\.step of a g-SNR report must be a whole number from 0 but is '1'"),
        ({"step": 1, "gsnr": {"a": None}}, r"\]\.gsnr\['a'\] of a g-SNR report must be a number from 0"),
    ],
)
def test_a_damaged_history_is_named(tmp_path, entry, message):
    trainer = SaITrainer(tiny_lora(), arguments(tmp_path, max_steps=1), train_dataset=token_blocks())
    trainer.add_callback(GSNRCallback())
    trainer.train()
    content = json.loads((tmp_path / "gsnr_report.json").read_text())
    content["history"] = [entry]
    with pytest.raises(ReportError, match=r"history\[0" + message):
        GSNRReport.from_json(json.dumps(content))
