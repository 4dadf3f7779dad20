"""The layer in a report's row is what repeats in the model, whatever numbers come before it."""

from __future__ import annotations

import functools
import math
import re

import pytest
import torch
import transformers
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
        ("classifier.0.weight", "classifier.0", None),
        ("base_model.model.score.modules_to_save.default.weight", "score.modules_to_save", None),
        ("conv_in.parametrizations.weight.original0", "conv_in.parametrizations.weight.original0", None),
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
        ("net.0.weight", "net.0", None),
        ("0.weight", "0", None),
        ("weight", "weight", None),
        ("net.0.embedding.weight", "embedding", None),
        # wrappers, wherever they are
        (
            "_orig_mod.module.base_model.model.model.layers.3.mlp.up_proj.lora_B.default.weight",
            "mlp.up_proj.lora_B",
            3,
        ),
        ("module._orig_mod.model.layers.3._checkpoint_wrapped_module.mlp.up_proj.weight", "mlp.up_proj", 3),
        ("_fsdp_wrapped_module.h.3._fsdp_wrapped_module.attn.c_attn.bias", "attn.c_attn.bias", 3),
        ("_forward_module.model.model.layers.3.self_attn.q_proj.weight", "self_attn.q_proj", 3),
    ],
)
def test_kind_and_layer(name, kind, layer):
    assert split_name(name) == (kind, layer)


# ---- By all names of a model ----

# How many layers there are, how many kinds, and how many tensors outside the layers, of models as their configs' own
# defaults make them. Where stages hold blocks the stage is the layer.
TRANSFORMERS = {
    "LlamaForCausalLM": (32, 12, 3),
    "GPT2LMHeadModel": (12, 16, 4),
    "GPTNeoXForCausalLM": (44, 16, 4),
    "GPTJForCausalLM": (28, 15, 5),
    "OPTForCausalLM": (12, 18, 4),
    "BloomForCausalLM": (2, 17, 5),
    "FalconForCausalLM": (32, 9, 3),
    "MptForCausalLM": (24, 8, 2),
    "CTRLLMHeadModel": (48, 20, 4),
    "XLMWithLMHeadModel": (12, 21, 5),
    "XLNetLMHeadModel": (24, 20, 3),
    "MixtralForCausalLM": (32, 12, 3),
    "GptOssForCausalLM": (36, 20, 3),
    "MambaForCausalLM": (32, 12, 2),
    "JambaForCausalLM": (32, 27, 3),
    "RwkvForCausalLM": (32, 24, 4),
    "BertForSequenceClassification": (12, 25, 9),
    "DistilBertForMaskedLM": (6, 25, 9),
    "AlbertForMaskedLM": (1, 26, 12),
    "DebertaV2ForMaskedLM": (24, 23, 9),
    "ModernBertForMaskedLM": (22, 11, 6),
    "MobileBertForMaskedLM": (24, 56, 13),
    "FunnelForMaskedLM": (3, 104, 4),
    "PerceiverForMaskedLM": (26, 36, 41),
    "T5ForConditionalGeneration": (6, 18, 3),
    "BartForConditionalGeneration": (12, 30, 7),
    "WhisperForConditionalGeneration": (4, 32, 11),
    "Wav2Vec2ForCTC": (12, 25, 12),
    "SpeechT5ForTextToSpeech": (12, 54, 18),
    "ViTForImageClassification": (12, 24, 8),
    "Dinov2ForImageClassification": (12, 27, 9),
    "SwinForImageClassification": (4, 113, 8),
    "ConvNextForImageClassification": (4, 91, 8),
    "ResNetForImageClassification": (4, 62, 5),
    "SegformerForSemanticSegmentation": (4, 57, 5),
    "CLIPModel": (12, 29, 14),
    "BlipForConditionalGeneration": (12, 51, 15),
    "LlavaForConditionalGeneration": (32, 36, 14),
    "Qwen2VLForConditionalGeneration": (80, 34, 10),
    "SamModel": (12, 82, 50),
    "EfficientNetForImageClassification": (55, 21, 8),
    "PatchTSTForPrediction": (3, 21, 5),
}
DIFFUSERS = {
    "UNet2DModel": (4, 100, 10),
    "UNet2DConditionModel": (4, 164, 10),
    "ControlNetModel": (4, 158, 48),
    "SD3Transformer2DModel": (18, 40, 16),
    "FluxTransformer2DModel": (38, 48, 16),
    "PixArtTransformer2DModel": (28, 31, 19),
    "WanTransformer3DModel": (40, 37, 15),
    "AutoencoderTiny": (18, 8, 0),
}


@functools.cache
def names_of(model):
    library = transformers if model in TRANSFORMERS else pytest.importorskip("diffusers")
    cls = getattr(library, model)
    with torch.device("meta"):
        built = cls(cls.config_class()) if model in TRANSFORMERS else cls()
    return tuple(name for name, _ in built.named_parameters())


def rows_of(names):
    lists = lists_in(names)
    return [split_name(name, lists) for name in names]


@pytest.mark.parametrize("model", [*TRANSFORMERS, *DIFFUSERS])
def test_layers_and_kinds_of_a_family(model):
    layers, kinds, outside = (TRANSFORMERS | DIFFUSERS)[model]
    if model.startswith("Segformer") and not any("attention.q_proj" in name for name in names_of(model)):
        pytest.skip("this transformers names its parts otherwise")
    rows = rows_of(names_of(model))
    found = {layer for _, layer in rows} - {None}
    # The tiny autoencoder's 15th is an activation.
    assert found == set(range(layers + 1)) - {15} if model == "AutoencoderTiny" else found == set(range(layers))
    assert len({kind for kind, _ in rows}) == kinds
    assert sum(layer is None for _, layer in rows) == outside


@pytest.mark.parametrize("model", ["LlamaForCausalLM", "BertForSequenceClassification", "UNet2DConditionModel"])
@pytest.mark.parametrize(
    "prefix",
    ["module.", "_orig_mod.", "model.", "model.model.", "_forward_module.model.", "module._orig_mod.", "net.0."],
)
def test_what_is_put_around_a_model_changes_nothing(model, prefix):
    """Of data parallelism, compilation, Lightning (`self.model`), Fabric, and a part of a Sequential."""
    assert rows_of([prefix + name for name in names_of(model)]) == rows_of(names_of(model))


def test_wrappers_inside_a_model_change_nothing():
    names = names_of("LlamaForCausalLM")
    wrapped = [re.sub(r"(layers\.\d+)", r"\1._fsdp_wrapped_module._checkpoint_wrapped_module", name) for name in names]
    assert wrapped != list(names)
    assert rows_of(wrapped) == rows_of(names)


@pytest.mark.parametrize(
    "model", ["BertForSequenceClassification", "ModernBertForMaskedLM", "T5ForConditionalGeneration"]
)
@pytest.mark.parametrize("dense", [0, 1, 2, 3])
def test_sentence_transformers_of_a_family(model, dense):
    """A model, pooling, and Dense modules, of which EmbeddingGemma has two: they repeat, and are no layers."""
    names = [f"model.0.model.{name}" for name in names_of(model)]
    modules = [f"model.{2 + index}.linear.{part}" for index in range(dense) for part in ("weight", "bias")]
    rows = rows_of([*names, *modules])
    assert rows[: len(names)] == rows_of(names_of(model))
    assert rows[len(names) :] == [("linear", None), ("linear.bias", None)] * dense


def test_a_model_with_fewer_layers_than_modules_beside_it():
    blocks = [
        f"model.0.model.encoder.layer.{layer}.{part}.weight" for layer in range(2) for part in ("query", "value")
    ]
    modules = [f"model.{index}.linear.weight" for index in (2, 3, 4)]
    expected = [(part, layer) for layer in range(2) for part in ("query", "value")] + [("linear", None)] * 3
    assert rows_of(blocks + modules) == expected


def test_an_adapter_of_some_layers():
    """LoRA on two of 32 layers, and a head that PEFT saves whole."""
    names = [
        f"base_model.model.model.layers.{layer}.self_attn.{part}.lora_{factor}.default.weight"
        for layer in (7, 30)
        for part in ("q_proj", "v_proj")
        for factor in "AB"
    ]
    rows = rows_of([*names, "base_model.model.score.modules_to_save.default.weight"])
    assert [layer for _, layer in rows] == [7] * 4 + [30] * 4 + [None]
    assert rows[0] == ("self_attn.q_proj.lora_A", 7)
    assert rows[-1][0] == "score.modules_to_save"


def test_lists_of_parameters():
    """Of no layers, and one beside the layers, as some models have scales."""
    assert rows_of(["unnamed.0", "unnamed.1"]) == [("unnamed.0", None), ("unnamed.1", None)]
    names = [f"blocks.{layer}.proj.weight" for layer in range(3)] + [f"scales.{layer}" for layer in range(3)]
    assert rows_of(names) == [(kind, layer) for kind in ("proj", "scales") for layer in range(3)]


def test_whole_models_in_a_list():
    """Two towers repeat as layers do; the layers are inside them."""
    names = [f"towers.{tower}.{name}" for tower in (0, 1) for name in names_of("BertForSequenceClassification")]
    assert rows_of(names) == rows_of(names_of("BertForSequenceClassification")) * 2


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
    assert {split_name(name, lists)[1] for name in names} - {None} == set(range(count))


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
    assert rows["model.1.weight"] == ("model.1", None)


def test_thousands_of_names_take_one_pass():
    names = [f"model.layers.{i}.mlp.experts.{j}.{part}.weight" for i in range(32) for j in range(64) for part in "ab"]
    lists = lists_in(names)
    assert lists["model.layers"]
    assert len(lists) == 1 + 32
    assert math.prod(map(len, (lists, {split_name(name, lists)[1] for name in names}))) == 33 * 32
