"""The mixin on trainers of transformers and TRL: trained as by the host alone, with report, checkpoint and card."""

from __future__ import annotations

import math
import shutil

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from support.models import VOCABULARY, tiny_llama, token_blocks, word_tokenizer
from support.trainers import arguments, trainable
from transformers import (
    LlamaForSequenceClassification,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    TrainerCallback,
)
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from hf_sai import GSNRCallback, GSNRReport, SaITrainerMixin, make_trainer
from hf_sai.live import unwrap_optimizer


# TRL 1.16's DPOTrainer calls these on transformers 5.23.
deprecated = pytest.mark.filterwarnings("ignore:`gradient_checkpointing_(en|dis)able` is deprecated:FutureWarning")
pytestmark = [deprecated, pytest.mark.usefixtures("no_picture")]

LEARNING_RATE = {"sgd_sai": 0.02, "swan": 2e-3}


class Written(SaITrainerMixin, Seq2SeqTrainer):
    """A class that is written out."""


def words(*numbers):
    return " ".join(f"w{number % (VOCABULARY - 1)}" for number in numbers)


def seq2seq():
    """An encoder with a decoder, and pairs."""
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "vocab_size": VOCABULARY}
    model = T5ForConditionalGeneration(T5Config(**sizes, dropout_rate=0.0, decoder_start_token_id=0))
    return {"model": model, "train_dataset": token_blocks()}


def preferences(columns):
    rows = [{name: words(*(row * k for k in range(*each))) for name, each in columns.items()} for row in range(24)]
    return {"train_dataset": Dataset.from_list(rows), "processing_class": word_tokenizer()}


def dpo():
    columns = {"prompt": (1, 4), "chosen": (4, 9), "rejected": (9, 14)}
    return {"model": tiny_llama(), "ref_model": tiny_llama(), **preferences(columns)}


def reward():
    torch.manual_seed(0)
    config = tiny_llama().config
    config.pad_token_id, config.num_labels = VOCABULARY - 1, 1
    return {"model": LlamaForSequenceClassification(config), **preferences({"chosen": (1, 9), "rejected": (9, 17)})}


def sft():
    adapter = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    return {"model": tiny_llama(), "peft_config": adapter, **preferences({"text": (1, 12)})}


CASES = {
    "seq2seq": (Seq2SeqTrainer, Seq2SeqTrainingArguments, seq2seq, {}),
    "dpo": (DPOTrainer, DPOConfig, dpo, {"bf16": False}),
    "reward": (RewardTrainer, RewardConfig, reward, {"bf16": False}),
    "sft with an adapter": (SFTTrainer, SFTConfig, sft, {"bf16": False}),
}


class Gradients(TrainerCallback):
    """Norms and deviations of the gradients that the optimizer saw, by step and name."""

    def __init__(self):
        self.seen = {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        named = {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}
        self.seen[state.global_step + 1] = {name: (g.norm().item(), g.std().item()) for name, g in named.items()}


def run(folder, case, cls, optim):
    _, args_cls, build, changed = CASES[case]
    settings = {"optim": optim, "learning_rate": LEARNING_RATE[optim], "max_steps": 3, "lr_scheduler_type": "constant"}
    settings |= {"logging_steps": 1, "save_strategy": "steps", "save_steps": 3, **changed}
    gradients = Gradients()
    options = build()
    trainer = cls(args=arguments(folder, cls=args_cls, **settings), callbacks=[gradients], **options)
    before = trainable(trainer.model)
    trainer.train()
    return trainer, gradients.seen, before


@pytest.mark.parametrize("optim", LEARNING_RATE)
@pytest.mark.parametrize("case", CASES)
def test_the_mixin_trains_as_the_host_alone_and_reports(tmp_path, case, optim, monkeypatch):
    host = CASES[case][0]
    with monkeypatch.context() as patch:
        patch.setenv("HF_SAI_REPORT", "0")
        plain, _, _ = run(tmp_path / "plain", case, host, optim)
    assert type(plain) is host
    cls = Written if case == "seq2seq" and optim == "swan" else make_trainer(host)
    trainer, gradients, before = run(tmp_path / "ours", case, cls, optim)

    weights, expected = trainable(trainer.model), trainable(plain.model)
    assert weights.keys() == expected.keys() == before.keys()
    assert [name for name, value in expected.items() if not torch.equal(weights[name], value)] == []
    assert any(not torch.equal(before[name], value) for name, value in weights.items())
    kept = ("step", "loss", "grad_norm", "learning_rate", "rewards/margins", "margin", "mean_token_accuracy")
    logs = [
        [{k: v for k, v in entry.items() if k in kept} for entry in each.state.log_history if "loss" in entry]
        for each in (plain, trainer)
    ]
    assert logs[0] == logs[1]
    assert len(logs[0]) == 3

    report = GSNRReport.load(tmp_path / "ours")
    assert report == GSNRReport.load(tmp_path / "ours" / "checkpoint-3") == trainer.gsnr_callback.report
    assert {row.name for row in report.tensors or report.routes} == set(before)
    live = unwrap_optimizer(plain.optimizer)  # the host's own, which no callback has touched
    if optim == "swan":
        assert {row.name: row.route for row in report.routes} == {row.name: row.route for row in live.routes()}
    else:
        check_measured(report, gradients, {row.name: row.gsnr for row in live.gsnr_statistics()})

    trainer.create_model_card()
    text = (tmp_path / "ours" / "README.md").read_text()
    assert text.count("<!-- hf-sai:begin -->") == text.count("<!-- hf-sai:end -->") == 1
    assert ("trained using [TRL]" in text) == (case != "seq2seq")
    assert not list((tmp_path / "plain").rglob("gsnr_report.*"))
    assert "<!-- hf-sai:begin -->" not in str([p.read_text() for p in (tmp_path / "plain").rglob("README.md")])


@pytest.mark.parametrize("optim", LEARNING_RATE)
@pytest.mark.parametrize("case", CASES)
def test_a_trainer_of_the_hosts_is_looked_after(tmp_path, case, optim):
    """Without a line of ours in the script: report, checkpoint and card are those of the mixin."""
    host = CASES[case][0]
    expected, _, _ = run(tmp_path / "run", case, make_trainer(host), optim)
    expected.create_model_card()
    shutil.move(tmp_path / "run", tmp_path / "expected")
    found, _, _ = run(tmp_path / "run", case, host, optim)
    found.create_model_card()

    assert isinstance(found, host)
    assert type(found).__name__ == host.__name__
    assert sum(isinstance(each, GSNRCallback) for each in found.callback_handler.callbacks) == 1
    for folder in ("", "checkpoint-3"):
        names = {path.name for path in (tmp_path / "expected" / folder).iterdir()}
        assert {path.name for path in (tmp_path / "run" / folder).iterdir()} == names
        assert GSNRReport.load(tmp_path / "run" / folder) == GSNRReport.load(tmp_path / "expected" / folder)
        assert lines_of_card(tmp_path / "run" / folder, host) == lines_of_card(tmp_path / "expected" / folder, host)
    logs = [[entry for entry in each.state.log_history if "loss" not in entry] for each in (found, expected)]
    assert [set(entry) for entry in logs[0]] == [set(entry) for entry in logs[1]]


def lines_of_card(folder, host):
    """But for the stamp, which holds the date, and TRL's name of the class."""
    if not (folder / "README.md").is_file():
        return []
    text = (folder / "README.md").read_text().replace(f"SaI{host.__name__}", host.__name__)
    return [
        line for line in text.splitlines() if "hf-sai:generated" not in line and "training loss" not in line.lower()
    ]


def check_measured(report, gradients, by_host):
    """g-SNR by definition, from the gradients that the host showed in the step that is named."""
    measured = [row for row in report.tensors if row.status == "measured"]
    assert len(measured) > len(report.tensors) // 2
    for row in measured:
        assert row.gsnr == by_host[row.name]
        if row.numel > 1:
            norm, deviation = gradients[row.step][row.name]
            assert row.gsnr == pytest.approx(max(norm / (deviation + 1e-8), math.sqrt(row.numel - 1)), rel=1e-5)
