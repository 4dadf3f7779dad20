"""examples/hosts/accelerate_loop.py: accelerate's loop with our optimizers, against a plain one and resumed."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.utils import clip_grad_norm_
from transformers import BertConfig, BertForSequenceClassification, get_linear_schedule_with_warmup

import hf_sai
from hf_sai import GSNRReport


EXAMPLES = Path(__file__).parent.parent / "examples" / "hosts"
pytestmark = pytest.mark.usefixtures("no_picture")


@pytest.fixture
def loop(monkeypatch):
    from accelerate.state import AcceleratorState, GradientState

    monkeypatch.syspath_prepend(str(EXAMPLES))
    import accelerate_loop

    yield accelerate_loop
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def run(loop, folder, *options):
    return loop.main(loop.parser().parse_args(["--cpu", "--output_dir", str(folder), *options]))


def plain(loop, folder, optim, every):
    """Without accelerate, on the data in the order that the other loop saw."""
    from accelerate.utils import set_seed

    set_seed(0)
    loop.dataloader()
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = BertForSequenceClassification(BertConfig(vocab_size=32, max_position_embeddings=16, **sizes))
    optimizer = hf_sai.create_optimizer(optim, model, lr=loop.RATES[optim], weight_decay=0.01)
    scheduler = get_linear_schedule_with_warmup(optimizer, 4, 16 // every)
    return model.train(), optimizer, scheduler


@pytest.mark.parametrize("optim", ["sgd_sai", "swan"])
@pytest.mark.parametrize("every", [1, 2])
def test_each_step_is_that_of_a_plain_loop(tmp_path, loop, monkeypatch, optim, every):
    from accelerate import Accelerator

    seen = []
    monkeypatch.setattr(Accelerator, "backward", lambda self, loss: (loss / every).backward())
    forward = BertForSequenceClassification.forward
    with monkeypatch.context() as patch:
        patch.setattr(
            BertForSequenceClassification,
            "forward",
            lambda self, **batch: (
                seen.append(({k: v.clone() for k, v in batch.items()}, torch.get_rng_state())),
                forward(self, **batch),
            )[1],
        )
        losses = run(
            loop, tmp_path, "--optim", optim, "--num_epochs", "1", "--gradient_accumulation_steps", str(every)
        )
    model, optimizer, scheduler = plain(loop, tmp_path, optim, every)
    for index, ((batch, rng), loss) in enumerate(zip(seen, losses, strict=True)):
        torch.set_rng_state(rng)  # of dropout
        found = model(**batch).loss
        assert found.item() == loss
        (found / every).backward()
        if (index + 1) % every == 0:
            clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    saved = load_file(tmp_path / "epoch_0" / "model.safetensors")
    for name, value in model.state_dict().items():
        assert torch.equal(value, saved[name])


@pytest.mark.parametrize("optim", ["sgd_sai", "swan"])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_resumed_run_ends_the_same_and_has_a_report(tmp_path, loop, optim, precision):
    options = ("--optim", optim, "--mixed_precision", precision, "--num_epochs", "2")
    losses = run(loop, tmp_path / "whole", *options)
    again = run(loop, tmp_path / "again", *options, "--resume_from_checkpoint", str(tmp_path / "whole" / "epoch_0"))
    assert losses[len(losses) // 2 :] == again
    assert all(map(math.isfinite, losses))
    assert sum(losses[-8:]) < sum(losses[:8])
    ends = [load_file(tmp_path / run / "epoch_1" / "model.safetensors") for run in ("whole", "again")]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    report = GSNRReport.load(tmp_path / "whole")
    assert {row.layer for row in report.rows} == {None, 0, 1}
    assert json.loads((tmp_path / "whole" / "gsnr_report.json").read_text())["optimizer"] == optim
    if optim == "swan":
        reasons = {row.name: row.reason for row in report.routes if row.route == "adam" and len(row.shape) == 2}
        assert reasons["classifier.weight"] == "output head"
        assert reasons["bert.embeddings.word_embeddings.weight"] == "embedding"
