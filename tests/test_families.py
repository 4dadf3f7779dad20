"""
Routes and decay over the model families of transformers and the methods of PEFT, each built small from its config.

What a tensor is, is judged here by another way than the package's: by running the model and looking on which two-
dimensional parameters a product, and on which an embedding lookup is really called.
"""

from __future__ import annotations

import logging
import warnings

import pytest
import torch
import transformers
from packaging.version import Version
from support.models import tiny_llama
from torch import nn
from torch.overrides import TorchFunctionMode

import hf_sai
from hf_sai.optim import route_parameters
from hf_sai.optim.routing import ADAM


SIZES = {
    "vocab_size": 32,
    "hidden_size": 16,
    "d_model": 16,
    "dim": 16,
    "n_embd": 16,
    "embed_dim": 16,
    "n_dim": 16,
    "intermediate_size": 24,
    "ffn_dim": 24,
    "d_ff": 24,
    "d_inner": 24,
    "hidden_dim": 24,
    "ffn_hidden_size": 24,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "num_hidden_layers": 1,
    "n_layer": 1,
    "num_layers": 1,
    "n_layers": 1,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "num_decoder_layers": 1,
    "num_attention_heads": 2,
    "n_head": 2,
    "num_heads": 2,
    "n_heads": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "d_kv": 8,
    "embedding_size": 12,
    "max_position_embeddings": 32,
    "n_positions": 32,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "state_size": 8,
    "pad_token_id": 0,
    "type_vocab_size": 2,
    "max_source_positions": 32,
    "max_target_positions": 32,
    "word_embed_proj_dim": 16,
    "rotary_dim": 4,
    "num_labels": 3,
    "d_head": 8,
}
# Architecture: what differs from SIZES; `None` leaves a size out.
TEXT = ("input_ids", (2, 8))
IMAGE = ("pixel_values", (2, 3, 16, 16))
PATCHES = {"image_size": 16, "patch_size": 4}
FAMILIES = {
    "LlamaForCausalLM": {},
    "LlamaForSequenceClassification": {},
    "MistralForCausalLM": {},
    "MixtralForCausalLM": {},
    "Qwen2ForCausalLM": {},
    "Qwen3ForCausalLM": {},
    "Qwen2MoeForCausalLM": {"shared_expert_intermediate_size": 24},
    "GemmaForCausalLM": {},
    "Gemma2ForCausalLM": {},
    "PhiForCausalLM": {},
    "Phi3ForCausalLM": {},
    "GPT2LMHeadModel": {},
    "GPTNeoForCausalLM": {"attention_types": [[["global"], 1]]},
    "GPTNeoXForCausalLM": {},
    "GPTJForCausalLM": {},
    "OPTForCausalLM": {},
    "BloomForCausalLM": {},
    "FalconForCausalLM": {"head_dim": None},
    "CodeGenForCausalLM": {"n_ctx": 32, "n_head": 4, "n_embd": 32},
    "StableLmForCausalLM": {},
    "Starcoder2ForCausalLM": {},
    "OlmoForCausalLM": {},
    "CohereForCausalLM": {},
    "GraniteForCausalLM": {},
    "GptOssForCausalLM": {},
    "MambaForCausalLM": {},
    "BertForMaskedLM": {},
    "BertForSequenceClassification": {},
    "RobertaForSequenceClassification": {},
    "DistilBertForSequenceClassification": {},
    "ElectraForSequenceClassification": {},
    "AlbertForMaskedLM": {},
    "DebertaV2ForSequenceClassification": {},
    "MPNetForMaskedLM": {},
    "XLNetLMHeadModel": {"max_position_embeddings": None},
    "ModernBertForMaskedLM": {},
    "T5ForConditionalGeneration": {"decoder_start_token_id": 0},
    "BartForConditionalGeneration": {"decoder_start_token_id": 0, "bos_token_id": 0, "eos_token_id": 1},
    "PegasusForConditionalGeneration": {"decoder_start_token_id": 0},
    "ViTForImageClassification": PATCHES,
    "DeiTForImageClassification": PATCHES,
    "BeitForImageClassification": PATCHES,
    "SwinForImageClassification": {
        "image_size": 16,
        "patch_size": 4,
        "embed_dim": 16,
        "depths": [1],
        "num_heads": [2],
        "window_size": 2,
    },
    "ConvNextForImageClassification": {"hidden_sizes": [8, 16], "depths": [1, 1], "patch_size": 4, "num_stages": 2},
    "ResNetForImageClassification": {
        "embedding_size": 8,
        "hidden_sizes": [16, 32],
        "depths": [1, 1],
        "layer_type": "basic",
    },
    "Dinov2ForImageClassification": {**PATCHES},
}
QUICK = ("GPT2LMHeadModel", "GptOssForCausalLM", "MambaForCausalLM", "SwinForImageClassification", "XLNetLMHeadModel")


def built(name):
    """A model of that class with the sizes above."""
    cls = getattr(transformers, name)
    own = FAMILIES[name]
    known = cls.config_class()
    sizes = {
        key: value
        for key, value in {**SIZES, **own}.items()
        if value is not None and (key in own or hasattr(known, key))
    }
    for mapped in getattr(cls.config_class, "attribute_map", {}):
        if mapped in sizes and mapped not in own and cls.config_class.attribute_map[mapped] in sizes:
            del sizes[mapped]
    torch.manual_seed(0)
    model = cls(cls.config_class(**sizes))
    set_experts = getattr(model, "set_experts_implementation", None)
    if callable(set_experts):
        set_experts("eager")
    return model.train()


class Uses(TorchFunctionMode):
    """Notes which parameters a product, a convolution or a lookup is called on."""

    def __init__(self, model):
        super().__init__()
        self.params = {id(param): param for param in model.parameters()}
        self.products, self.lookups = set(), set()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        values = [*args, *(kwargs or {}).values()]
        found = {id(self.origin(value)) for value in values if isinstance(value, torch.Tensor)} & set(self.params)
        if name in (
            "linear",
            "matmul",
            "__matmul__",
            "bmm",
            "addmm",
            "mm",
            "baddbmm",
            "conv1d",
            "conv2d",
            "_grouped_mm",
        ):
            self.products |= {each for each in found if self.params[each].ndim > 1}
        if name == "embedding":
            self.lookups |= found
        return function(*args, **(kwargs or {}))

    @staticmethod
    def origin(value):
        """A view of a parameter (one expert's piece, a transpose) is the parameter."""
        return value if value._base is None else value._base


def uses(model, name):
    key, shape = IMAGE if "Image" in name else TEXT
    inputs = {key: torch.rand(shape) if key == "pixel_values" else torch.randint(2, 30, shape)}
    if "ConditionalGeneration" in name:
        inputs["decoder_input_ids"] = inputs["input_ids"]
    with Uses(model) as seen, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model(**inputs)
    return seen


def norm_owned(model):
    """Parameters of what its library calls a norm."""
    for module in model.modules():
        if type(module).__name__.lower().rstrip("123456789d").endswith("norm"):
            yield from module.parameters(recurse=False)


@pytest.mark.parametrize(
    "name", [pytest.param(each, marks=[] if each in QUICK else [pytest.mark.slow]) for each in FAMILIES]
)
def test_a_family_is_routed_by_what_its_modules_do(name):
    if name == "ModernBertForMaskedLM" and Version(transformers.__version__) < Version("5.24"):
        pytest.skip("older versions refuse a smaller configuration of it")
    model = built(name)
    seen = uses(model, name)
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    rows = route_parameters(model)
    assert [row.name for row in rows] == [each for each, param in model.named_parameters() if param.requires_grad]
    whitened = {row.name for row in rows if row.route != ADAM}
    assert whitened
    for row in rows:
        where = f"{name}: {row.name} {tuple(row.param.shape)} is {row.route}, {row.reason}"
        if row.name in whitened:
            assert id(row.param) in seen.products, where
            assert id(row.param) not in seen.lookups, where
            assert head is None or row.param is not head.weight, where
        elif row.param.ndim == 2 and min(row.param.shape) > 1 and id(row.param) in seen.products:
            # A matrix that is not whitened is a table, or a head beside the blocks.
            assert row.reason in ("embedding", "embedding, tied", "output head"), where
    check_decay(model, name)


def check_decay(model, name):
    groups = hf_sai.param_groups(model, "sgd_sai", weight_decay=0.1)
    decaying = {id(param) for group in groups if group["weight_decay"] for _, param in group["params"]}
    for param in norm_owned(model):
        assert id(param) not in decaying, name
    for owner, module in model.named_modules():
        for attribute, param in module.named_parameters(recurse=False):
            if attribute.endswith("bias") and param.ndim == 1:
                assert id(param) not in decaying, f"{name}: {owner}.{attribute}"
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.Embedding)):
            assert id(module.weight) in decaying or not module.weight.requires_grad, f"{name}: {owner}.weight"


# ---- PEFT ----


def peft_configs():
    """Name, configuration, parts of names that are whitened (by default), and parts that may go to Adam only."""
    import peft

    linear = {"target_modules": ["q_proj", "up_proj"]}
    attention = {"task_type": "CAUSAL_LM"}
    return {
        "LoRA": (peft.LoraConfig(r=2, **linear), "lora_B"),
        "rsLoRA": (peft.LoraConfig(r=2, use_rslora=True, **linear), "lora_B"),
        "DoRA": (peft.LoraConfig(r=2, use_dora=True, **linear), "lora_B"),
        "AdaLoRA": (peft.AdaLoraConfig(init_r=4, target_r=2, total_step=100, **linear), "lora_B"),
        "LoRA with embedding": (peft.LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"]), "lora_B"),
        "LoRA with saved modules": (peft.LoraConfig(r=2, modules_to_save=["gate_proj"], **linear), "lora_B"),
        "trainable tokens beside LoRA": (peft.LoraConfig(r=2, trainable_token_indices=[1, 2, 3], **linear), "lora_B"),
        "trainable tokens": (peft.TrainableTokensConfig(token_indices=[1, 2], target_modules=["embed_tokens"]), ""),
        "VeRA": (peft.VeraConfig(r=2, **linear), ""),
        "LoHa": (peft.LoHaConfig(r=2, **linear), ""),
        "LoKr": (peft.LoKrConfig(r=2, **linear), ""),
        "OFT": (peft.OFTConfig(oft_block_size=8, **linear), ""),
        "BOFT": (peft.BOFTConfig(boft_block_size=4, **linear), ""),
        "IA3": (peft.IA3Config(feedforward_modules=["up_proj"], **linear), ""),
        "HRA": (peft.HRAConfig(r=2, **linear), ""),
        "VBLoRA": (peft.VBLoRAConfig(r=2, num_vectors=8, vector_length=8, **linear), ""),
        "FourierFT": (peft.FourierFTConfig(n_frequency=10, **linear), ""),
        "LN tuning": (peft.LNTuningConfig(target_modules=["input_layernorm"]), ""),
        "prompt tuning": (peft.PromptTuningConfig(num_virtual_tokens=3, **attention), ""),
        "prefix tuning": (peft.PrefixTuningConfig(num_virtual_tokens=3, **attention), ""),
        "p-tuning": (peft.PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=8, **attention), "mlp_head"),
    }


@pytest.mark.parametrize("method", list(peft_configs()))
def test_a_peft_method_trains_with_every_policy_or_is_refused_for_the_true_reason(method, caplog):
    import peft

    def adapted():
        return peft.get_peft_model(tiny_llama(), peft_configs()[method][0])

    whitened_part = peft_configs()[method][1]
    for policy in ("b_only", "both", "adam"):
        model = adapted()
        try:
            rows = route_parameters(model, lora_policy=policy)
        except ValueError as error:
            refused_for = (policy, bool(whitened_part), "lora_whitening=adam" in str(error))
            assert refused_for == ("adam", True, True)
            continue
        for row in rows:
            if row.route != ADAM:
                allowed = [whitened_part] + ["lora_A"] * (policy == "both") + ["modules_to_save"]
                assert whitened_part
                assert any(part in row.name for part in allowed), f"{method}: {row.name}"
        if policy == "b_only" and whitened_part:
            assert any(whitened_part in row.name and row.route != ADAM for row in rows)
        move_all(hf_sai.create_optimizer("swan", model, lr=1e-3, lora_whitening=policy), model)
    caplog.set_level(logging.ERROR)
    pairs = method in ("LoRA", "rsLoRA", "DoRA") or method.startswith("LoRA ") or method.endswith("beside LoRA")
    model = adapted()
    if pairs:
        move_all(hf_sai.create_optimizer("sgd_sai", model, lr=1e-3, lora_policy="paired"), model)
    else:
        with pytest.raises(ValueError, match=r"AdaLoRA|which has none"):
            hf_sai.create_optimizer("sgd_sai", model, lr=1e-3, lora_policy="paired")
    move_all(hf_sai.create_optimizer("sgd_sai", adapted(), lr=1e-3), None)


def move_all(optimizer, model):
    """One step with given gradients moves every trained tensor, and leaves all finite."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    assert params
    if model is not None:
        assert {id(each) for each in params} == {id(each) for each in model.parameters() if each.requires_grad}
    before = [param.detach().clone() for param in params]
    generator = torch.Generator().manual_seed(3)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator)
    optimizer.step()
    for param, old in zip(params, before, strict=True):
        assert param.isfinite().all()
        assert not torch.equal(param, old)
