"""
Which parameter SWAN whitens and which goes to Adam, decided by the module that owns it, never by its name.

Source: arXiv 2412.13148: SWAN for the matrices inside the blocks, Adam for the embedding, the output head and all that
is no matrix. The cases that a paper's model does not have (adapters, convolutions, experts) are decided here, each
with its reason.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import logging
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..optimizer_facts import ADAM
from .checks import check_choice
from .names import named_parameters, plain_name, unwrapped, without_adapter
from .tensors import whole_shape


logger = logging.getLogger(__name__)

LoraPolicy = Literal["both", "b_only", "adam"]
LORA_POLICIES = ("both", "b_only", "adam")
_NOT_TARGETED = "not in target_modules"

_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED_CONVOLUTIONS = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
# How the layers are called that make an image into tokens, in transformers, timm and diffusers. PiT's name is whole:
# layers of other models that end so have positions in them.
_PATCHES = re.compile(r"\w*(Patch|Hybrid)Embed(ding|dings|der|WithSize)?|ConvEmbedding|NaFlexEmbeds|PixelEmbed")
# The factors of LoRA as PEFT calls them, and as kohya's sd-scripts, OneTrainer and ai-toolkit do.
_FACTORS = (("lora_A", "lora_B"), ("lora_down", "lora_up"))
_ROLES = {name: role for pair in _FACTORS for name, role in zip(pair, "ab", strict=True)}
# Fused query, key and value: nn.MultiheadAttention's own, and the names that models give to such a linear layer.
_FUSED_QKV = ("in_proj_weight", "c_attn", "qkv", "qkv_proj", "query_key_value", "Wqkv")


@dataclass(frozen=True)
class Layout:
    """
    How a tensor is read as matrices whose rows are output features.

    Args:
        batched (`bool`): All but the last two dimensions count matrices, as experts do. Otherwise all but the first
            are the columns of one matrix, as a convolution's are.
        transposed (`bool`): The matrix is stored `(in, out)`.
        parts (`int`): Equal parts of the rows that are matrices of their own, as query, key and value are.
    """

    batched: bool = False
    transposed: bool = False
    parts: int = 1

    @property
    def route(self) -> str:
        """As text, as parameter groups keep it; [`layout_of`] reads it."""
        words = ["matrices" if self.batched else "matrix"]
        words += ["transposed"] if self.transposed else []
        words += [f"in {self.parts} parts"] if self.parts > 1 else []
        return ", ".join(words)

    def shape(self, shape: torch.Size) -> tuple[int, int, int]:
        """`(count, rows, columns)` of the matrices in a tensor of that shape."""
        leading, rows = (shape[:-2], shape[-2]) if self.batched else (shape[:0], shape[0])
        columns = shape[-1] if self.batched else math.prod(shape[1:])
        rows, columns = (columns, rows) if self.transposed else (rows, columns)
        return math.prod(leading) * self.parts, rows // self.parts, columns

    def matrices(self, stack: Tensor) -> Tensor:
        """Tensors `[k, *shape]` as matrices `[k * count, rows, columns]`; a view where it can be."""
        found = stack.reshape(-1, *stack.shape[-2:]) if self.batched else stack.reshape(*stack.shape[:2], -1)
        found = found.mT if self.transposed else found
        return found.reshape(-1, found.shape[-2] // self.parts, found.shape[-1])

    def tensors(self, matrices: Tensor, shape: torch.Size) -> Tensor:
        """Undoes `matrices`: `[k, *shape]`."""
        rows = matrices.shape[-2] * self.parts
        whole = matrices.reshape(-1, rows, matrices.shape[-1])
        return (whole.mT if self.transposed else whole).reshape(-1, *shape)


# By route. Not functools.cache, of which torch.compile warns in a step.
_layouts: dict[str, Layout] = {}


def layout_of(route: str) -> Layout:
    """
    The layout of a route.

    Args:
        route (`str`): Such as `"matrix"`, `"matrix, transposed, in 3 parts"`, `"matrices"`.

    Raises:
        `ValueError`: It is none.
    """
    if route not in _layouts:
        _layouts[route] = _read_layout(route)
    return _layouts[route]


def _read_layout(route: str) -> Layout:
    for batched in (False, True):
        for transposed in (False, True):
            layout = Layout(batched, transposed)
            if route == layout.route:
                return layout
            rest = route.removeprefix(f"{layout.route}, in ").removesuffix(" parts")
            if rest.isdigit() and dataclasses.replace(layout, parts=int(rest)).route == route:
                return dataclasses.replace(layout, parts=int(rest))
    raise ValueError(
        f"a route must be 'adam', 'matrix' or 'matrices', with ', transposed' and ', in 3 parts' after it, but is "
        f"{route!r}; hf_sai.param_groups(model, 'swan') makes them"
    )


@dataclass(frozen=True)
class Route:
    """
    Where one parameter goes.

    Args:
        name (`str`): In the model.
        param (`torch.Tensor`): The parameter.
        route (`str`): `"adam"`, or how it is read as matrices.
        reason (`str`): Why, in a few words.
    """

    name: str
    param: Tensor
    route: str
    reason: str


@dataclass(frozen=True)
class _Owner:
    """A module that holds a parameter: under which name, and what of its surroundings matters."""

    module: nn.Module
    module_name: str
    attribute: str
    lora: str  # "a" or "b" inside an adapter's factor, "other" elsewhere in an adapter's own parameters, or ""
    is_head: bool


def route_parameters(
    model: nn.Module,
    targets: Callable[[str, nn.Module], bool] | None = None,
    lora_policy: LoraPolicy = "b_only",
    split_qkv: bool = False,
    frozen: bool = False,
) -> list[Route]:
    """
    Routes every trainable parameter of a model, each once, in the order of `named_parameters()`.

    Args:
        model (`torch.nn.Module`): Of any library. Embeddings and heads are asked of it (`get_input_embeddings()`,
            `get_output_embeddings()`, what stands outside `base_model`); a tied head is an embedding.
        targets (callable, *optional*): From a module's name and the module to whether its matrices may be whitened;
            all others go to Adam. `None` means all may.
        lora_policy (`str`, *optional*, defaults to `"b_only"`): Which factors of an adapter are whitened; what
            a user sets as SWAN's option `lora_whitening`.
        split_qkv (`bool`, *optional*, defaults to `False`): Whether a layer that makes query, key and value at once is
            whitened as three matrices. Whole, its largest singular direction is shared by the three.
        frozen (`bool`, *optional*, defaults to `False`): Whether those that do not train, or not yet, are routed too.

    Raises:
        `ValueError`: `lora_policy` is not known, or it or `targets` leaves nothing to whiten. A model without a matrix
            is warned of.
    """
    check_choice("lora_policy", lora_policy, LORA_POLICIES)
    model = unwrapped(model)
    tables, heads = _embeddings_and_heads(model)
    owners: dict[Tensor, list[_Owner]] = {}
    for owner, param in _owners(model, heads):
        owners.setdefault(param, []).append(owner)
    routes = []
    for name, param in named_parameters(model):
        if frozen or param.requires_grad:
            route, reason = _route(param, owners[param], tables, targets, lora_policy, split_qkv)
            routes.append(Route(name, param, route, reason))
    if routes and all(route.route == ADAM for route in routes):
        _say_nothing_is_whitened({route.reason for route in routes}, len(routes))
    return routes


def _say_nothing_is_whitened(reasons: set[str], count: int) -> None:
    """An error where a choice of the user kept matrices from being whitened; a warning where there is none."""
    why = "; ".join(sorted(reasons))
    if _NOT_TARGETED in reasons or any("lora_whitening" in reason for reason in reasons):
        raise ValueError(
            f"SWAN needs at least one matrix, but all {count} trainable parameters go to Adam ({why}); widen "
            "target_modules or lora_policy (in optim_args: lora_whitening), or choose another optimizer"
        )
    logger.warning(
        "SWAN whitens nothing of this model: all %d trainable parameters go to Adam (%s). AdamW does the same.",
        count,
        why,
    )


def route_by_shape(shape: torch.Size) -> tuple[str, str]:
    """Route and reason of a tensor whose module is not known: what has two dimensions or more is a matrix."""
    if _is_line(shape):
        return ADAM, "not a matrix"
    return Layout().route, "by shape: the module is not known"


def summary(routes: list[tuple[str, str, int]]) -> str:
    """
    One line for a log, such as `"84 tensors (9.5 M elements) whitened, 30 to Adam: 1 embedding, 29 not a matrix"`.

    Args:
        routes (list of `(route, reason, numel)`): Of every parameter.
    """
    whitened = [numel for route, _, numel in routes if route != ADAM]
    reasons: dict[str, int] = {}
    for route, reason, _ in routes:
        if route == ADAM:
            reasons[reason] = reasons.get(reason, 0) + 1
    parts = ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items(), key=lambda item: -item[1]))
    to_adam = len(routes) - len(whitened)
    return (
        f"{len(whitened)} tensors ({sum(whitened) / 1e6:.3g} M elements) whitened, {to_adam} to Adam"
        + f": {parts}" * bool(parts)
    )


def _is_line(shape: torch.Size) -> bool:
    """Whether it has fewer than two rows or columns."""
    return len(shape) < 2 or shape[0] < 2 or shape[1:].numel() < 2


def _embeddings_and_heads(model: nn.Module) -> tuple[set[Tensor], set[nn.Module]]:
    """The tables of all embeddings, by identity, and the modules that are an output head or stand in one."""
    tables: set[Tensor] = set()
    heads: set[nn.Module] = set()
    for module in model.modules():
        if isinstance(module, _EMBEDDINGS):
            tables.add(module.weight)
        # Of a text model a table, of others what makes patches or frames into tokens.
        embedding = next(iter(_asked(module, "get_input_embeddings")), None)
        if embedding is None and _PATCHES.fullmatch(type(module).__name__):
            embedding = module
        if embedding is not None and not isinstance(embedding, type(model)):
            # In a hybrid a convolutional network comes first, whose layers are like those of any other.
            backbone = embedding._modules.get("backbone")
            tables.update(set(embedding.parameters()) - set(backbone.parameters() if backbone is not None else ()))
        for method in ("get_output_embeddings", "get_classifier"):  # of transformers, of timm
            heads.update(each for head in _asked(module, method) for each in head.modules())
        # sentence-transformers: a loss with layers of its own, beside the model that it and the losses in it hold.
        encoder = dict(module.named_children()).get("model")
        if hasattr(encoder, "get_sentence_embedding_dimension"):
            encoders = (each for each in module.modules() if isinstance(each, type(encoder)))
            inside = {part for each in encoders for part in each.modules()}
            heads.update(set(module.modules()) - inside - {module})
        if type(module).__name__ == "SetFitHead":  # no part of the model
            heads.update(module.modules())
        # What a model has beside its backbone is a head. Asked of the class: PEFT's wrappers hand attributes through.
        backbone = dict(module.named_children()).get(getattr(type(module), "base_model_prefix", ""))
        for child in module.children() if backbone is not None else ():
            if child is not backbone:
                heads.update(child.modules())
    return tables, heads


def _asked(module: nn.Module, method: str) -> list[nn.Module]:
    """
    What a model says of itself, several modules where it was distilled with a head of its own; many that have the
    method raise where they have no such layer.
    """
    if not callable(getattr(type(module), method, None)):
        return []
    try:
        found = getattr(module, method)()
    except (NotImplementedError, AttributeError):
        return []
    return [each for each in (found if isinstance(found, (tuple, list)) else [found]) if isinstance(each, nn.Module)]


def _owners(model: nn.Module, heads: set[nn.Module]) -> Iterator[tuple[_Owner, Tensor]]:
    """Every place where a parameter is held, shared ones as often as they are."""
    adapters: dict[nn.Module, str] = {}
    for module in model.modules():
        if any(hasattr(module, a) and hasattr(module, b) for a, b in _FACTORS):
            for attribute, child in vars(module)["_modules"].items():
                if attribute.startswith("lora_") and child is not None:
                    adapters.update(dict.fromkeys(child.modules(), _ROLES.get(attribute, "other")))
    for module_name, module in model.named_modules(remove_duplicate=False):
        module_name = plain_name(module_name)
        for attribute, param in vars(module)["_parameters"].items():
            if param is not None:
                # An adapter's factors inside a head are the adapter's, not the head's.
                lora = adapters.get(module, "")
                yield _Owner(module, module_name, attribute, lora, module in heads and not lora), param


def _route(
    param: Tensor,
    owners: list[_Owner],
    tables: set[Tensor],
    targets: Callable[[str, nn.Module], bool] | None,
    lora_policy: str,
    split_qkv: bool,
) -> tuple[str, str]:
    """Route and reason of one parameter; the first rule that fits."""
    owner = owners[0]
    if param in tables:
        return ADAM, "embedding" if len({each.module for each in owners}) == 1 else "embedding, tied"
    if any(each.is_head for each in owners):
        return ADAM, "output head"
    if owner.lora == "other":
        return ADAM, "adapter's embedding or magnitude"
    if owner.lora and (lora_policy == "adam" or (lora_policy == "b_only" and owner.lora == "a")):
        return ADAM, f"LoRA {owner.lora.upper()}, by lora_whitening={lora_policy}"
    layout, reason = _layout(param, owner, split_qkv)
    if layout is None:
        return ADAM, reason
    if targets is not None and not any(
        targets(name, each.module) for each in owners for name in (each.module_name, without_adapter(each.module_name))
    ):
        return ADAM, _NOT_TARGETED
    return layout.route, reason


def _layout(param: Tensor, owner: _Owner, split_qkv: bool) -> tuple[Layout | None, str]:
    """How a parameter is read as matrices, or `None`, and why."""
    module, shape = owner.module, torch.Size(whole_shape(param))
    experts = getattr(module, "num_experts", None)
    if len(shape) == 3 and isinstance(experts, int) and shape[0] == experts and min(shape[1:]) > 1:
        return Layout(batched=True, transposed=bool(getattr(module, "is_transposed", False))), "experts"
    if _is_line(shape):
        return None, "not a matrix"
    if isinstance(module, _CONVOLUTIONS):
        return Layout(), "convolution, flattened"
    if isinstance(module, _TRANSPOSED_CONVOLUTIONS):
        return Layout(), "transposed convolution, flattened; rows are inputs"
    if len(shape) > 2:
        return None, f"{len(shape)} dimensions and no known module"
    transposed = type(module).__name__ == "Conv1D" and hasattr(module, "nf")  # transformers', stored (in, out)
    if owner.lora:
        # The rows are those of the rank in both factors, so that GradNorm's mean is over a model's width. Over B's own
        # columns, as few as the rank, centring would take away one direction of them for good.
        return Layout(transposed=transposed != (owner.lora == "b")), f"LoRA {owner.lora.upper()}"
    name = owner.attribute if owner.attribute != "weight" else owner.module_name.rpartition(".")[2]
    rows = shape[1] if transposed else shape[0]
    if name in _FUSED_QKV and split_qkv and rows % 3 == 0 and (transposed or multiplies_by(module, owner.attribute)):
        return Layout(transposed=transposed, parts=3), "query, key and value, split"
    if transposed or multiplies_by(module, owner.attribute):
        return Layout(transposed=transposed), "linear layer"
    return None, f"no matrix that {type(module).__name__} is known to multiply by"


def multiplies_by(module: nn.Module, attribute: str) -> bool:
    """
    Whether a module multiplies its input by a two-dimensional parameter of its own: linear layers of any library by
    what they say of themselves, attention by its name, all others by the code of their `forward`.

    Args:
        module (`torch.nn.Module`): The parameter's owner.
        attribute (`str`): Its name there.
    """
    if isinstance(module, nn.MultiheadAttention):
        return attribute.endswith("proj_weight")
    if isinstance(module, (nn.ParameterList, nn.ParameterDict)):
        return False
    if attribute == "weight":
        sizes = (getattr(module, "out_features", None), getattr(module, "in_features", None))
        if isinstance(module, nn.Linear) or tuple(module._parameters["weight"].shape) == sizes:  # type: ignore[union-attr]
            return True
    cls: Any = type(module)
    return _in_product(cls, attribute)


@functools.cache
def _in_product(cls: Any, attribute: str) -> bool:
    """Whether `forward` hands `self.<attribute>` to `linear` or `matmul`, or has it beside `@`."""
    try:
        source = inspect.getsource(cls.forward)
    except (OSError, TypeError):
        return False
    own = rf"self\.{re.escape(attribute)}\b"
    first = r"[^,()\[\]]+(?:\([^()]*\))?[^,()\[\]]*"  # the input, which may be a call
    products = (
        rf"\blinear\(\s*{first},\s*{own}",
        rf"\bmatmul\(\s*{first},\s*{own}",
        rf"\bmatmul\(\s*{own}",
        rf"@ *{own}",
        rf"{own}(?:\.T|\.mT|\.t\(\))? *@",
    )
    return any(re.search(each, source) for each in products)


def routes_of_group(group: dict[str, Any]) -> tuple[list[str], list[str]]:
    """
    Routes and reasons of a group that was made by hand.

    Args:
        group (`dict`): With `"params"` and `"kind"`: `"swan"` takes every tensor for a matrix, `"adam"` none, and
            `"auto"` those with two dimensions or more.

    Raises:
        `ValueError`: A group of kind `"swan"` holds a tensor that is no matrix.
    """
    if group["kind"] == "adam":
        return [ADAM] * len(group["params"]), ["kind='adam'"] * len(group["params"])
    found = [route_by_shape(torch.Size(whole_shape(param))) for param in group["params"]]
    if group["kind"] == "swan":
        for index, (route, _) in enumerate(found):
            if route == ADAM:
                shape = whole_shape(group["params"][index])
                raise ValueError(
                    f"a group of kind='swan' must hold matrices but its tensor {index} has shape {shape}; put it into "
                    "a group of kind='adam'. A flattened shard (FSDP1, DeepSpeed) has lost its rows and can't be "
                    "whitened"
                )
        return [route for route, _ in found], ["kind='swan'"] * len(found)
    return [route for route, _ in found], [reason for _, reason in found]


def complete_routes(group: dict[str, Any]) -> None:
    """
    Gives a group the routes that it lacks, and checks those that it has.

    Raises:
        `ValueError`: They do not fit.
    """
    if "routes" not in group:
        group["routes"], group["reasons"] = routes_of_group(group)
    group.setdefault("reasons", [""] * len(group["routes"]))
    if not len(group["routes"]) == len(group["reasons"]) == len(group["params"]):
        raise ValueError(
            f"a group must have one route per parameter but has {len(group['routes'])} for "
            f"{len(group['params'])}, and {len(group['reasons'])} reasons; leave them out, or take what "
            "hf_sai.param_groups gives"
        )
    for route in group["routes"]:
        if route != ADAM:
            layout_of(route)
