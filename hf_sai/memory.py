"""
What a training needs in memory beside its activations, by optimizer, computed without allocating any of it.

The state is not estimated: the optimizers themselves make it, on the meta device, where tensors have shapes and no
bytes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .optim import OptimizerRecord, OptionError, list_records, optimizer_state_bytes
from .optim.base import NamedOptimizer


# bitsandbytes since 0.45: blocks of 256 elements with a float32 maximum each, smaller tensors in 32 bits, and two
# tables of 256 float32 numbers that all tensors share.
EIGHT_BIT_BLOCK, EIGHT_BIT_LEAST_NUMEL, EIGHT_BIT_TABLES = 256, 4096, 2 * 256 * 4


@dataclass(frozen=True)
class MemoryRow:
    """
    Bytes of one optimizer's training.

    Args:
        optimizer (`str`): One of [`OPTIMIZERS`].
        weights (`int`): Parameters and buffers of the model.
        gradients (`int`): Of all that trains; of the largest tensor alone where updates are layer-wise.
        state (`int`): The tensors that the optimizer keeps.
        extra (`int`): The most that an update needs on top, for a while.
        made (`bool`): Whether the optimizer itself made the state; otherwise its documented layout was computed.
    """

    optimizer: str
    weights: int
    gradients: int
    state: int
    extra: int
    made: bool

    @property
    def total(self) -> int:
        """All of them: what has to fit beside the activations."""
        return self.weights + self.gradients + self.state + self.extra


@dataclass(frozen=True)
class _Kind:
    """How the state and the extra memory of one optimizer are found, for a model whose tensors are on "meta"."""

    state: Callable[[nn.Module], int]
    extra: Callable[[nn.Module], int]
    layerwise: bool = False
    made: bool = True


def memory_rows(model: nn.Module, optimizers: Sequence[str] | None = None) -> list[MemoryRow]:
    """
    What training a model needs, one row for each optimizer.

    Args:
        model (`torch.nn.Module`): On the meta device, in the dtype and with the adapter that are trained; see
            [`meta_model`].
        optimizers (sequence of `str`, *optional*): Of [`OPTIMIZERS`]. Defaults to all.

    Raises:
        `OptionError`: An optimizer is not known.
        `ValueError`: A parameter is not on the meta device, or nothing trains.

    Example:

    ```python
    from hf_sai.memory import memory_rows, meta_model

    for row in memory_rows(meta_model("llama-2-7b")):
        print(row.optimizer, row.state)
    ```
    """
    trained = _trained(model)
    if not trained:
        raise ValueError(
            "computing memory needs a parameter with requires_grad, but the model has none; unfreeze some"
        )
    places = sorted({param.device.type for param in model.parameters()} - {"meta"})
    if places:
        raise ValueError(
            f"computing memory needs the model on the meta device, but it has parameters on {', '.join(places)}; "
            "build it under torch.device('meta')"
        )
    weights = _bytes([*model.parameters(), *model.buffers()])
    rows = []
    kinds = all_kinds()
    for name in kinds if optimizers is None else optimizers:
        if name not in kinds:
            raise OptionError(f"{name!r} is not an optimizer of this table; choose of: {', '.join(kinds)}")
        kind = kinds[name]
        gradients = max(_bytes([param]) for param in trained) if kind.layerwise else _bytes(trained)
        rows.append(MemoryRow(name, weights, gradients, kind.state(model), kind.extra(model), kind.made))
    return rows


def _trained(model: nn.Module) -> list[Tensor]:
    return [param for param in model.parameters() if param.requires_grad]


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _stepped(make: Callable[[list[nn.Parameter]], Any]) -> Callable[[nn.Module], int]:
    """The state of an optimizer of torch or of a host after one step; tensors that are alike are stepped once."""

    def state(model: nn.Module) -> int:
        total = 0
        for (shape, dtype), count in Counter((param.shape, param.dtype) for param in _trained(model)).items():
            param = nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"))
            param.grad = torch.empty_like(param)
            optimizer = make([param])
            optimizer.step()
            total += count * optimizer_state_bytes(optimizer)
        return total

    return state


def _adafactor(params: list[nn.Parameter]) -> Any:
    """As the host's trainer makes it."""
    from transformers.optimization import Adafactor

    return Adafactor(params, lr=1e-3, scale_parameter=False, relative_step=False)


def _ours(record: OptimizerRecord, **options: Any) -> _Kind:
    """
    Grouped as in a training. A [`NamedOptimizer`] makes its state for every trainable tensor in a first step without
    gradients, others only with them.
    """

    def made(model: nn.Module) -> Any:
        return record.cls(record.grouping(model), **{"lr": 1e-3, **options})

    def state(model: nn.Module) -> int:
        optimizer = made(model)
        if not isinstance(optimizer, NamedOptimizer):
            for param in _trained(model):
                param.grad = torch.empty_like(param)
        optimizer.step()
        optimizer.zero_grad()
        return optimizer_state_bytes(optimizer)

    def extra(model: nn.Module) -> int:
        optimizer = made(model)
        return optimizer.extra_bytes() if hasattr(optimizer, "extra_bytes") else 0

    return _Kind(state, extra, record.layerwise)


def _eight_bit_state(model: nn.Module) -> int:
    """Two moments; those of embeddings in 32 bits, as the host's trainer sets it."""
    tables = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    total = EIGHT_BIT_TABLES
    for param in _trained(model):
        numel = param.numel()
        in_eight = numel >= EIGHT_BIT_LEAST_NUMEL and param not in tables
        total += 2 * (numel + 4 * -(-numel // EIGHT_BIT_BLOCK)) if in_eight else 2 * 4 * numel
    return total


def _nothing(model: nn.Module) -> int:
    """A fused update writes in place."""
    return 0


def _adafactor_extra(model: nn.Module) -> int:
    """
    Two float32 tensors of the largest one's size, and the one before it, which is let go late; with low precision the
    gradient and the parameter too.
    """
    return max(param.numel() * 4 * (3 if param.dtype == torch.float32 else 5) for param in _trained(model))


_OF_OTHERS: dict[str, _Kind] = {
    "adamw": _Kind(_stepped(lambda params: torch.optim.AdamW(params, foreach=False)), _nothing),
    "adamw_8bit": _Kind(_eight_bit_state, _nothing, made=False),
    "adafactor": _Kind(_stepped(_adafactor), _adafactor_extra),
    "sgd": _Kind(_stepped(lambda params: torch.optim.SGD(params, momentum=0.9, foreach=False)), _nothing),
}


def all_kinds() -> dict[str, _Kind]:
    """What can be computed: of torch and hosts, and every record; ordinary ones first."""
    found = dict(_OF_OTHERS)
    for record in sorted(list_records(), key=lambda record: record.layerwise):
        found[record.name] = _ours(record)
        if not record.layerwise and any(option.name == "state_dtype" for option in record.options):
            found[f"{record.name}_bf16_state"] = _ours(record, state_dtype="bfloat16")
    return found


# Of the records that were there on import; `all_kinds()` has later ones too.
OPTIMIZERS = all_kinds()


# ---- models without weights ----

# Configuration class, model class (names of transformers) and sizes.
_GPT2 = ("GPT2Config", "GPT2LMHeadModel")
_LLAMA = ("LlamaConfig", "LlamaForCausalLM")
_VIT = ("ViTConfig", "ViTForImageClassification")
_LLAMA_3 = {
    "vocab_size": 128256,
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
}
ARCHITECTURES: dict[str, tuple[tuple[str, str], dict[str, Any]]] = {
    "gpt2": (_GPT2, {}),
    "gpt2-medium": (_GPT2, {"n_embd": 1024, "n_layer": 24, "n_head": 16}),
    "gpt2-large": (_GPT2, {"n_embd": 1280, "n_layer": 36, "n_head": 20}),
    "gpt2-xl": (_GPT2, {"n_embd": 1600, "n_layer": 48, "n_head": 25}),
    "llama-2-7b": (_LLAMA, {}),
    "llama-3-8b": (_LLAMA, _LLAMA_3),
    "vit-s-16": (_VIT, {"hidden_size": 384, "intermediate_size": 1536, "num_attention_heads": 6, "num_labels": 1000}),
    "vit-h-14": (
        _VIT,
        {
            "hidden_size": 1280,
            "intermediate_size": 5120,
            "num_hidden_layers": 32,
            "num_attention_heads": 16,
            "patch_size": 14,
            "num_labels": 1000,
        },
    ),
}
# GB of state in arXiv 2412.11768: SGD-SaI's, AdamW's; float32.
PUBLISHED = {"gpt2-xl": (5.93, 11.86), "llama-2-7b": (25.15, 49.48)}
# A LLaMA of n layers is 128 n wide; with 32 it is Llama-2-7B.
LARGEST_LLAMA_LAYERS = 96


def meta_model(source: str, dtype: torch.dtype = torch.float32, lora_rank: int | None = None) -> nn.Module:
    """
    A model on the meta device: shapes, and no weights.

    Args:
        source (`str`): A name of [`ARCHITECTURES`], a folder with `config.json`, that file, or a repository of the
            Hub, of which the configuration alone is fetched.
        dtype (`torch.dtype`, *optional*, defaults to `torch.float32`): Of the weights.
        lora_rank (`int`, *optional*): Adapters of that rank on all linear layers, in the dtype that PEFT gives them,
            and everything else frozen.

    Raises:
        `OSError`: There is no such folder or repository.
        `ValueError`: transformers has no model for the configuration, or PEFT is not installed.
    """
    import transformers

    if source in ARCHITECTURES:
        (config_class, model_class), sizes = ARCHITECTURES[source]
        config = getattr(transformers, config_class)(**sizes)
    else:
        config = transformers.AutoConfig.from_pretrained(source)
        model_class = next(iter(config.architectures or []), "")
        if not hasattr(transformers, model_class):
            raise ValueError(
                f"a configuration must name a model of transformers in 'architectures', but that of {source} says "
                f"{model_class or 'nothing'}; add the name of the class"
            )
    with torch.device("meta"):
        model = getattr(transformers, model_class)(config).to(dtype)
    return model if lora_rank is None else _with_adapter(model, lora_rank)


def _with_adapter(model: nn.Module, rank: int) -> nn.Module:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise ValueError("adapters need peft but it is not installed; pip install peft") from None
    with torch.device("meta"):
        return get_peft_model(model, LoraConfig(r=rank, target_modules="all-linear"))


def llama_of(layers: int, dtype: torch.dtype = torch.float32, lora_rank: int | None = None) -> nn.Module:
    """A LLaMA of Llama-2's proportions, on the meta device: `layers` layers, 128 times as wide."""
    from transformers import LlamaConfig, LlamaForCausalLM

    width = 128 * layers
    inner = -(-width * 8 // (3 * 256)) * 256
    sizes = {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers}
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(num_attention_heads=layers, **sizes)).to(dtype)
    return model if lora_rank is None else _with_adapter(model, lora_rank)


def largest_llamas(
    card_bytes: int, optimizers: Sequence[str], dtype: torch.dtype = torch.float32, lora_rank: int | None = None
) -> dict[str, tuple[int, int]]:
    """
    The largest [`llama_of`] whose training fits a card, beside no activations.

    Args:
        card_bytes (`int`): Memory of the card.
        optimizers (sequence of `str`): Of [`OPTIMIZERS`].
        dtype (`torch.dtype`, *optional*, defaults to `torch.float32`): Of the weights.
        lora_rank (`int`, *optional*): As in [`meta_model`].

    Returns:
        `dict`: Layers and number of parameters, by optimizer; `(0, 0)` where not one layer fits.
    """
    models: dict[int, nn.Module] = {}

    def total(layers: int, optimizer: str) -> int:
        if layers not in models:
            models[layers] = llama_of(layers, dtype, lora_rank)
        return memory_rows(models[layers], [optimizer])[0].total

    found = {}
    for optimizer in optimizers:
        fits, too_many = 0, LARGEST_LLAMA_LAYERS + 1
        while too_many - fits > 1:
            middle = (fits + too_many) // 2
            if total(middle, optimizer) <= card_bytes:
                fits = middle
            else:
                too_many = middle
        found[optimizer] = (fits, sum(param.numel() for param in models[fits].parameters()) if fits else 0)
    return found
