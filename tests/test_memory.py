"""`hf-sai memory` and what it computes, against real models that were really stepped."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
from pathlib import Path

import pytest
import torch
from packaging.version import Version
from peft import LoraConfig, get_peft_model
from support.models import VOCABULARY, tiny_llama
from support.processes import peak_allocated
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.optimization import Adafactor
from typer.testing import CliRunner

import hf_sai
from hf_sai import quantization
from hf_sai.cli import app
from hf_sai.memory import MemoryRow, all_kinds, largest_llamas, memory_rows
from hf_sai.model_build import shapes_of, shapes_of_source
from hf_sai.model_shapes import ModelShapes, Tensors, Training, llama_shapes, merged, named_models, named_shapes
from hf_sai.optim import list_records


sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))
import write_tables


def llama(device="cpu", **sizes):
    wide = {"hidden_size": 128, "intermediate_size": 344, "num_attention_heads": 4, "max_position_embeddings": 2048}
    with torch.device(device):
        return tiny_llama(**{**wide, **sizes})


def gpt2(device="cpu"):
    """Tied, with biases and Conv1D."""
    with torch.device(device):
        return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=2, n_positions=16))


def bf16(device="cpu"):
    return llama(device).to(torch.bfloat16)


def adapter(device="cpu"):
    """PEFT keeps the adapters of a bf16 model in float32."""
    config = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    with torch.device(device):
        return get_peft_model(bf16(device), config)


MODELS = {"llama": llama, "gpt2": gpt2, "bf16": bf16, "adapter": adapter}


def real_optimizer(name, model):
    params = [param for param in model.parameters() if param.requires_grad]
    if name == "adamw":
        return torch.optim.AdamW(params, fused=True)
    if name == "adafactor":
        return Adafactor(params, lr=1e-3, scale_parameter=False, relative_step=False)
    if name == "sgd":
        return torch.optim.SGD(params, momentum=0.9)
    if name == "sgd_sai_bf16_state":
        return hf_sai.create_optimizer("sgd_sai", model, state_dtype="bfloat16")
    return hf_sai.create_optimizer(name, model)


def backward(model):
    tokens = torch.arange(12).view(2, 6)
    model(input_ids=tokens, labels=tokens).loss.backward()


@pytest.fixture(scope="module", params=MODELS)
def pair(request):
    """A real model, and what was computed for the same on the meta device."""
    make = MODELS[request.param]
    return make(), {row.optimizer: row for row in memory_rows(shapes_of(make("meta")))}


@pytest.mark.parametrize("name", [name for name, kind in all_kinds().items() if kind.checked])
def test_state_is_that_of_the_real_optimizer_to_the_byte(pair, name):
    model, rows = pair
    optimizer = real_optimizer(name, model)
    backward(model)
    if not name.endswith("layerwise"):
        grads = [param.grad for param in model.parameters() if param.grad is not None]
        assert rows[name].gradients == sum(grad.numel() * grad.element_size() for grad in grads)
    optimizer.step()
    model.zero_grad()
    for group in optimizer.param_groups:  # hooks of a layer-wise optimizer end with it
        group["lr"] = 0.0
    assert rows[name].state == hf_sai.optimizer_state_bytes(optimizer) > 0
    assert rows[name].weights == model.get_memory_footprint()
    assert rows[name].total == rows[name].weights + rows[name].gradients + rows[name].state + rows[name].extra


def test_layerwise_gradients_are_those_of_the_largest_tensor(pair):
    model, rows = pair
    largest = max(param.numel() * param.element_size() for param in model.parameters() if param.requires_grad)
    assert rows["sgd_sai_layerwise"].gradients == rows["swan_layerwise"].gradients == largest
    assert rows["sgd_sai_layerwise"].state == rows["sgd_sai"].state


@pytest.mark.parametrize(
    ("name", "make", "looseness"),
    [
        ("adamw", llama, 0.0),
        ("sgd", llama, 0.0),
        ("sgd_sai", llama, 0.0),
        ("adafactor", llama, 0.0),
        ("adafactor", bf16, 0.0),
        ("sgd_sai", bf16, 0.0),
        ("sgd_sai_bf16_state", llama, 0.0),
        ("swan", llama, 1.0),  # its bound holds for matrices of every shape
        ("swan", bf16, 1.0),
    ],
)
def test_extra_is_what_an_update_takes(name, make, looseness):
    model = make()
    optimizer = real_optimizer(name, model)
    for param in model.parameters():
        param.grad = torch.randn_like(param)
    optimizer.step()
    row = memory_rows(shapes_of(make("meta")), [name])[0]

    def step():
        torch.empty(1)  # so that something is recorded where a step allocates nothing
        optimizer.step()

    small = 2048  # scalars, and rows and columns of Adafactor's
    assert peak_allocated(step) - small <= row.extra <= peak_allocated(step) * (1 + looseness)


def test_the_bound_of_swan_is_its_own():
    for make in (llama, gpt2, adapter):
        model = make("meta")
        (row,) = memory_rows(shapes_of(model), ["swan_layerwise"])
        assert row.extra == hf_sai.create_optimizer("swan", model).whitening_bytes(one_at_a_time=True)


def test_eight_bit_state_is_the_documented_layout():
    """Two moments: a byte each and a maximum per 256 elements; small tensors and embeddings in 32 bits."""
    tensors = (
        Tensors((100, 64), "float32", 1, "adam", embedding=True),
        Tensors((101, 64), "float32", 1, "matrix"),
        Tensors((101,), "float32", 1, "adam"),
    )
    blocks = 26  # of 6464 elements; the last is not full
    (row,) = memory_rows(ModelShapes(tensors, 0, 0, "float32", 0), ["adamw_8bit"])
    assert row.state == 2 * 4 * 6400 + 2 * (6464 + 4 * blocks) + 2 * 4 * 101 + 2048
    assert not row.checked


def test_a_step_holds_the_larger_of_activations_and_update():
    row = MemoryRow("x", weights=100, gradients=30, state=20, extra=5, activations=50, checked=True)
    assert (row.total, row.peak) == (155, 170)
    assert dataclasses.replace(row, activations=10).peak == 155
    assert dataclasses.replace(row, activations=None).peak == 155
    assert dataclasses.replace(row, layerwise=True).peak == 205


def test_stages_of_zero_divide_state_then_gradients_then_weights():
    shapes = ModelShapes((Tensors((10, 10), "float32", 1, "matrix"),), 100, 403, "float32", 7)
    parts = {stage: dataclasses.astuple(memory_rows(shapes, ["adamw"], stage, 4)[0])[1:4] for stage in (0, 1, 2, 3)}
    assert parts == {0: (403, 400, 804), 1: (403, 400, 201), 2: (403, 100, 201), 3: (101, 100, 201)}


# ---- tables ----


def test_the_stored_tables_are_what_the_tool_writes():
    """If this fails: python tools/write_tables.py."""
    stored = json.loads((write_tables.PACKAGE / "named_models.json").read_text())
    assert json.loads((write_tables.PACKAGE / "optimizers.json").read_text()) == [
        record.facts for record in list_records()
    ]
    assert stored["models"] == {name: write_tables.named_model(*row) for name, row in write_tables.MODELS.items()}


@pytest.mark.slow
def test_the_stored_factors_are_what_the_tool_writes():
    stored = json.loads((write_tables.PACKAGE / "named_models.json").read_text())
    assert stored == write_tables.model_tables()


@pytest.mark.parametrize(
    ("name", "training"),
    [
        ("gpt2", Training(batch=2, sequence=256)),
        ("gpt2", Training("bfloat16", 16)),
        ("llama-3-8b", Training("bfloat16")),
        ("llama-3-8b", Training("float16", 8, gradient_checkpointing=True, batch=3)),
        ("llama-2-7b", Training(gradient_checkpointing=True)),
        ("vit-s-16", Training(batch=4)),
        ("vit-h-14", Training("bfloat16", 4, batch=2)),
    ],
)
def test_a_named_model_is_the_built_one(name, training):
    """
    Tensors and bytes alike; activations within 1 %, for what does not grow with the batch is in the formula too, and
    within 2 % where a layer's input is counted once as kept and once as computed again.
    """
    built = write_tables.build(
        *write_tables.MODELS[name], getattr(torch, training.dtype or "float32"), training.lora_rank
    )
    expected, found = shapes_of(built, training), named_shapes(name, training)
    assert set(found.trained) == set(expected.trained)
    assert (found.parameters, found.weights) == (expected.parameters, expected.weights)
    assert (found.dtype, found.sequence) == (expected.dtype, expected.sequence)
    assert found.activations == pytest.approx(
        expected.activations, rel=0.02 if training.gradient_checkpointing else 0.01
    )


@pytest.mark.parametrize("rank", [None, 8])
def test_a_llama_by_the_formula_is_the_built_one(rank):
    training = Training("bfloat16", rank, sequence=512)
    with torch.device("meta"):
        sizes = {"hidden_size": 640, "intermediate_size": 1792, "num_hidden_layers": 5, "num_attention_heads": 5}
        built = LlamaForCausalLM(LlamaConfig(**sizes))
        for param in built.parameters():
            param.data = param.data.bfloat16()
        built = built if rank is None else get_peft_model(built, LoraConfig(r=rank, target_modules="all-linear"))
    expected, found = shapes_of(built, training), llama_shapes(5, training)
    assert (set(found.trained), found.weights) == (set(expected.trained), expected.weights)
    assert found.activations == pytest.approx(expected.activations, rel=0.01)
    assert llama_shapes(32).parameters == 6_738_415_616


@pytest.mark.parametrize(
    ("name", "parameters", "tensors"),
    [("gpt2-xl", 1_557_611_200, 580), ("llama-2-7b", 6_738_415_616, 291)],
)
def test_sgd_sai_keeps_half_of_adamw_on_the_models_of_the_paper(name, parameters, tensors):
    sgd_sai, adamw = memory_rows(named_shapes(name), ["sgd_sai", "adamw"])
    assert sgd_sai.state == 4 * parameters
    assert adamw.state == 2 * sgd_sai.state + 4 * tensors  # a step count per tensor


def test_built_in_models_have_the_known_sizes():
    sizes = {name: named_shapes(name).parameters for name in ("llama-3-8b", "vit-h-14")}
    assert sizes == {"llama-3-8b": 8_030_261_248, "vit-h-14": 632_045_800}
    assert len(named_models()) == 8


def test_the_largest_llama_fits_and_the_next_does_not():
    training = Training("bfloat16", sequence=256)
    card = 600 * 2**20
    found = largest_llamas(card, ["adamw", "sgd_sai_layerwise"], training)
    for name, (layers, parameters) in found.items():
        assert parameters == llama_shapes(layers, training).parameters
        peaks = [memory_rows(llama_shapes(n, training), [name])[0].peak for n in (layers, layers + 1)]
        assert peaks[0] <= card < peaks[1]
    assert largest_llamas(2**20, ["adamw"]) == {"adamw": (0, 0)}


def test_the_largest_llama_is_not_cut():
    layers, parameters = largest_llamas(10 * 2**40, ["swan"], Training("bfloat16"))["swan"]
    assert layers > 150
    assert parameters > 1e12


def test_rows_that_are_alike_are_merged():
    row = Tensors((2, 3), "float32", 2, "adam")
    assert merged([row, row, Tensors((3, 2), "float32", 1, "adam")]) == (
        Tensors((2, 3), "float32", 4, "adam"),
        Tensors((3, 2), "float32", 1, "adam"),
    )


# ---- activations ----


def mixtral(device="cpu"):
    sizes = {"vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
    with torch.device(device):
        return MixtralForCausalLM(
            MixtralConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, num_local_experts=4)
        )


def t5(device="cpu"):
    with torch.device(device):
        return T5ForConditionalGeneration(
            T5Config(vocab_size=512, d_model=128, d_kv=32, d_ff=256, num_layers=2, num_heads=4)
        )


def deep(device="cpu"):
    return llama(device, num_hidden_layers=6, vocab_size=128)


def checkpointed(device="cpu"):
    return deep(device)


def experts_adapter(device="cpu"):
    """PEFT makes whole expert weights of base and factors, and autograd keeps them."""
    with torch.device(device):
        return get_peft_model(mixtral(device), LoraConfig(r=4, target_modules="all-linear"))


@pytest.mark.parametrize("make", [deep, mixtral, t5, checkpointed, experts_adapter])
def test_activations_are_what_a_real_pass_holds(make):
    """Peak of forward and backward on the CPU, whose attention keeps no table of scores either."""
    if make in (mixtral, experts_adapter) and Version(torch.__version__) < Version("2.9"):
        pytest.skip("torch 2.8 multiplies no groups of matrices on the CPU")
    model = make().train()
    on_meta = shapes_of(make("meta"), Training(batch=4, sequence=128, gradient_checkpointing=make is checkpointed))
    if make is checkpointed:
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    tokens = torch.randint(0, 100, (4, 128))
    inputs = {"input_ids": tokens, "labels": tokens, **({"decoder_input_ids": tokens} if make is t5 else {})}
    for param in filter(lambda param: param.requires_grad, model.parameters()):
        param.grad = torch.zeros_like(param)  # so that gradients are there before, and not counted
    peak = peak_allocated(lambda: model(**inputs).loss.backward())
    # T5's trained bias makes gradients of the size of the scores on the way.
    assert on_meta.activations == pytest.approx(peak, rel=0.15 if make is t5 else 0.1)


def test_frozen_weights_keep_no_inputs_and_eager_attention_keeps_its_scores():
    training = Training(batch=1, sequence=512)
    full = shapes_of(llama("meta"), training).activations
    frozen = llama("meta").requires_grad_(False)
    frozen.lm_head.requires_grad_(True)
    assert shapes_of(frozen, training).activations < full / 3
    scores = 2 * 4 * 512 * 512 * 4  # layers, heads, two sides, float32
    eager = llama("meta", attn_implementation="eager")
    assert shapes_of(eager, training).activations > full + scores


def test_what_does_not_run_on_the_meta_device_is_said():
    class Odd(LlamaForCausalLM):
        def forward(self, input_ids=None):
            raise KeyError("odd")

    with torch.device("meta"):
        shapes = shapes_of(Odd(llama("meta").config))
    assert shapes.activations is None
    assert "Odd does not run on the meta device with plain inputs (KeyError)" in shapes.note
    row = memory_rows(shapes, ["adamw"])[0]
    assert row.peak == row.total


def test_a_model_with_weights_or_without_parameters_is_refused():
    with pytest.raises(ValueError, match="it has parameters on cpu"):
        shapes_of(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="the model has none"):
        memory_rows(shapes_of(llama("meta").requires_grad_(False)))


# ---- what people load ----


SMALL = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_attention_heads": 4,
    "vocab_size": 128,
}


def saved(path, **fields):
    (path / "config.json").write_text(json.dumps(fields))
    return str(path)


def small_llama(path, **fields):
    return saved(path, model_type="llama", architectures=["LlamaForCausalLM"], **SMALL, **fields)


# Families of every kind: text, encoder and decoder, experts, state space, pictures, sound, both, odd parameters.
SAMPLE = [
    "bert",
    "xlnet",
    "t5",
    "qwen3_moe",
    "mamba",
    "vit",
    "resnet",
    "wav2vec2",
    "whisper",
    "clip",
    "imagegpt",
    "esm",
]
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers")


def of_type(kind, folder):
    """The usual model of a type with two layers, as a person's folder has it."""
    config = CONFIG_MAPPING[kind]()
    fields = {name: value for name, value in config.to_dict().items() if name not in ("dtype", "architectures")}
    fields |= {name: 2 for name in LAYERS if isinstance(fields.get(name), int) and "layer_types" not in fields}
    fields |= {"vocab_size": 33, "pad_token_id": 1} if kind == "esm" else {}
    return saved(folder, **fields)


@pytest.mark.parametrize("kind", SAMPLE)
def test_families_have_a_table(kind, tmp_path):
    shapes = shapes_of_source(of_type(kind, tmp_path), Training(sequence=64))
    (adamw,) = memory_rows(shapes, ["adamw"])
    assert shapes.trained_parameters > 1e5
    assert 0.98 < adamw.total / (4 * shapes.parameters + 12 * shapes.trained_parameters) < 1.1


@pytest.mark.slow
@pytest.mark.skipif("HF_SAI_LONG_TESTS" not in os.environ, reason="six minutes: set HF_SAI_LONG_TESTS=1")
@pytest.mark.timeout(1800)
def test_every_architecture_has_a_table_or_a_reason(tmp_path):
    """Reasons of transformers' own: a library that is missing, a configuration whose defaults do not build."""
    failed, counted = {}, 0
    for kind in CONFIG_MAPPING:
        try:
            source = of_type(kind, tmp_path)
        except Exception:  # the configuration class itself has no usable defaults
            continue
        try:
            shapes = shapes_of_source(source, Training(sequence=64))
            counted += shapes.activations is not None
            memory_rows(shapes)
        except ValueError as error:
            failed[kind] = str(error)
    known = ("can't build", "must name a model of transformers", "does not fit model_type")
    assert {kind: text for kind, text in failed.items() if not any(each in text for each in known)} == {}
    assert counted > 350


@pytest.mark.parametrize(
    ("fields", "dtype"),
    [
        ({"dtype": "bfloat16"}, "bfloat16"),
        ({"torch_dtype": "float16"}, "float16"),
        ({}, "float32"),
    ],
)
def test_the_dtype_is_that_of_from_pretrained(tmp_path, fields, dtype):
    shapes = shapes_of_source(small_llama(tmp_path, **fields))
    assert shapes.dtype == dtype
    assert {row.dtype for row in shapes.trained} == {dtype}
    assert ("names no dtype" in shapes.note) == (fields == {})
    assert {row.dtype for row in shapes_of_source(str(tmp_path), Training("float32")).trained} == {"float32"}


def test_what_transformers_keeps_in_float32_is_kept(tmp_path):
    """T5's `wo` in float16."""
    sizes = {"vocab_size": 64, "d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_heads": 2}
    source = saved(tmp_path, model_type="t5", architectures=["T5ForConditionalGeneration"], **sizes)
    wide = [row for row in shapes_of_source(source, Training("float16")).trained if row.dtype == "float32"]
    assert [(row.shape, row.count) for row in wide] == [((32, 48), 4)]
    assert {row.dtype for row in shapes_of_source(source, Training("bfloat16")).trained} == {"bfloat16"}


def test_tied_weights_count_once(tmp_path):
    tied, untied = (
        shapes_of_source(small_llama(tmp_path, tie_word_embeddings=tied), Training()).parameters
        for tied in (True, False)
    )
    assert untied - tied == 128 * 64


NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_use_double_quant": False}
LINEAR = 2 * (4 * 64 * 64 + 3 * 64 * 160)  # of two layers; embedding and head stay whole


@pytest.mark.parametrize(
    ("config", "per_weight"),
    [
        (NF4, lambda n, rows, columns: n // 2 + 4 * (n // 64) + 64),
        (
            {**NF4, "bnb_4bit_use_double_quant": True},
            lambda n, rows, columns: n // 2 + n // 64 + 4 * math.ceil(n / 64 / 256) + 4 + 1024 + 64,
        ),
        ({"load_in_8bit": True}, lambda n, rows, columns: n + 4 * rows),
        (
            {"quant_method": "gptq", "bits": 4, "group_size": 32},
            lambda n, rows, columns: n // 2 + n // 32 // 2 + 2 * n // 32 + 4 * columns,
        ),
        (
            {"quant_method": "awq", "bits": 4, "group_size": 32},
            lambda n, rows, columns: n // 2 + n // 32 // 2 + 2 * n // 32,
        ),
        (
            {"quant_method": "fp8"},
            lambda n, rows, columns: n + 4 * math.ceil(rows / 128) * math.ceil(columns / 128),
        ),
    ],
)
def test_quantised_weights_with_adapters(tmp_path, config, per_weight):
    source = small_llama(tmp_path, dtype="bfloat16", quantization_config=config)
    training = Training(lora_rank=4)
    whole = shapes_of_source(source, dataclasses.replace(training, quantization="none"))
    packed = shapes_of_source(source, training)
    sizes = [(64, 64)] * 4 + [(160, 64)] * 2 + [(64, 160)]
    expected = 2 * sum(per_weight(rows * columns, rows, columns) for rows, columns in sizes)
    assert whole.weights - packed.weights == 2 * LINEAR - expected
    assert packed.trained == whole.trained
    assert {row.dtype for row in packed.trained} == {"float32"}


def test_skipped_modules_stay_whole(tmp_path):
    source = small_llama(tmp_path, quantization_config={**NF4, "llm_int8_skip_modules": ["lm_head", "mlp.down_proj"]})
    source_all = {**NF4, "llm_int8_skip_modules": ["lm_head"]}
    some = shapes_of_source(source, Training(lora_rank=4)).weights
    most = shapes_of_source(small_llama(tmp_path, quantization_config=source_all), Training(lora_rank=4)).weights
    assert some - most == 2 * (4 * 64 * 160 - (64 * 160 // 2 + 4 * 160 + 64))


def test_a_quantised_named_model_is_the_built_one(tmp_path):
    """Llama 3 8B in 4 bits is known to take about 5.7 GB."""
    training = Training("bfloat16", 16, quantization="nf4-double")
    fields = {"vocab_size": 128256, "intermediate_size": 14336, "num_key_value_heads": 8}
    source = saved(tmp_path, model_type="llama", architectures=["LlamaForCausalLM"], **fields)
    built, named = shapes_of_source(source, training), named_shapes("llama-3-8b", training)
    assert named.weights == built.weights
    assert 5.5e9 < named.weights - named.gradients < 5.8e9
    assert set(quantization.QUANTIZATIONS) == {"none", "nf4", "nf4-double", "int8"}


def test_quantised_weights_can_not_be_trained_and_unknown_methods_are_named(tmp_path):
    with pytest.raises(ValueError, match="add adapters: --lora 16"):
        shapes_of_source(small_llama(tmp_path, quantization_config=NF4))
    with pytest.raises(ValueError, match="add adapters: --lora 16"):
        named_shapes("gpt2", Training(quantization="int8"))
    with pytest.raises(ValueError, match="is 'vptq'; add --quantization"):
        shapes_of_source(small_llama(tmp_path, quantization_config={"quant_method": "vptq"}), Training(lora_rank=1))


def test_adapters_go_where_peft_puts_them(tmp_path):
    source = small_llama(tmp_path)
    shapes = shapes_of_source(source, Training(lora_rank=4, lora_targets="q_proj, down_proj"))
    numel = 2 * 4 * ((64 + 64) + (160 + 64))
    assert shapes.trained_parameters == numel
    sgd_sai, adamw = memory_rows(shapes, ["sgd_sai", "adamw"])
    assert (sgd_sai.state, adamw.state) == (4 * numel, 8 * numel + 4 * 8)
    with pytest.raises(ValueError, match=r"PEFT can't add adapters to nothing_proj: .*nothing_proj"):
        shapes_of_source(source, Training(lora_rank=4, lora_targets="nothing_proj"))
    with pytest.raises(ValueError, match="give a folder or repository"):
        named_shapes("gpt2", Training(lora_rank=4, lora_targets="c_attn"))


# ---- the command ----


def invoke(*arguments):
    return CliRunner().invoke(app, ["memory", *arguments])


def test_json_holds_every_byte(tmp_path):
    source = small_llama(tmp_path)
    result = invoke(source, "--json", "--gpu", "100MB", "--optim", "swan", "--batch", "2", "--sequence", "32")
    assert result.exit_code == 0
    training = Training(batch=2, sequence=32)
    shapes = shapes_of_source(source, training)
    (row,) = memory_rows(shapes, ["swan"])
    layers, parameters = largest_llamas(100 * 2**20, ["swan"], training)["swan"]
    found = json.loads(result.output)
    assert found.pop("optimizers") == [
        {
            "optimizer": "swan",
            "weights": row.weights,
            "gradients": row.gradients,
            "state": row.state,
            "extra": row.extra,
            "activations": shapes.activations,
            "checked": True,
            "layerwise": False,
            "total": row.total,
            "peak": row.peak,
            "fits": True,
            "largest_llama": {"layers": layers, "parameters": parameters},
        }
    ]
    assert found.pop("note").startswith("config.json names no dtype")
    assert found == {
        "model": source,
        "parameters": shapes.parameters,
        "trained": shapes.parameters,
        "dtype": "float32",
        "lora_rank": None,
        "lora_targets": "all-linear",
        "quantization": None,
        "batch": 2,
        "sequence": 32,
        "gradient_checkpointing": False,
        "zero": None,
        "gpus": None,
        "gpu": "100MB",
        "card_bytes": 100 * 2**20,
    }


def test_the_table_of_gpt2_xl_stands_beside_the_paper():
    result = invoke("gpt2-xl", "--optim", "adamw", "--optim", "sgd_sai", "--optim", "adamw_8bit")
    assert result.output.splitlines() == [
        "gpt2-xl, float32: 1,557.6 M of 1,557.6 M parameters train",
        "batch 1 x 1,024 tokens: activations 9.97 GiB",
        "",
        "GiB         weights gradients state update total  peak",
        "------------------------------------------------------",
        "adamw          5.80      5.80 11.61   0.00 23.21 27.38",
        "sgd_sai        5.80      5.80  5.80   0.00 17.41 21.58",
        "adamw_8bit*    5.80      5.80  3.41   0.00 15.01 19.18",
        "",
        "total: weights, gradients, state and what an update takes for a while. peak: the",
        "most of a step, with activations, which are gone before all gradients are there.",
        "* bitsandbytes' documented layout; tests hold the others against the optimizers.",
        "State as the paper has it (arXiv 2412.11768): SGD-SaI 5.93 GB, AdamW 11.86.",
        "Counted here: SGD-SaI 5.80 GiB (6.23 GB), AdamW 11.61 GiB (12.46 GB).",
    ]


@pytest.mark.parametrize(
    "arguments",
    [
        ["gpt2", "--gpu", "100MB", "--dtype", "bfloat16"],
        ["llama-3-8b", "--gpu", "80GB", "--zero", "3", "--gpus", "8", "--batch", "16", "--gradient-checkpointing"],
        ["llama-2-7b", "--gpu", "100000GB", "--batch", "64", "--sequence", "131072"],
    ],
)
def test_the_table_with_a_card_has_80_columns(arguments):
    result = invoke(*arguments)
    assert result.exit_code == 0
    lines = result.output.splitlines()
    assert max(len(line) for line in lines) <= 80
    heads = next(line for line in lines if "weights" in line).split()
    assert heads[1:] == ["weights", "gradients", "state", "update", "total", "peak", "fits", "largest"]
    shown = [
        line.split()[0].rstrip("*") for line in lines if line.split() and line.split()[0].rstrip("*") in all_kinds()
    ]
    assert shown == list(all_kinds())


FOO = {"model_type": "foo", "architectures": ["FooForCausalLM"]}
CONFIG_ONLY = {"AutoConfig": "configuration_foo.FooConfig"}


@pytest.mark.parametrize(
    ("fields", "arguments", "message"),
    [
        ({}, ["gpt2", "--gpu", "lots"], "--gpu must be a size such as 24GB or 512MB but is 'lots'"),
        ({}, ["gpt2", "--optim", "adamx"], "'adamx' is not an optimizer of this table"),
        ({}, ["gpt2", "--zero", "3"], "--zero and --gpus belong together"),
        ({}, ["gpt2", "--lora-targets", "c_attn"], "--lora-targets needs adapters"),
        ({}, ["gpt2", "--revision", "v2"], "--revision is of a repository of the Hub, but gpt2 is a built-in name"),
        ({}, ["gpt2", "--trust-remote-code"], "--trust-remote-code would change nothing: gpt2 is a built-in name"),
        ({}, ["vit-s-16", "--sequence", "9"], "a picture has 197 tokens here"),
        ({}, ["HERE", "--revision", "v2"], "--revision is of a repository of the Hub, but "),
        ({}, ["a/b/c"], "a model must be a built-in name, a folder"),
        (FOO, ["HERE"], "model_type of "),
        ({"architectures": ["pipeline"], "model_type": "llama"}, ["HERE"], "'architectures'"),
        ({"architectures": [7], "model_type": "llama"}, ["HERE"], "'architectures'"),
        ({"model_type": "llama", "num_attention_heads": 7}, ["HERE"], "config.json of "),
        ({**FOO, "auto_map": CONFIG_ONLY}, ["HERE"], " has its own code (configuration_foo.FooConfig)"),
        ({**FOO, "auto_map": CONFIG_ONLY}, ["HERE", "--trust-remote-code"], "--trust-remote-code would not help"),
        ({"model_type": "llama"}, ["HERE", "--trust-remote-code"], "--trust-remote-code would change nothing"),
    ],
)
def test_what_can_not_be_counted_is_one_sentence(tmp_path, fields, arguments, message):
    folder = saved(tmp_path, **fields)
    (tmp_path / "configuration_foo.py").write_text(f"open({str(tmp_path / 'RAN')!r}, 'w')\n")
    result = CliRunner().invoke(
        app, ["memory", *(folder if each == "HERE" else each for each in arguments)], input="y\n"
    )
    assert (result.exit_code, result.stdout) == (1, "")
    assert message in result.stderr
    assert result.stderr.startswith("hf-sai: ")
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "RAN").exists()


def test_a_folder_without_configuration_says_what_to_give(tmp_path):
    assert "give the folder that a model was saved into" in invoke(str(tmp_path)).stderr
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "user/base"}')
    assert "it holds an adapter: give its base model, user/base, and --lora" in invoke(str(tmp_path)).stderr
    (tmp_path / "config.json").write_text('{"model_type": ')
    assert "must be JSON but: Expecting value: line 1 column 16" in invoke(str(tmp_path)).stderr
    (tmp_path / "config.json").write_text("[]")
    assert "must be an object but is a list" in invoke(str(tmp_path)).stderr


OWN_CODE = """
open({ran!r}, "w")
from transformers import LlamaConfig, LlamaForCausalLM
class FooConfig(LlamaConfig):
    model_type = "foo"
class FooForCausalLM(LlamaForCausalLM):
    config_class = FooConfig
"""


def test_own_code_runs_only_where_it_is_asked_for(tmp_path):
    """Whatever the files are: a type that transformers knows is counted without them."""
    names = {"AutoConfig": "modeling_foo.FooConfig", "AutoModelForCausalLM": "modeling_foo.FooForCausalLM"}
    (tmp_path / "modeling_foo.py").write_text(OWN_CODE.format(ran=str(tmp_path / "RAN")))
    small_llama(tmp_path, auto_map=names)
    known = invoke(str(tmp_path / "config.json"), "--json", "--optim", "sgd")
    assert known.exit_code == 0
    assert not (tmp_path / "RAN").exists()
    saved(tmp_path, **FOO, **SMALL, auto_map=names)
    assert invoke(str(tmp_path), "--json").exit_code == 1
    assert not (tmp_path / "RAN").exists()
    asked = invoke(str(tmp_path), "--json", "--optim", "sgd", "--trust-remote-code")
    assert (tmp_path / "RAN").exists()
    assert json.loads(asked.output)["parameters"] == json.loads(known.output)["parameters"]


def test_own_code_that_fails_is_one_sentence(tmp_path):
    (tmp_path / "modeling_foo.py").write_text("raise RuntimeError('two\\nlines')\n")
    saved(tmp_path, **FOO, auto_map={"AutoModel": "modeling_foo.Foo", "AutoConfig": "modeling_foo.FooConfig"})
    result = invoke(str(tmp_path), "--trust-remote-code")
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
    assert "the code of" in result.stderr
    assert "RuntimeError: two lines" in result.stderr
