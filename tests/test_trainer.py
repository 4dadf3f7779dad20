"""SaITrainer on real transformers, PEFT and TRL: first step, resume, files, card, checks."""

from __future__ import annotations

import json
import logging
import math
import subprocess
import sys

import pytest
import torch
from huggingface_hub import ModelCard
from support.hub import TOKEN
from support.models import tiny_llama, tiny_lora, token_blocks, word_tokenizer
from support.pictures import drawn_reports
from support.trainers import StopAt, arguments, files_below, trainable
from transformers import Seq2SeqTrainer, Trainer, TrainerCallback
from transformers.trainer_callback import TrainerControl, TrainerState

import hf_sai
from hf_sai import GSNRCallback, GSNRReport, SaITrainer, SaITrainerMixin, SGDSaI, make_trainer


def test_lora_both_factors_move_and_are_measured_when_they_can_be(tmp_path):
    model = tiny_lora()
    before = trainable(model)
    trainer = SaITrainer(model, arguments(tmp_path), train_dataset=token_blocks())
    trainer.train()
    after = trainable(model)
    assert [name for name in before if torch.equal(before[name], after[name])] == []
    report = GSNRReport.load(tmp_path)
    assert {row.name for row in report.tensors} == set(before)
    assert {row.step for row in report.tensors if "lora_A" in row.name} == {2}
    assert {row.step for row in report.tensors if "lora_B" in row.name} == {1}


class Gradients(TrainerCallback):
    """Keeps the gradients that the optimizer saw in its first step."""

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        if state.global_step == 0:
            self.seen = {name: p.grad.clone() for name, p in model.named_parameters()}


def test_report_says_what_was_measured(tmp_path):
    gradients = Gradients()
    args = arguments(tmp_path, optim_args="momentum=0.8,normalize=max", gradient_accumulation_steps=2, max_steps=1)
    trainer = SaITrainer(tiny_llama(), args, train_dataset=token_blocks(), callbacks=[gradients])
    trainer.train()
    report = GSNRReport.load(tmp_path)
    assert report.options["momentum"] == 0.8
    assert report.run["effective_batch_size"] == 8
    largest = max(row.gsnr for row in report.tensors)
    for row in report.tensors:
        g = gradients.seen[row.name].double()
        least = math.sqrt(g.numel() - 1)
        assert row.gsnr == pytest.approx(max((g.norm() / (g.std() + 1e-8)).item(), least), rel=1e-9)
        assert row.scale == pytest.approx(row.gsnr / largest, rel=1e-12)
        assert row.learning_rate == pytest.approx(0.05 * row.scale, rel=1e-12)
        assert row.shape == tuple(g.shape)


def test_scalars_are_logged_through_the_trainer(tmp_path):
    trainer = SaITrainer(tiny_lora(), arguments(tmp_path), train_dataset=token_blocks())
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "gsnr/measured" in entry]
    assert [(entry["step"], entry["gsnr/measured"], entry["gsnr/pending"]) for entry in logged] == [
        (1, 14.0, 14.0),
        (2, 28.0, 0.0),
    ]


@pytest.mark.parametrize(("build", "optim_args"), [(tiny_lora, "normalize=none"), (tiny_llama, "normalize=max")])
def test_resumed_run_equals_an_uninterrupted_one(tmp_path, build, optim_args):
    def run(folder, seed=0):
        args = arguments(folder, save_strategy="steps", save_steps=3, optim_args=optim_args)
        return SaITrainer(build(seed), args, train_dataset=token_blocks())

    whole = run(tmp_path / "whole")
    whole.train()
    first = run(tmp_path / "resumed")
    first.add_callback(StopAt(3))
    first.train()
    resumed = run(tmp_path / "resumed", seed=5)  # its trained weights must come from the checkpoint
    if build is tiny_lora:  # an adapter's checkpoint does not hold the base model
        resumed.model.load_state_dict(run(tmp_path / "base").model.state_dict())
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 6
    expected = trainable(whole.model)
    assert all(torch.equal(value, expected[name]) for name, value in trainable(resumed.model).items())
    reports = [GSNRReport.load(tmp_path / name) for name in ("whole", "resumed")]
    assert reports[0].tensors == reports[1].tensors


def test_report_is_in_every_checkpoint_and_in_the_output(tmp_path):
    args = arguments(tmp_path, save_strategy="steps", save_steps=2)
    trainer = SaITrainer(tiny_lora(), args, train_dataset=token_blocks())
    trainer.train()
    trainer.save_model()
    folders = [tmp_path, *(tmp_path / f"checkpoint-{step}" for step in (2, 4, 6))]
    for folder in folders:
        assert GSNRReport.load(folder).tensors == trainer.gsnr_callback.report.tensors
        assert (folder / "gsnr_report.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert not [path for path in files_below(tmp_path) if path.name.startswith("_")]


def test_no_file_holds_the_token_and_the_report_holds_no_path(tmp_path):
    args = arguments(tmp_path, save_strategy="steps", save_steps=2, hub_token=TOKEN)
    trainer = SaITrainer(tiny_lora(), args, train_dataset=token_blocks())
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()
    assert args.hub_token == TOKEN  # the run itself keeps it
    files = files_below(tmp_path)
    assert len([path for path in files if path.name == "training_args.bin"]) == 4
    assert [path for path in files if TOKEN.encode() in path.read_bytes()] == []
    for report in [path for path in files if path.name == "gsnr_report.json"]:
        text = report.read_text()
        assert str(tmp_path) not in text
        assert "/" not in text


@pytest.mark.slow
def test_training_args_load_in_a_process_without_hf_sai(tmp_path):
    trainer = SaITrainer(tiny_llama(), arguments(tmp_path, hub_token=TOKEN, max_steps=1), train_dataset=token_blocks())
    trainer.train()
    trainer.save_model()
    code = (
        "import sys, torch; args = torch.load(sys.argv[1], weights_only=False);"
        "assert 'hf_sai' not in sys.modules and 'trainer_patches' not in sys.modules;"
        "print(args.optim, type(args.optim).__name__, args.hub_token, args.learning_rate, args.max_steps)"
    )
    # In another folder, so that the packages of this checkout are only found where they are installed.
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "training_args.bin")],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=True,
    )
    assert done.stdout.split() == ["sgd_sai", "str", "None", "0.05", "1"]


def test_lora_scale_does_not_depend_on_the_warm_up(tmp_path):
    """A's first gradient, after B's first step of a long warm-up, is far below eps."""
    args = arguments(tmp_path, warmup_steps=1000, learning_rate=1e-3, max_steps=3)
    trainer = SaITrainer(tiny_lora(), args, train_dataset=token_blocks())
    trainer.train()
    factors_a = [row for row in GSNRReport.load(tmp_path).tensors if "lora_A" in row.name]
    assert {row.step for row in factors_a} == {3}  # the first step of a warm-up has learning rate 0
    assert all(row.gsnr >= math.sqrt(row.numel - 1) for row in factors_a)


def test_training_goes_on_where_the_report_cannot_be_written(tmp_path, monkeypatch, caplog):
    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hf_sai.report.report.write_whole", full_disk)
    args = arguments(tmp_path, save_strategy="steps", save_steps=3)
    trainer = SaITrainer(tiny_llama(), args, train_dataset=token_blocks())
    with caplog.at_level(logging.WARNING, logger="hf_sai"):
        trainer.train()
    assert trainer.state.global_step == 6
    assert "could not be written; training goes on" in caplog.text


def test_infinite_clipping_and_odd_module_names_are_reported(tmp_path):
    class Odd(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = torch.nn.ModuleDict({"a$b_$^": torch.nn.Linear(3, 2)})

        def forward(self, x, labels):
            return {"loss": (self.parts["a$b_$^"](x) - labels).square().mean()}

    rows = [{"x": torch.randn(3), "labels": torch.randn(2)} for _ in range(16)]
    args = arguments(tmp_path, max_grad_norm=math.inf, max_steps=2, weight_decay=0.1)
    SaITrainer(Odd(), args, train_dataset=rows).train()
    report = GSNRReport.load(tmp_path)
    assert report.run["max_grad_norm"] is None
    assert (tmp_path / "gsnr_report.png").is_file()


def test_resumed_report_keeps_the_batch_that_was_measured(tmp_path):
    def run(batch, **resume):
        args = arguments(tmp_path, save_strategy="steps", save_steps=3, per_device_train_batch_size=batch)
        trainer = SaITrainer(tiny_llama(), args, train_dataset=token_blocks())
        trainer.train(**resume)
        return GSNRReport.load(tmp_path).run

    first = run(4)
    (tmp_path / "checkpoint-6").rename(tmp_path / "later")
    second = run(2, resume_from_checkpoint=True)
    assert first == second
    assert (second["effective_batch_size"], second["trainer_step"]) == (4, 1)


def test_a_report_of_an_earlier_run_is_put_aside(tmp_path):
    SaITrainer(tiny_llama(), arguments(tmp_path, max_steps=1), train_dataset=token_blocks()).train()
    other = SaITrainer(
        tiny_llama(), arguments(tmp_path, optim="adamw_torch", max_steps=1), train_dataset=token_blocks()
    )
    other.train()
    names = {path.name for path in tmp_path.iterdir() if "gsnr" in path.name}
    assert names == {"_gsnr_report.json", "_gsnr_report.png"}  # a push leaves out what begins with "_"


def test_the_final_picture_shows_what_was_measured_last(tmp_path, monkeypatch):
    drawn = drawn_reports(monkeypatch)
    trainer = SaITrainer(tiny_lora(), arguments(tmp_path), train_dataset=token_blocks())
    trainer.train()
    assert [len(report.by_status("pending")) for report in drawn] == [14, 0]
    trainer.train()  # the same trainer once more
    assert drawn[-1] == trainer.gsnr_callback.report


def test_card_keeps_what_the_host_wrote_and_gets_our_section_once(tmp_path):
    trainer = SaITrainer(tiny_lora(), arguments(tmp_path), train_dataset=token_blocks())
    trainer.train()
    trainer.save_model()
    trainer.create_model_card(tags=["my-tag"], dataset_tags="some/data", dataset="some data", tasks="text-generation")
    for _ in range(2):
        trainer.create_model_card(tags=["my-tag"])
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "peft"
    assert {"hf-sai", "sgd-sai", "arxiv:2412.11768"} <= set(card.data.tags)
    assert card.data.base_model is None
    assert "### Training hyperparameters" in card.text
    assert card.text.count("<!-- hf-sai:begin -->") == card.text.count("<!-- hf-sai:end -->") == 1
    assert "| normalize | none |" in card.text
    assert "`self_attn.q_proj.lora_A` | 2 | 2x16 |" in card.text


@pytest.mark.parametrize(
    ("optim_args", "message"),
    [
        (
            "momentun=0.9",
            r"momentun is not an option of sgd_sai; did you mean momentum\? valid options: eps, foreach",
        ),
        ("momentum=abc", r"momentum of sgd_sai must be a number but is 'abc'; write for example momentum=0.9"),
        ("momentum", r"optim_args must be name=value entries with commas between, but 'momentum'"),
        ("normalize=mean", r"normalize of sgd_sai must be none, max or rms but is 'mean'"),
        ("lr=0.1", r"lr is not set through the options of sgd_sai; set learning_rate itself"),
        ("maximize=maybe", r"maximize of sgd_sai must be true or false but is 'maybe'"),
    ],
)
def test_bad_options_are_refused_when_the_trainer_is_built(tmp_path, optim_args, message):
    with pytest.raises(ValueError, match=message):
        SaITrainer(tiny_llama(), arguments(tmp_path, optim_args=optim_args), train_dataset=token_blocks())


def test_bad_ranges_are_refused_before_the_first_step(tmp_path):
    for changed, message in (
        ({"learning_rate": -1.0}, "lr must be"),
        ({"optim_args": "momentum=1.5"}, "momentum must"),
    ):
        trainer = SaITrainer(tiny_llama(), arguments(tmp_path, **changed), train_dataset=token_blocks())
        with pytest.raises(ValueError, match=message):
            trainer.train()


def test_another_optimizer_in_place_of_ours_is_an_error(tmp_path):
    model = tiny_llama()
    trainer = SaITrainer(
        model,
        arguments(tmp_path),
        train_dataset=token_blocks(),
        optimizers=(torch.optim.AdamW(model.parameters()), None),
    )
    with pytest.raises(ValueError, match=r"optim='sgd_sai' asks for SGDSaI, but the optimizer that runs is AdamW"):
        trainer.train()


def test_a_plain_trainer_with_the_callback_checks_and_reports(tmp_path):
    trainer = Trainer(
        tiny_lora(), arguments(tmp_path, save_strategy="steps", save_steps=3), train_dataset=token_blocks()
    )
    trainer.add_callback(GSNRCallback(trainer))
    trainer.train()
    assert GSNRReport.load(tmp_path / "checkpoint-3").tensors == GSNRReport.load(tmp_path).tensors
    assert any("gsnr/scale_max" in entry for entry in trainer.state.log_history)


def test_callback_without_a_trainer_logs_to_the_history(tmp_path):
    trainer = Trainer(tiny_llama(), arguments(tmp_path), train_dataset=token_blocks(), callbacks=[GSNRCallback()])
    trainer.train()
    assert [entry["step"] for entry in trainer.state.log_history if "gsnr/measured" in entry] == [1]


def test_a_callback_of_two_trainings_reports_the_second(tmp_path):
    callback = GSNRCallback()
    for seed in (0, 1):
        data = token_blocks(seed=seed)
        trainer = Trainer(tiny_llama(seed), arguments(tmp_path), train_dataset=data, callbacks=[callback])
        trainer.train()
    expected = [row.gsnr for row in trainer.optimizer.optimizer.gsnr_statistics()]
    assert [row.gsnr for row in callback.report.tensors] == expected
    assert [row.gsnr for row in GSNRReport.load(tmp_path).tensors] == expected


def test_callback_finds_a_replaced_optimizer(monkeypatch):
    """By itself, where the host is one whose trainings can't be watched."""
    monkeypatch.setattr("hf_sai.callback.trainings_are_watched", lambda: False)
    args = arguments("unused")
    with pytest.raises(ValueError, match="asks for SGDSaI, but the optimizer that runs is SGD"):
        GSNRCallback().on_train_begin(
            args, TrainerState(), TrainerControl(), optimizer=torch.optim.SGD(tiny_llama().parameters())
        )


def test_untouched_adam_learning_rate_is_warned_about(tmp_path, caplog):
    for learning_rate, warnings in ((5e-5, 1), (0.01, 0)):
        caplog.clear()
        args = arguments(tmp_path, learning_rate=learning_rate, max_steps=1)
        with caplog.at_level(logging.WARNING, logger="hf_sai"):
            SaITrainer(tiny_llama(), args, train_dataset=token_blocks()).train()
        assert len([r for r in caplog.records if "made for Adam" in r.getMessage()]) == warnings


def test_other_optimizers_run_as_before_without_report_or_section(tmp_path):
    trainer = SaITrainer(
        tiny_llama(), arguments(tmp_path, optim="adamw_torch", hub_token=TOKEN), train_dataset=token_blocks()
    )
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()
    names = {path.name for path in files_below(tmp_path)}
    assert "gsnr_report.json" not in names
    assert "hf-sai" not in (tmp_path / "README.md").read_text()
    assert TOKEN.encode() not in (tmp_path / "training_args.bin").read_bytes()


def test_weight_decay_spares_biases_and_norms(tmp_path):
    trainer = SaITrainer(
        tiny_llama(), arguments(tmp_path, weight_decay=0.1, max_steps=1), train_dataset=token_blocks()
    )
    trainer.train()
    groups = trainer.optimizer.param_groups
    decays = {name: group["weight_decay"] for group in groups for name in group["param_names"]}
    assert {name for name, decay in decays.items() if decay == 0.0} == {n for n in decays if "norm" in n}
    assert set(decays.values()) == {0.0, 0.1}


def test_a_trainer_that_chooses_what_decays_is_heard(tmp_path):
    class OnlyTheHead(SaITrainer):
        def get_decay_parameter_names(self, model):
            return ["lm_head.weight"]

    args = arguments(tmp_path, weight_decay=0.1, max_steps=1)
    trainer = OnlyTheHead(tiny_llama(), args, train_dataset=token_blocks())
    trainer.train()
    decayed = [name for g in trainer.optimizer.param_groups if g["weight_decay"] for name in g["param_names"]]
    assert decayed == ["lm_head.weight"]


def test_route_without_patches(tmp_path):
    hf_sai.unregister()
    try:
        pair = hf_sai.optimizer_cls_and_kwargs("sgd_sai", lr=0.05, momentum="0.8")
        trainer = SaITrainer(
            tiny_lora(),
            arguments(tmp_path, optim="adamw_torch"),
            train_dataset=token_blocks(),
            optimizer_cls_and_kwargs=pair,
        )
        trainer.train()
    finally:
        hf_sai.register()
    assert isinstance(trainer.optimizer.optimizer, SGDSaI)
    report = GSNRReport.load(tmp_path)
    assert report.options["momentum"] == 0.8
    assert {row.name for row in report.tensors} == set(trainable(trainer.model))
    assert not report.by_status("pending")


def test_make_trainer_and_the_mixin():
    made = make_trainer(Seq2SeqTrainer)
    assert made.__bases__ == (SaITrainerMixin, Seq2SeqTrainer)
    assert made.__name__ == "SaISeq2SeqTrainer"
    assert make_trainer(SaITrainer) is SaITrainer
    with pytest.raises(TypeError, match=r"needs a subclass of transformers\.Trainer but got <class 'int'>"):
        make_trainer(int)


def test_sft_trainer_with_adapter(tmp_path):
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    rows = Dataset.from_dict({"input_ids": [row["input_ids"].tolist() for row in token_blocks()]})
    args = arguments(tmp_path, cls=SFTConfig, bf16=False, learning_rate=1.0)
    trainer = make_trainer(SFTTrainer)(
        tiny_llama(),
        args=args,
        train_dataset=rows,
        processing_class=word_tokenizer(),
        peft_config=LoraConfig(r=2, target_modules="all-linear"),
    )
    before = trainable(trainer.model)
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()
    assert not [name for name, value in trainable(trainer.model).items() if torch.equal(value, before[name])]
    report = json.loads((tmp_path / "gsnr_report.json").read_text())
    assert {row["step"] for row in report["tensors"]} == {1, 2}
    text = (tmp_path / "README.md").read_text()
    assert "trained using [TRL]" in text
    assert text.count("<!-- hf-sai:begin -->") == 1


def test_metrics_of_trl_are_those_of_a_run_without_us(tmp_path):
    """Its `log` averages and clears them: the report's scalars must not come in between."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    rows = Dataset.from_dict({"input_ids": [row["input_ids"].tolist() for row in token_blocks()]})
    logged = []
    for cls in (SFTTrainer, make_trainer(SFTTrainer)):
        args = arguments(tmp_path, cls=SFTConfig, bf16=False, logging_steps=4, max_steps=4)
        trainer = cls(tiny_lora(), args=args, train_dataset=rows, processing_class=word_tokenizer())
        trainer.train()
        logged.append([e["mean_token_accuracy"] for e in trainer.state.log_history if "mean_token_accuracy" in e])
    assert logged[0] == logged[1]
    assert len(logged[0]) == 1
