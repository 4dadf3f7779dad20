"""Lightning's Trainer: each step is the one that a plain loop makes, with its clipping, precision and accumulation."""

from __future__ import annotations

import copy
import itertools
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from transformers import BertConfig, BertModel

import hf_sai
from hf_sai import GSNRReport


pytest.importorskip("lightning")

EXAMPLES = Path(__file__).parent.parent / "examples" / "hosts"
STEPS = 3
pytestmark = [
    pytest.mark.usefixtures("no_picture"),
    pytest.mark.filterwarnings("ignore"),  # Lightning's advice on workers and loggers
]


@pytest.fixture(scope="module")
def example():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        import lightning_module

        yield lightning_module


def made(example, optim, **options):
    torch.manual_seed(0)
    return example.Copier(optim, lr=example.RATES[optim.removesuffix("_layerwise")], **options)


SETTINGS = {
    "plain": {},
    "norm": {"gradient_clip_val": 0.05},
    "value": {"gradient_clip_val": 1e-3, "gradient_clip_algorithm": "value"},
    "accumulated": {"accumulate_grad_batches": 2},
    "bf16-true": {"precision": "bf16-true"},
    "bf16-mixed": {"precision": "bf16-mixed", "gradient_clip_val": 0.5},
}


def by_hand(example, module, settings):
    """The same without Lightning."""
    module = module.to(torch.bfloat16) if settings.get("precision") == "bf16-true" else module
    chosen = module.configure_optimizers()
    optimizer, scheduler = chosen["optimizer"], chosen["lr_scheduler"]["scheduler"]
    every = settings.get("accumulate_grad_batches", 1)
    mixed = torch.autocast("cpu", torch.bfloat16, enabled=settings.get("precision") == "bf16-mixed")
    for index, (words,) in zip(range(STEPS * every), example.batches(), strict=False):
        with mixed:
            logits = module.head(module.encoder(module.embedding(words)))
            loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), words.flatten())
        (loss / every).backward()
        if (index + 1) % every == 0:
            bound = settings.get("gradient_clip_val")
            if bound:
                by_value = settings.get("gradient_clip_algorithm") == "value"
                in_groups = [param for group in optimizer.param_groups for param in group["params"]]  # as Lightning
                (clip_grad_value_ if by_value else clip_grad_norm_)(in_groups, bound)
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("optim", ["sgd_sai", "swan"])
def test_a_step_is_that_of_a_plain_loop(tmp_path, example, monkeypatch, optim, settings):
    monkeypatch.setattr(example.Copier, "log", lambda self, *args: None)
    chosen = SETTINGS[settings]
    theirs = made(example, optim)
    start = copy.deepcopy(theirs.state_dict())
    example.train(theirs, tmp_path, max_steps=STEPS, enable_checkpointing=False, **chosen)
    ours = made(example, optim)
    by_hand(example, ours, chosen)
    ends = theirs.state_dict(), ours.state_dict()
    assert [name for name in ends[0] if not torch.equal(ends[0][name], ends[1][name])] == []
    assert all(not torch.equal(value.to(start[name].dtype), start[name]) for name, value in ends[0].items())
    if settings in ("norm", "value"):
        plain = made(example, optim)
        by_hand(example, plain, {})
        assert not torch.equal(plain.head.weight, ours.head.weight)


@pytest.mark.parametrize("optim", ["sgd_sai", "swan"])
def test_a_checkpoint_resumes_to_the_bit(tmp_path, example, optim):
    from lightning.pytorch.callbacks import ModelCheckpoint

    keep = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=2, save_top_k=-1)
    whole = made(example, optim)
    two = {"count": 2, "max_steps": 4}  # batches to an epoch: in its middle Lightning starts the data anew
    example.train(whole, tmp_path, callbacks=[keep], **two)
    again = made(example, optim)
    torch.nn.init.zeros_(again.head.weight)
    example.train(again, tmp_path, tmp_path / "step=2.ckpt", **two, enable_checkpointing=False)
    ends = whole.state_dict(), again.state_dict()
    assert [name for name in ends[0] if not torch.equal(ends[0][name], ends[1][name])] == []
    report = GSNRReport.load(tmp_path)
    rows = {row.name: row for row in report.rows}
    assert {row.layer for row in rows.values()} == {None, 0, 1}
    assert rows["encoder.layers.1.self_attn.in_proj_weight"].layer == 1
    if optim == "swan":
        to_adam = [row.name for row in rows.values() if row.route == "adam" and len(row.shape) == 2]
        assert to_adam == ["embedding.weight", "head.weight"]


@pytest.mark.parametrize("optim", ["sgd_sai_layerwise", "swan_layerwise"])
@pytest.mark.parametrize("how", ["norm", "value"])
def test_layer_wise_refuses_clipping_and_trains_without(tmp_path, example, monkeypatch, optim, how):
    monkeypatch.setattr(
        example.Copier, "configure_optimizers", lambda self: hf_sai.create_optimizer(self.optim, self, **self.options)
    )
    with pytest.raises(RuntimeError, match=r"leave clipping out \(gradient_clip_val in Lightning"):
        example.train(made(example, optim), tmp_path, max_steps=1, enable_checkpointing=False, **SETTINGS[how])
    module = made(example, optim)
    example.train(module, tmp_path, max_steps=STEPS, enable_checkpointing=False)
    plain = made(example, optim.removesuffix("_layerwise"))
    example.train(plain, tmp_path, max_steps=STEPS, enable_checkpointing=False)
    torch.testing.assert_close(module.state_dict(), plain.state_dict(), rtol=1e-4, atol=1e-5)


def linear(*sizes):
    """As Lightning's own examples have them: layers and activations in a Sequential."""
    return nn.Sequential(*[part for each in itertools.pairwise(sizes) for part in (nn.Linear(*each), nn.ReLU())])


def bert():
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return BertModel(BertConfig(vocab_size=32, **sizes))


def transformer():
    block = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True)
    return nn.TransformerEncoder(block, 3, enable_nested_tensor=False)


# What a module holds; how many layers there are, and how many tensors outside of them. A layer is what repeats.
MODULES = {
    "autoencoder": (lambda: {"encoder": linear(8, 6, 3), "decoder": linear(3, 6, 8)}, 0, 8),
    "two networks": (lambda: {"generator": linear(4, 8, 16, 32), "discriminator": linear(32, 16, 8, 1)}, 0, 12),
    "a network in parts": (lambda: {"net": nn.Sequential(nn.Embedding(8, 16), transformer(), nn.Linear(16, 8))}, 3, 3),
    "four heads": (lambda: {"model": bert(), "heads": nn.ModuleList([nn.Linear(16, 2) for _ in range(4)])}, 2, 15),
    "student and teacher": (lambda: {"student": bert(), "teacher": bert()}, 2, 14),
}


@pytest.mark.parametrize("name", MODULES)
def test_layers_of_a_module(name):
    import lightning

    parts, layers, outside = MODULES[name]
    module = lightning.LightningModule()
    for attribute, part in parts().items():
        setattr(module, attribute, part)
    optimizer = hf_sai.create_optimizer("sgd_sai", module, lr=0.1)
    found = [row.layer for row in GSNRReport.from_optimizer(optimizer).rows]
    assert set(found) - {None} == set(range(layers))
    assert found.count(None) == outside


def test_the_example_itself(tmp_path, example, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["x", "--optim", "sgd_sai", "--output_dir", str(tmp_path)])
    runpy.run_path(str(EXAMPLES / "lightning_module.py"), run_name="__main__")
    found = re.search(r"sgd_sai: loss ([\d.]+) at the end, layers \[0, 1\]", capsys.readouterr().out)
    assert 0.0 < float(found[1]) < 3.4  # that of random weights is above log(32) = 3.47
