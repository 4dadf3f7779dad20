"""Routing by module identity: what is whitened, how it is read as matrices, and why; on real models, built small."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.models import tiny_gpt2, tiny_llama, tiny_mixtral, tiny_vit
from torch import nn
from transformers import (
    BitConfig,
    DPTConfig,
    DPTForDepthEstimation,
    LlamaForSequenceClassification,
)

from hf_sai.optim.groups import swan_groups_of
from hf_sai.optim.routing import ADAM, Layout, layout_of, route_by_shape, route_parameters, summary


def routed(model, **options):
    """`{name: (route, reason)}`."""
    return {row.name: (row.route, row.reason) for row in route_parameters(model, **options)}


# ---- Layouts ----


@pytest.mark.parametrize(
    "layout",
    [Layout(), Layout(transposed=True), Layout(parts=3), Layout(transposed=True, parts=3), Layout(batched=True)]
    + [Layout(batched=True, transposed=True)],
)
def test_layouts_survive_as_text_and_undo_themselves(layout):
    assert layout_of(layout.route) == layout
    stack = torch.arange(2 * 6 * 6 * 6.0).reshape(2, 6, 6, 6) if layout.batched else torch.randn(2, 6, 6)
    matrices = layout.matrices(stack)
    assert matrices.ndim == 3
    count, rows, columns = layout.shape(stack.shape[1:])
    assert matrices.shape == (2 * count, rows, columns)
    assert torch.equal(layout.tensors(matrices, stack.shape[1:]), stack)


def test_layouts_by_hand():
    stack = torch.arange(12.0).reshape(1, 6, 2)
    assert Layout(parts=3).matrices(stack).tolist() == [[[0, 1], [2, 3]], [[4, 5], [6, 7]], [[8, 9], [10, 11]]]
    assert Layout(transposed=True).matrices(stack).tolist() == [[[0, 2, 4, 6, 8, 10], [1, 3, 5, 7, 9, 11]]]
    assert Layout().matrices(torch.zeros(1, 8, 3, 5, 5)).shape == (1, 8, 75)


@pytest.mark.parametrize("route", ["", "Matrix", "matrix, in x parts", "matrix, in 1 parts", "matrix,transposed"])
def test_what_is_no_route_is_refused(route):
    with pytest.raises(ValueError, match="a route must be 'adam', 'matrix' or 'matrices'"):
        layout_of(route)


# ---- Real models ----


def test_llama_keeps_table_head_and_norms_from_being_whitened():
    found = routed(tiny_llama())
    assert found["model.embed_tokens.weight"] == (ADAM, "embedding")
    assert found["lm_head.weight"] == (ADAM, "output head")
    assert found["model.layers.1.input_layernorm.weight"] == (ADAM, "not a matrix")
    whitened = [name for name, (route, _) in found.items() if route == "matrix"]
    assert len(whitened) == 2 * 7
    assert all("_proj" in name for name in whitened)


def test_a_tied_head_is_an_embedding_and_conv1d_is_transposed():
    found = routed(tiny_gpt2())
    assert "lm_head.weight" not in found
    assert found["transformer.wte.weight"] == (ADAM, "embedding, tied")
    assert found["transformer.wpe.weight"] == (ADAM, "embedding")
    assert found["transformer.h.0.attn.c_attn.weight"] == ("matrix, transposed", "linear layer")
    assert found["transformer.h.0.attn.c_attn.bias"] == (ADAM, "not a matrix")
    split = routed(tiny_gpt2(), split_qkv=True)
    assert split["transformer.h.0.attn.c_attn.weight"][0] == "matrix, transposed, in 3 parts"
    assert split["transformer.h.0.attn.c_proj.weight"][0] == "matrix, transposed"


def test_vit_keeps_its_patches_and_its_classifier_from_being_whitened():
    found = routed(tiny_vit())
    assert found["vit.embeddings.patch_embeddings.projection.weight"] == (ADAM, "embedding")
    assert found["vit.embeddings.position_embeddings"] == (ADAM, "not a matrix")
    assert found["classifier.weight"] == (ADAM, "output head")


def test_a_hybrids_projection_is_its_patch_embedding_and_its_network_is_whitened():
    network = BitConfig(embedding_size=8, hidden_sizes=[8, 8, 16], depths=[1, 1, 1], num_groups=4)
    network.out_features = ["stage1", "stage2", "stage3"]
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    sizes |= {"image_size": 32, "neck_hidden_sizes": [4, 4, 8, 8], "fusion_hidden_size": 8}
    model = DPTForDepthEstimation(
        DPTConfig(is_hybrid=True, **sizes, backbone_config=network, backbone_featmap_shape=[1, 16, 2, 2])
    )
    found = routed(model)
    assert found["dpt.embeddings.projection.weight"] == (ADAM, "embedding")
    inside = {name: route for name, route in found.items() if ".backbone." in name and "conv" in name}
    assert len(inside) == 13
    assert set(inside.values()) == {("matrix", "convolution, flattened")}


def test_what_is_frozen_yet_is_routed_by_its_module_too():
    """Scripts hand all of a model to the optimizer and let parts of it train later."""
    model = tiny_llama()
    expected = routed(model)
    model.requires_grad_(False)
    groups, lost, _ = swan_groups_of([{"params": list(model.named_parameters())}], [model])
    names = [name for name, _ in groups[0]["params"]]
    assert dict(zip(names, zip(groups[0]["routes"], groups[0]["reasons"], strict=True), strict=True)) == expected
    assert lost == 0


def test_experts_are_a_batch_of_matrices():
    found = routed(tiny_mixtral())
    experts = {name: route for name, route in found.items() if ".experts." in name}
    assert len(experts) == 4
    assert set(experts.values()) == {("matrices", "experts")}


def test_experts_that_are_stored_the_other_way_round():
    class Experts(nn.Module):
        num_experts, is_transposed = 3, True

        def __init__(self):
            super().__init__()
            self.up = nn.Parameter(torch.randn(3, 4, 5))
            self.bias = nn.Parameter(torch.randn(3, 4))

    found = routed(nn.ModuleDict({"experts": Experts()}))
    assert found["experts.up"] == ("matrices, transposed", "experts")


@pytest.mark.parametrize(
    ("policy", "a", "b"),
    [("b_only", ADAM, "matrix, transposed"), ("both", "matrix", "matrix, transposed"), ("adam", ADAM, ADAM)],
)
def test_lora_policy_decides_the_factors(policy, a, b):
    model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["gate_proj"]))
    found = routed(model, lora_policy=policy)
    factors = {name: route for name, (route, _) in found.items() if "lora_" in name}
    assert {route for name, route in factors.items() if "lora_A" in name} == {a}
    assert {route for name, route in factors.items() if "lora_B" in name} == {b}
    saved = {name: route for name, (route, _) in found.items() if "modules_to_save" in name}
    assert set(saved.values()) == {"matrix"}  # a copy of a linear layer inside the blocks


def test_adapters_on_embeddings_and_heads_and_magnitudes():
    config = LoraConfig(r=2, target_modules=["q_proj", "embed_tokens", "lm_head"], use_dora=False)
    found = routed(get_peft_model(tiny_llama(), config), lora_policy="both")
    assert {route for name, (route, _) in found.items() if "lora_embedding" in name} == {ADAM}
    assert found["base_model.model.lm_head.lora_B.default.weight"] == ("matrix, transposed", "LoRA B")
    found = routed(get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"], use_dora=True)))
    magnitudes = {name: route for name, route in found.items() if "magnitude" in name}
    assert len(magnitudes) == 2
    assert {route for route, _ in magnitudes.values()} == {ADAM}


def test_a_classifier_beside_the_backbone_is_a_head():
    config = tiny_llama().config
    config.num_labels = 3
    config.pad_token_id = 0
    found = routed(LlamaForSequenceClassification(config))
    assert found["score.weight"] == (ADAM, "output head")


def test_tied_parameters_of_any_module_go_where_the_embedding_goes():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(4, 9, bias=False)
            self.table = nn.Embedding(9, 4)
            self.table.weight = self.head.weight  # the head comes first
            self.block = nn.Linear(4, 4)

    found = routed(Tied())
    assert found["head.weight"] == (ADAM, "embedding, tied")
    assert found["block.weight"] == ("matrix", "linear layer")


def test_multihead_attention_and_convolutions_of_torch():
    model = nn.ModuleDict(
        {
            "attention": nn.MultiheadAttention(4, 2),
            "conv": nn.Conv2d(3, 5, 3),
            "up": nn.ConvTranspose2d(4, 3, 2),
            "raw": nn.ParameterList([nn.Parameter(torch.randn(2, 3, 4))]),
        }
    )
    found = routed(model, split_qkv=True)
    assert found["attention.in_proj_weight"][0] == "matrix, in 3 parts"
    assert found["conv.weight"] == ("matrix", "convolution, flattened")
    assert found["up.weight"][0] == "matrix"
    assert found["raw.0"] == (ADAM, "3 dimensions and no known module")


def test_targets_choose_and_what_is_left_goes_to_adam():
    found = routed(tiny_llama(), targets=lambda name, module: name.endswith("q_proj"))
    assert [name for name, (route, _) in found.items() if route != ADAM] == [
        f"model.layers.{layer}.self_attn.q_proj.weight" for layer in range(2)
    ]
    assert found["model.layers.0.mlp.up_proj.weight"] == (ADAM, "not in target_modules")


def test_nothing_to_whiten_is_an_error_with_the_reasons():
    with pytest.raises(ValueError, match=r"SWAN needs at least one matrix, but all 21 .*not in target_modules"):
        route_parameters(tiny_llama(), targets=lambda name, module: False)
    with pytest.raises(ValueError, match="lora_policy must be one of both, b_only, adam but is 'a_only'"):
        route_parameters(tiny_llama(), lora_policy="a_only")


def test_frozen_parameters_are_left_out_and_order_is_the_models():
    model = tiny_llama()
    model.model.layers[0].requires_grad_(False)
    found = list(routed(model))
    assert found == [name for name, param in model.named_parameters() if param.requires_grad]


def test_routes_by_shape():
    assert route_by_shape(torch.Size([3, 4]))[0] == "matrix"
    assert route_by_shape(torch.Size([3, 4, 3, 3]))[0] == "matrix"
    for shape in ([], [4], [1, 4], [4, 1], [0, 3]):
        assert route_by_shape(torch.Size(shape)) == (ADAM, "not a matrix")


def test_summary_counts():
    rows = [("matrix", "linear layer", 2_000_000), (ADAM, "embedding", 10), (ADAM, "not a matrix", 3)]
    rows.append((ADAM, "not a matrix", 3))
    assert summary(rows) == "1 tensors (2 M elements) whitened, 3 to Adam: 2 not a matrix, 1 embedding"
