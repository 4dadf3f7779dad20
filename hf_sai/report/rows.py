"""The rows of a report, one per tensor, and what is computed of several."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar

from ..optimizer_facts import WRAPPERS
from .schema import LARGEST, SMALLEST


if TYPE_CHECKING:  # a report is read and shown without torch
    from torch import Tensor

Row = TypeVar("Row", bound="TensorRow | RouteRow")
# Words that name a list of blocks: layers, conv_layers, layer1, blocks, transformer_blocks, resnets, h, ...
_LIST = re.compile(r"(^|[._]|res)(layers?|blocks?|stages?|resnets|attentions|h)\d*$")
# What says too little of a tensor outside the blocks without the word before it.
_VAGUE = re.compile(r"\d+|weight|bias|lora_\w+|modules_to_save|base_layer|parametrizations|original\d*")
_NO_LISTS: Mapping[str, bool] = MappingProxyType({})


@dataclasses.dataclass(frozen=True)
class TensorRow:
    """
    One tensor of the report.

    Args:
        name (`str`): The parameter's name in the model.
        kind (`str`): The module's role without the layer number, such as `self_attn.q_proj.lora_A`.
        layer (`int` or `None`): Number of the block that it stands in; `None` outside the blocks.
        shape (`tuple[int, ...]`): Shape.
        numel (`int`): Number of elements.
        gsnr (`float`): As measured; `sqrt(numel)` for a fallback; 0.0 while pending.
        gsnr_over_sqrt_numel (`float`): What the gradient adds to the tensor's size: 1.0 for a gradient of zero mean.
        scale (`float`): What the learning rate is multiplied by.
        learning_rate (`float`): What its first gradient is multiplied by at the peak of the schedule: the learning
            rate of its group times `scale` times `factor`.
        step (`int`): Optimizer step of its first informative gradient, from 1; 0 while pending.
        status (`str`): `"measured"`, `"fallback"`, `"given"` or `"pending"`.
        factor (`float`, *optional*, defaults to 1.0): What the gradient is multiplied by before all else: of LoRA's
            pairs the bound on its norm, and for A a rate.
        gradient_norm (`float`, *optional*, defaults to 0.0): Of its first informative gradient; 0.0 where not known.
        weight_rms (`float`, *optional*, defaults to 0.0): Root mean square of the tensor before it first moved; 0.0
            where it was all zero, or is not known.
    """

    name: str
    kind: str
    layer: int | None
    shape: tuple[int, ...]
    numel: int
    gsnr: float
    gsnr_over_sqrt_numel: float
    scale: float
    learning_rate: float
    step: int
    status: str
    factor: float = 1.0
    gradient_norm: float = 0.0
    weight_rms: float = 0.0

    @property
    def update_rms(self) -> float | None:
        """Root mean square of the first update, at the peak learning rate; `None` where it is not known."""
        found = self.learning_rate * self.gradient_norm / math.sqrt(self.numel) if self.numel else 0.0
        return min(max(found, SMALLEST), LARGEST) if found else None

    @property
    def moved(self) -> float | None:
        """`update_rms` over the root mean square of the weights; `None` where one is 0 or not known."""
        found = self.update_rms / self.weight_rms if self.update_rms and self.weight_rms else 0.0
        return min(max(found, SMALLEST), LARGEST) if found else None

    @property
    def settled(self) -> bool:
        """Whether it has a scale: it is not pending."""
        return self.status != "pending"


@dataclasses.dataclass(frozen=True)
class RouteRow:
    """
    Where SWAN took one tensor, or what group of another optimizer it is in.

    Args:
        name (`str`): The parameter's name in the model.
        kind (`str`): As in [`TensorRow`].
        layer (`int` or `None`): As in [`TensorRow`].
        shape (`tuple[int, ...]`): Shape.
        numel (`int`): Number of elements.
        route (`str`): `"adam"`, or how it was read as matrices and whitened: `"matrix"`, `"matrix, transposed"`, ...;
            else the number of the group, such as `"group 0"`.
        reason (`str`): Why; else the group's options.
    """

    name: str
    kind: str
    layer: int | None
    shape: tuple[int, ...]
    numel: int
    route: str
    reason: str


def lists_in(names: Iterable[str]) -> dict[str, bool]:
    """
    What precedes the numbers in a model's names, and whether what stands there are its layers.

    Of `model.0.encoder.layer.3.query.weight` and its siblings `model.0.encoder.layer` repeats, while `model` does not:
    `model.2.linear.weight` is something else, and two of that kind among a hundred do not make it a list. Whole models
    that stand in a list (`towers.0.encoder.layer.3`) repeat too; their layers are inside them. Where there is one
    number only nothing is said.
    """
    # By what precedes and what follows: how many names have which number between.
    found: dict[str, dict[str, Counter[int]]] = {}
    for name in names:
        parts = _parts(name)
        for index in _numbers(parts):
            follows = found.setdefault(".".join(parts[:index]), {})
            rest = ".".join("0" if part.isdigit() else part for part in parts[index + 1 :])  # stages differ in depth
            follows.setdefault(rest, Counter())[int(parts[index])] += 1
    numbers = {before: set().union(*follows.values()) for before, follows in found.items()}
    lists = {before: _repeats(found[before]) for before, its in numbers.items() if len(its) > 1}
    for before in [each for each, repeats in lists.items() if repeats and not _LIST.search(each)]:
        blocks = [each for each in lists if each.startswith(f"{before}.") and _LIST.search(each) and lists[each]]
        lists[before] = max((len(numbers[each]) for each in blocks), default=0) <= len(numbers[before])
    beside = {before.rpartition(".")[0]: numbers[before] for before, repeats in lists.items() if repeats}
    for before, follows in found.items():
        if before in lists and not any(map(_says, follows)):  # norms of XLM's layers, in a list of their own
            lists[before] = numbers[before] == beside.get(before.rpartition(".")[0])
    return lists


def split_name(name: str, lists: Mapping[str, bool] = _NO_LISTS) -> tuple[str, int | None]:
    """
    Kind and layer of a parameter's name.

    `base_model.model.model.layers.3.self_attn.q_proj.lora_A.default.weight` gives `("self_attn.q_proj.lora_A", 3)`. A
    layer is the first number of what repeats; where that is not known, the first after a word such as `layers`. What
    has none stands outside the blocks.

    Args:
        name (`str`): In the model.
        lists (mapping, *optional*): Of all its names, by [`lists_in`].
    """
    parts = _parts(name)
    at = next((index for index in _numbers(parts) if _is_layers(".".join(parts[:index]), lists)), None)
    rest = parts if at is None else parts[at + 1 :]
    if at is not None and not _says(".".join(rest)):
        if lists.get(".".join(parts[:at])):
            rest = [parts[at - 1], *rest] if at else parts
        else:
            rest, at = parts, None  # a bare nn.Sequential: the number is all there is
    if rest[-1] == "weight" and len(rest) > 1:
        rest = rest[:-1]
    rest = [part for part in rest if part != "default"] or rest  # the adapter's name, where it is PEFT's default
    if at is None:
        first = next((index for index in reversed(range(len(rest))) if not _VAGUE.fullmatch(rest[index])), 0)
        rest = rest[first:]
    return ".".join(rest), None if at is None else int(parts[at])


def _parts(name: str) -> list[str]:
    """Without what wrappers put into it."""
    bare = [part for part in name.split(".") if part not in WRAPPERS]
    while bare[0] == "module" and len(bare) > 1:  # of DistributedDataParallel
        bare = bare[1:]
    return bare[2:] if bare[:2] == ["base_model", "model"] and len(bare) > 2 else bare


def _numbers(parts: list[str]) -> list[int]:
    return [index for index, part in enumerate(parts) if part.isdigit()]


def _is_layers(before: str, lists: Mapping[str, bool]) -> bool:
    """Whether the numbers after it are layers: by what is known, else by its last word."""
    return lists.get(before, bool(_LIST.search(before)))


def _repeats(follows: Mapping[str, Counter[int]]) -> bool:
    """Whether most of what stands under some numbers stands under several of them, and says something."""
    counts = [(numbers.total(), len(numbers) > 1) for rest, numbers in follows.items() if _says(rest)]
    return 2 * sum(count for count, several in counts if several) > sum(count for count, _ in counts)


def _says(rest: str) -> bool:
    """Whether what follows a number says more than `weight`."""
    return any(part and not part.isdigit() and part not in ("weight", "bias") for part in rest.split("."))


def tensor_row(statistics: Any, peak_learning_rate: float, lists: Mapping[str, bool] = _NO_LISTS) -> TensorRow:
    """From what `gsnr_statistics()` says of a tensor, and its group's learning rate; `lists` as [`lists_in`] says."""
    kind, layer = split_name(statistics.name, lists)
    return TensorRow(
        name=statistics.name,
        kind=kind,
        layer=layer,
        shape=statistics.shape,
        numel=statistics.numel,
        gsnr=statistics.gsnr,
        gsnr_over_sqrt_numel=statistics.gsnr / math.sqrt(statistics.numel) if statistics.numel else 0.0,
        scale=statistics.scale,
        learning_rate=min(peak_learning_rate * statistics.scale * statistics.factor, LARGEST),
        step=statistics.step,
        status=statistics.status,
        factor=min(statistics.factor, LARGEST),
        gradient_norm=min(statistics.gradient_norm, LARGEST),
        weight_rms=min(statistics.weight_rms, LARGEST),
    )


def route_row(name: str, param: Tensor, route: str, reason: str, lists: Mapping[str, bool] = _NO_LISTS) -> RouteRow:
    """From a parameter and what is to be said of it; `lists` as [`lists_in`] says."""
    from ..optim.tensors import whole_shape

    kind, layer = split_name(name, lists)
    shape = whole_shape(param)
    return RouteRow(name, kind, layer, shape, math.prod(shape), route, reason)


def format_shape(shape: Sequence[int]) -> str:
    """`(4, 6)` as `4x6`."""
    return "x".join(map(str, shape)) or "scalar"


def layers_of(rows: Iterable[TensorRow | RouteRow]) -> list[int | None]:
    """The layers that occur, in order; what stands outside the blocks, `None`, is first."""
    return sorted({row.layer for row in rows}, key=lambda layer: -1 if layer is None else layer)


def cells_of(rows: Iterable[Row]) -> dict[tuple[str, int | None], list[Row]]:
    """The rows by kind and layer; several where an adapter has more than one matrix of a kind."""
    cells: dict[tuple[str, int | None], list[Row]] = {}
    for row in rows:
        cells.setdefault((row.kind, row.layer), []).append(row)
    return cells


def shape_of(rows: Sequence[TensorRow | RouteRow]) -> str:
    """The one that all have, or how many there are."""
    shapes = sorted({format_shape(row.shape) for row in rows})
    return shapes[0] if len(shapes) == 1 else f"{len(shapes)} shapes"


def grouped(rows: Iterable[TensorRow], field: str) -> dict[Any, list[TensorRow]]:
    """The rows by one of their fields, in the order of their first."""
    groups: dict[Any, list[TensorRow]] = {}
    for row in rows:
        groups.setdefault(getattr(row, field), []).append(row)
    return groups


def median(values: Iterable[float]) -> float:
    """The upper median; 0.0 of nothing."""
    ordered = sorted(values)
    return ordered[len(ordered) // 2] if ordered else 0.0


def moved_most(drift: list[dict[str, Any]], count: int) -> list[str]:
    """The kinds of tensors whose g-SNR is furthest from its first measurement at the end."""
    last = drift[-1]["kinds"]
    return sorted(last, key=lambda kind: abs(math.log(last[kind] or 1.0)), reverse=True)[:count]
