"""A run as data: one row per tensor, the options that ran, and a JSON text with a schema number."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import platform
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Self

from ..optimizer_facts import ADAM, facts_of
from . import schema
from .rows import RouteRow, TensorRow, grouped, layers_of, lists_in, median, route_row, shape_of, tensor_row
from .schema import SCHEMA, STATUSES


if TYPE_CHECKING:  # a report is read and shown without torch
    from ..optim.registry import OptimizerRecord


@dataclasses.dataclass(frozen=True)
class ReportData:
    """
    What SGD-SaI measured in a run, or how SWAN routed it. Holds no path, no command line, no environment variable.

    Args:
        optimizer (`str`): Registered name, such as `"sgd_sai"`.
        options (`dict`): The options that ran, typed: `momentum`, `eps`, `normalize`, ..., and what chose the groups:
            `lora_policy` or `lora_whitening`, `split_qkv`, and where it was set `target_modules`.
        learning_rate (`float`): Peak learning rate, the largest of the groups.
        weight_decay (`float`): The largest of the groups.
        gsnr_max (`float`): Largest g-SNR of the model, as fixed by the first measuring step; 0.0 before.
        tensors (`list[TensorRow]`): One row per trained tensor, of an optimizer that measures scales.
        routes (`list[RouteRow]`): One row per trained tensor, of any other.
        state_bytes (`int`): Bytes that the optimizer keeps for its tensors.
        adamw_state_bytes (`int`): Bytes that AdamW would keep: two numbers per element in the parameter's dtype.
        run (`dict`): Facts of the run, such as `effective_batch_size` and `world_size`, where they are known.
        history (`list[dict]`): g-SNR measured again later, where tracked: `{"step": 50, "gsnr": {name: g-SNR}}`.
        versions (`dict[str, str]`): Of the packages that matter.
        schedule (`list[float]`): Lowest and highest factor that the schedule multiplies the peak learning rate with,
            over the steps that move something; empty where it is not known.
    """

    optimizer: str
    options: dict[str, Any]
    learning_rate: float
    weight_decay: float
    gsnr_max: float
    tensors: list[TensorRow]
    routes: list[RouteRow]
    state_bytes: int
    adamw_state_bytes: int
    run: dict[str, Any] = dataclasses.field(default_factory=dict)
    history: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    versions: dict[str, str] = dataclasses.field(default_factory=dict)
    schedule: list[float] = dataclasses.field(default_factory=list)

    @classmethod
    def from_optimizer(cls, optimizer: Any, run: dict[str, Any] | None = None, schedule: Sequence[float] = ()) -> Self:
        """
        Reads a live optimizer; nothing is measured and no device memory is read.

        Args:
            optimizer (`SGDSaI` or `SWAN`): The optimizer itself, without a wrapper.
            run (`dict`, *optional*): Facts of the run, plain values.
            schedule (`list[float]`, *optional*): As in [`ReportData`].

        Raises:
            `TypeError`: It is neither.
        """
        from ..optim.tensors import adamw_state_bytes, optimizer_state_bytes

        record = _record_of(optimizer)
        groups = getattr(optimizer, "per_tensor", optimizer).param_groups
        peak = [float(group.get("initial_lr", group["lr"])) for group in groups]
        return cls(
            optimizer=record.name,
            options=_options(record, groups[0]),
            learning_rate=max(peak),
            weight_decay=max(group["weight_decay"] for group in groups),
            gsnr_max=groups[0].get("gsnr_max", 0.0),
            **KINDS[record.rows].read(optimizer, peak),
            state_bytes=optimizer_state_bytes(optimizer),
            adamw_state_bytes=adamw_state_bytes(optimizer),
            run=dict(run or {}),
            versions=_versions(),
            schedule=list(schedule),
        )

    @property
    def kind(self) -> str:
        """What the rows are, a key of [`KINDS`]: as the optimizer's record says, else what the rows can be read as."""
        known = facts_of(self.optimizer)
        if known is not None:
            return str(known["rows"])
        return "scales" if self.tensors or not self.routes else "groups"

    @property
    def normalizer(self) -> float:
        """What g-SNR was divided by to give the scales; 1.0 with `normalize="none"`, and before the first step."""
        normalize = self.options.get("normalize", "none")
        if normalize == "max":
            return self.gsnr_max or 1.0
        settled = [row for row in self.tensors if row.status != "pending"]
        return settled[0].gsnr / settled[0].scale if normalize == "rms" and settled else 1.0

    @property
    def rows(self) -> Sequence[TensorRow | RouteRow]:
        """One row per trained tensor, of whichever kind."""
        return self.tensors or self.routes

    @property
    def settled(self) -> list[TensorRow]:
        """The rows with a scale: all that are not pending."""
        return [row for row in self.tensors if row.settled]

    @property
    def log_prefix(self) -> str:
        """What stands before the numbers of [`ReportData.summary`] in a log."""
        return KINDS[self.kind].log_prefix or self.optimizer.removesuffix("_layerwise")

    def by_status(self, status: str) -> list[TensorRow]:
        """The rows with that status."""
        return [row for row in self.tensors if row.status == status]

    def summary(self) -> dict[str, float]:
        """
        A few numbers for a log: tensors by status, minimum, median and maximum of scale, maximum of the ratio; of
        routes how many tensors and elements are whitened and how many go to Adam; else how many tensors and groups
        there are; and the bytes of the optimizer's state.
        """
        return KINDS[self.kind].summary(self)

    def drift(self) -> list[dict[str, Any]]:
        """
        How g-SNR changed, one entry per tracked step: the smallest, median and largest ratio to the first measurement
        over the tensors, and the median by kind of tensor. A step in which no tensor could be compared is left out.
        """
        first = {row.name: row for row in self.tensors if row.status in ("measured", "given")}
        entries = []
        for measured in self.history:
            ratios = {name: gsnr / first[name].gsnr for name, gsnr in measured["gsnr"].items() if name in first}
            if not ratios:
                continue
            kinds: dict[str, list[float]] = {}
            for name, ratio in ratios.items():
                kinds.setdefault(first[name].kind, []).append(ratio)
            entries.append(
                {
                    "step": measured["step"],
                    "min": min(ratios.values()),
                    "median": median(ratios.values()),
                    "max": max(ratios.values()),
                    "kinds": {kind: median(values) for kind, values in kinds.items()},
                }
            )
        return entries

    def learning_rate_range(self, rows: Sequence[TensorRow]) -> tuple[float, float] | None:
        """Lowest and highest learning rate of some tensors, schedule included; `None` while all pend."""
        peaks = [row.learning_rate for row in rows if row.settled]
        low, high = self.schedule if len(self.schedule) == 2 else (1.0, 1.0)
        return (min(peaks) * low, max(peaks) * high) if peaks else None

    def by_kind(self) -> list[dict[str, Any]]:
        """
        One entry per kind of tensor: number, shape, steps, status, and over the tensors that are not pending medians
        of scale, ratio, learning rate, first update and what it moved the weights by (0.0 where not known), and the
        range of the learning rate ([`ReportData.learning_rate_range`]).
        """
        return [{"kind": kind, **self._entry(rows)} for kind, rows in grouped(self.tensors, "kind").items()]

    def by_layer(self) -> list[dict[str, Any]]:
        """One entry per layer, with the same fields; what stands outside the blocks has the layer `None`, first."""
        layers = grouped(self.tensors, "layer")
        return [{"layer": layer, **self._entry(layers[layer])} for layer in layers_of(self.tensors)]

    def _entry(self, rows: list[TensorRow]) -> dict[str, Any]:
        settled = [row for row in rows if row.settled]
        return {
            "tensors": len(rows),
            "shape": shape_of(rows),
            "scale": median(row.scale for row in settled),
            "ratio": median(row.gsnr_over_sqrt_numel for row in settled),
            "learning_rate": median(row.learning_rate for row in settled),
            "learning_rate_range": self.learning_rate_range(rows),
            "update_rms": median(row.update_rms for row in settled if row.update_rms),
            "moved": median(row.moved for row in settled if row.moved),
            "steps": sorted({row.step for row in settled}),
            "status": ", ".join(sorted({row.status for row in rows})),
        }

    def by_route(self) -> list[dict[str, Any]]:
        """One entry per kind of tensor, route and reason: number, shape and elements."""
        kinds: dict[tuple[str, str, str], list[RouteRow]] = {}
        for row in self.routes:
            kinds.setdefault((row.kind, row.route, row.reason), []).append(row)
        return [
            {
                "kind": kind,
                "route": route,
                "reason": reason,
                "tensors": len(rows),
                "shape": shape_of(rows),
                "numel": sum(row.numel for row in rows),
            }
            for (kind, route, reason), rows in kinds.items()
        ]

    def to_json(self) -> str:
        """The report as JSON; [`ReportData.from_json`] gives an equal one."""
        content = {"schema": SCHEMA, **dataclasses.asdict(self), "tensors": [], "routes": []}
        text = json.dumps(content, indent=1, allow_nan=False)
        for field, rows in (("tensors", self.tensors), ("routes", self.routes)):  # one line per tensor
            lines = ",\n  ".join(json.dumps(dataclasses.asdict(row), allow_nan=False) for row in rows)
            text = text.replace(f'"{field}": []', f'"{field}": [\n  {lines}\n ]' if rows else f'"{field}": []', 1)
        return text + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """
        The report that [`ReportData.to_json`] wrote.

        Raises:
            `ReportError`: It is not JSON, is larger than any report, has another schema, or a field is missing, of
                another type or out of its range.
        """
        fields = schema.parse(text)
        for field, row_class in (("tensors", TensorRow), ("routes", RouteRow)):
            fields[field] = schema.rows(row_class, fields.get(field), field)
        schema.check_history(fields.get("history"))
        report: Self = schema.build(cls, fields)
        return report


def _record_of(optimizer: Any) -> OptimizerRecord:
    from ..optim.registry import record_of

    record = record_of(optimizer)
    if record is not None:
        return record
    raise TypeError(
        f"a g-SNR report needs an optimizer of hf_sai but got {type(optimizer).__name__}; pass SGDSaI or SWAN itself"
    )


def _options(record: OptimizerRecord, group: dict[str, Any]) -> dict[str, Any]:
    """What a group holds of the record's options, and the modules that the run was limited to."""
    found = {option.name: _plain(group[option.name]) for option in record.options if option.name in group}
    targets = group.get("target_modules")
    return found if targets is None else {**found, "target_modules": _plain(targets)}


def _plain(value: Any) -> Any:
    """As JSON gives it back."""
    return list(value) if isinstance(value, tuple) else value


@dataclasses.dataclass(frozen=True)
class Kind:
    """One kind of rows; a record names it by its key in [`KINDS`], and [`hf_sai.report.facts`] has its words."""

    read: Callable[[Any, list[float]], dict[str, list[Any]]]  # of an optimizer with its groups' peak learning rates
    summary: Callable[[ReportData], dict[str, float]]  # for a log
    log_prefix: str = ""  # before these numbers; the optimizer's name where it is empty


def _read_scales(optimizer: Any, peaks: list[float]) -> dict[str, list[Any]]:
    statistics = optimizer.gsnr_statistics()
    lists = lists_in(each.name for each in statistics)
    return {"tensors": [tensor_row(each, peaks[each.group], lists) for each in statistics], "routes": []}


def _read_routes(optimizer: Any, peaks: list[float]) -> dict[str, list[Any]]:
    routes = optimizer.routes()
    lists = lists_in(each.name for each in routes)
    rows = [route_row(each.name, each.param, each.route, each.reason, lists) for each in routes]
    return {"tensors": [], "routes": rows}


def _read_groups(optimizer: Any, peaks: list[float]) -> dict[str, list[Any]]:
    """Of an optimizer that says nothing of its tensors: each with its group's learning rate and options."""
    names = ["weight_decay", *(option.name for option in _record_of(optimizer).options)]
    rows = []
    lists = lists_in(name for group in optimizer.param_groups for name in group.get("param_names") or ())
    for index, group in enumerate(optimizer.param_groups):
        options = {name: group[name] for name in names if name in group}
        reason = ", ".join(f"{name}={value}" for name, value in {"lr": peaks[index], **options}.items())
        params = zip(
            group.get("param_names") or [f"group{index}.{i}" for i in range(len(group["params"]))],
            group["params"],
            strict=True,
        )
        rows += [
            route_row(name, param, f"group {index}", reason, lists) for name, param in params if param.requires_grad
        ]
    return {"tensors": [], "routes": rows}


def _sum_scales(report: ReportData) -> dict[str, float]:
    counts = {status: float(len(report.by_status(status))) for status in STATUSES}
    scales = [row.scale for row in report.settled]
    if not scales:
        return counts
    return {
        **counts,
        "scale_min": min(scales),
        "scale_median": median(scales),
        "scale_max": max(scales),
        "ratio_max": max(row.gsnr_over_sqrt_numel for row in report.settled),
        "state_bytes": float(report.state_bytes),
    }


def _sum_routes(report: ReportData) -> dict[str, float]:
    adam = [row.numel for row in report.routes if row.route == ADAM]
    elements = sum(row.numel for row in report.routes)
    return {
        "whitened": float(len(report.routes) - len(adam)),
        "adam": float(len(adam)),
        "whitened_share": 1.0 - sum(adam) / elements if elements else 0.0,
        "state_bytes": float(report.state_bytes),
    }


def _sum_groups(report: ReportData) -> dict[str, float]:
    groups = {row.route for row in report.routes}
    counts = {"tensors": len(report.routes), "groups": len(groups), "state_bytes": report.state_bytes}
    return {name: float(count) for name, count in counts.items()}


KINDS = {
    "scales": Kind(_read_scales, _sum_scales, "gsnr"),
    "routes": Kind(_read_routes, _sum_routes),
    "groups": Kind(_read_groups, _sum_groups),
}


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in ("hf_sai", "torch", "transformers", "peft", "trl"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
