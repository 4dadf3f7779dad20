"""The layer in a report's row is what repeats in the model, whatever numbers come before it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from hf_sai.optim import SWAN, SGDSaI
from hf_sai.report import GSNRReport
from hf_sai.report.rows import lists_in, split_name


# ---- By the name alone ----


@pytest.mark.parametrize(
    ("name", "kind", "layer"),
    [
        # transformers
        ("model.layers.3.self_attn.q_proj.weight", "self_attn.q_proj", 3),
        ("model.layers.3.mlp.experts.7.w1.weight", "mlp.experts.7.w1", 3),
        ("transformer.h.11.attn.c_attn.weight", "attn.c_attn", 11),
        ("encoder.block.3.layer.0.SelfAttention.q.weight", "layer.0.SelfAttention.q", 3),
        ("bert.encoder.layer.3.attention.self.query.weight", "attention.self.query", 3),
        ("vit.encoder.layer.2.output.dense.bias", "output.dense.bias", 2),
        ("wav2vec2.feature_extractor.conv_layers.0.conv.weight", "conv", 0),
        ("swin.encoder.layers.1.blocks.0.attention.self.query.weight", "blocks.0.attention.self.query", 1),
        ("resnet.encoder.stages.1.layers.0.shortcut.convolution.weight", "layers.0.shortcut.convolution", 1),
        ("visual.transformer.resblocks.5.attn.out_proj.weight", "attn.out_proj", 5),
        ("classifier.0.weight", "0", None),
        # sentence-transformers, setfit
        ("model.0.model.encoder.layer.3.attention.self.query.weight", "attention.self.query", 3),
        ("0.auto_model.encoder.layer.3.attention.self.query.weight", "attention.self.query", 3),
        ("model_body.0.auto_model.encoder.layer.3.output.dense.weight", "output.dense", 3),
        ("0.auto_model.encoder.block.3.layer.1.DenseReluDense.wi.weight", "layer.1.DenseReluDense.wi", 3),
        # diffusers
        (
            "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.weight",
            "attentions.0.transformer_blocks.0.attn1.to_q",
            1,
        ),
        ("mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight", "transformer_blocks.0.attn1.to_q", 0),
        ("single_transformer_blocks.7.attn.to_out.0.lora_A.default.weight", "attn.to_out.0.lora_A", 7),
        # Lightning, timm
        ("net.1.layers.0.self_attn.in_proj_weight", "self_attn.in_proj_weight", 0),
        ("net.layer1.0.conv1.weight", "conv1", 0),
        ("net.blocks.4.mlp.fc1.weight", "mlp.fc1", 4),
        ("net.0.weight", "0", None),
    ],
)
def test_kind_and_layer(name, kind, layer):
    assert split_name(name) == (kind, layer)


# ---- By all names of a model ----


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.query, self.out = nn.Linear(4, 4), nn.Linear(4, 4)


def named(**parts):
    return nn.ModuleDict(parts)


MODELS = {
    # The first of several unlike modules has the blocks, as in sentence-transformers.
    "wrapped": (
        named(model=nn.ModuleList([named(trunk=nn.ModuleList([Block(), Block()])), named(linear=Block())])),
        2,
    ),
    # Lightning's net, a Sequential of unlike parts, by a word that elsewhere names layers.
    "a list of unlike parts": (
        named(layers=nn.ModuleList([nn.Embedding(4, 4), named(cells=nn.ModuleList([Block()] * 3))])),
        3,
    ),
    "nothing before": (nn.ModuleList([Block(), Block()]), 2),
    "experts": (named(layers=nn.ModuleList([named(experts=nn.ModuleList([Block(), Block()])) for _ in range(3)])), 3),
    "unlike layers": (
        named(
            layers=nn.ModuleList(
                [named(mamba=nn.Linear(4, 4)), named(attn=nn.Linear(4, 4)), named(mamba=nn.Linear(4, 4))]
            )
        ),
        3,
    ),
}


@pytest.mark.parametrize("model", MODELS)
def test_a_layer_is_what_repeats(model):
    module, count = MODELS[model]
    names = [name for name, _ in module.named_parameters(remove_duplicate=False)]
    lists = lists_in(names)
    layers = {split_name(name, lists)[1] for name in names if "linear" not in name and "layers.0.weight" not in name}
    assert layers == set(range(count))


def test_one_block_trained_of_many_is_still_a_layer():
    """Its experts repeat, and are not the layer; in an adapter of a few layers only those are known."""
    names = [f"model.layers.5.mlp.experts.{index}.w1.weight" for index in range(3)]
    assert {split_name(name, lists_in(names)) for name in names} == {
        (f"mlp.experts.{index}.w1", 5) for index in range(3)
    }


@pytest.mark.parametrize("cls", [SGDSaI, SWAN])
def test_rows_of_a_report(cls):
    model = named(model=nn.ModuleList([named(trunk=nn.ModuleList([Block(), Block()])), nn.Linear(4, 4)]))
    optimizer = cls(model.named_parameters())
    for param in model.parameters():
        param.grad = torch.randn_like(param)
    optimizer.step()
    report = GSNRReport.from_optimizer(optimizer, {"world_size": 1})
    rows = {row.name: (row.kind, row.layer) for row in (report.tensors or report.routes)}
    assert rows["model.0.trunk.1.query.weight"] == ("query", 1)
    assert rows["model.0.trunk.0.out.bias"] == ("out.bias", 0)
    assert rows["model.1.weight"] == ("1", None)


def test_thousands_of_names_take_one_pass():
    names = [f"model.layers.{i}.mlp.experts.{j}.{part}.weight" for i in range(32) for j in range(64) for part in "ab"]
    lists = lists_in(names)
    assert lists["model.layers"]
    assert len(lists) == 1 + 32
    assert math.prod(map(len, (lists, {split_name(name, lists)[1] for name in names}))) == 33 * 32
