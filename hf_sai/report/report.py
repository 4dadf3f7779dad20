"""The report of a run as data: one row per tensor, the options that ran, and a JSON file with a schema number."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import write_whole
from . import schema
from .schema import SCHEMA, STATUSES, ReportError


if TYPE_CHECKING:  # a report is read and shown without torch and without the Hub's client
    from huggingface_hub import CommitInfo

    from ..optim.registry import OptimizerRecord
    from ..optim.routing import Route
    from .compare import ReportDiff

ADAM = "adam"  # as `hf_sai.optim.routing` writes it; a test holds the two together

REPORT_JSON = "gsnr_report.json"
REPORT_PNG = "gsnr_report.png"
HISTORY_PNG = "gsnr_history.png"

_WRAPPER_PREFIXES = ("module.", "_orig_mod.", "base_model.model.")


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
        learning_rate (`float`): Peak learning rate of its group times `scale`.
        step (`int`): Optimizer step of its first informative gradient, from 1; 0 while pending.
        status (`str`): `"measured"`, `"fallback"`, `"given"` or `"pending"`.
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


@dataclasses.dataclass(frozen=True)
class RouteRow:
    """
    Where SWAN took one tensor.

    Args:
        name (`str`): The parameter's name in the model.
        kind (`str`): As in [`TensorRow`].
        layer (`int` or `None`): As in [`TensorRow`].
        shape (`tuple[int, ...]`): Shape.
        numel (`int`): Number of elements.
        route (`str`): `"adam"`, or how it was read as matrices and whitened: `"matrix"`, `"matrix, transposed"`, ...
        reason (`str`): Why.
    """

    name: str
    kind: str
    layer: int | None
    shape: tuple[int, ...]
    numel: int
    route: str
    reason: str


@dataclasses.dataclass(frozen=True)
class GSNRReport:
    """
    What SGD-SaI measured in a run, or how SWAN routed it. Holds no path, no command line, no environment variable.

    Args:
        optimizer (`str`): Registered name, such as `"sgd_sai"`.
        options (`dict`): The options that ran, typed: `momentum`, `eps`, `normalize`, ...
        learning_rate (`float`): Peak learning rate, the largest of the groups.
        weight_decay (`float`): The largest of the groups.
        gsnr_max (`float`): Largest g-SNR of the model, as fixed by the first measuring step; 0.0 before.
        tensors (`list[TensorRow]`): One row per trained tensor; none for SWAN.
        routes (`list[RouteRow]`): One row per trained tensor; none for SGD-SaI.
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
    def from_optimizer(
        cls, optimizer: Any, run: dict[str, Any] | None = None, schedule: Sequence[float] = ()
    ) -> GSNRReport:
        """
        Reads a live optimizer; nothing is measured and no device memory is read.

        Args:
            optimizer (`SGDSaI` or `SWAN`): The optimizer itself, without a wrapper.
            run (`dict`, *optional*): Facts of the run, plain values.
            schedule (`list[float]`, *optional*): As in [`GSNRReport`].

        Raises:
            `TypeError`: It is neither.
        """
        record = _record_of(optimizer)
        groups = optimizer.param_groups
        peak = [float(group.get("initial_lr", group["lr"])) for group in groups]
        return cls(
            optimizer=record.name,
            options={
                option.name: _plain(groups[0][option.name]) for option in record.options if option.name in groups[0]
            },
            learning_rate=max(peak),
            weight_decay=max(group["weight_decay"] for group in groups),
            gsnr_max=groups[0].get("gsnr_max", 0.0),
            tensors=[] if record.routed else [_row(each, peak[each.group]) for each in optimizer.gsnr_statistics()],
            routes=[_route_row(each) for each in optimizer.routes()] if record.routed else [],
            state_bytes=optimizer_state_bytes(optimizer),
            adamw_state_bytes=_adamw_state_bytes(groups),
            run=dict(run or {}),
            versions=_versions(),
            schedule=list(schedule),
        )

    def by_status(self, status: str) -> list[TensorRow]:
        """The rows with that status."""
        return [row for row in self.tensors if row.status == status]

    def summary(self) -> dict[str, float]:
        """
        A few numbers for a log: tensors by status, minimum, median and maximum of scale, maximum of the ratio; of SWAN
        how many tensors and elements are whitened and how many go to Adam; and the bytes of the optimizer's state.
        """
        if self.routes:
            adam = [row.numel for row in self.routes if row.route == ADAM]
            elements = sum(row.numel for row in self.routes)
            return {
                "whitened": float(len(self.routes) - len(adam)),
                "adam": float(len(adam)),
                "whitened_share": 1.0 - sum(adam) / elements if elements else 0.0,
                "state_bytes": float(self.state_bytes),
            }
        counts = {f"{status}": float(len(self.by_status(status))) for status in STATUSES}
        settled = [row for row in self.tensors if row.status != "pending"]
        if not settled:
            return counts
        scales = [row.scale for row in settled]
        return {
            **counts,
            "scale_min": min(scales),
            "scale_median": _median(scales),
            "scale_max": max(scales),
            "ratio_max": max(row.gsnr_over_sqrt_numel for row in settled),
            "state_bytes": float(self.state_bytes),
        }

    def drift(self) -> list[dict[str, Any]]:
        """
        How g-SNR changed, one entry per tracked step: the smallest, median and largest ratio to the first measurement
        over the tensors, and the median by kind of tensor.
        """
        first = {row.name: row for row in self.tensors if row.status in ("measured", "given")}
        entries = []
        for measured in self.history:
            ratios = {name: gsnr / first[name].gsnr for name, gsnr in measured["gsnr"].items() if name in first}
            kinds: dict[str, list[float]] = {}
            for name, ratio in ratios.items():
                kinds.setdefault(first[name].kind, []).append(ratio)
            entries.append(
                {
                    "step": measured["step"],
                    "min": min(ratios.values(), default=0.0),
                    "median": _median(ratios.values()),
                    "max": max(ratios.values(), default=0.0),
                    "kinds": {kind: _median(values) for kind, values in kinds.items()},
                }
            )
        return entries

    def learning_rate_range(self, rows: Sequence[TensorRow]) -> tuple[float, float] | None:
        """Lowest and highest learning rate of some tensors, scale and schedule included; `None` while all pend."""
        peaks = [row.learning_rate for row in rows if row.status != "pending"]
        low, high = self.schedule if len(self.schedule) == 2 else (1.0, 1.0)
        return (min(peaks) * low, max(peaks) * high) if peaks else None

    def by_kind(self) -> list[dict[str, Any]]:
        """
        One entry per kind of tensor: number, shape, steps, status, medians of scale, ratio and learning rate over the
        tensors that are not pending, and the range of the learning rate ([`GSNRReport.learning_rate_range`]).
        """
        return [{"kind": kind, **self._entry(rows)} for kind, rows in _grouped(self.tensors, "kind").items()]

    def by_layer(self) -> list[dict[str, Any]]:
        """One entry per layer, with the same fields; what stands outside the blocks has the layer `None`, first."""
        layers = _grouped(self.tensors, "layer")
        ordered = sorted(layers, key=lambda layer: -1 if layer is None else layer)
        return [{"layer": layer, **self._entry(layers[layer])} for layer in ordered]

    def _entry(self, rows: list[TensorRow]) -> dict[str, Any]:
        settled = [row for row in rows if row.status != "pending"]
        return {
            "tensors": len(rows),
            "shape": _shape_of(rows),
            "scale": _median(row.scale for row in settled),
            "ratio": _median(row.gsnr_over_sqrt_numel for row in settled),
            "learning_rate": _median(row.learning_rate for row in settled),
            "learning_rate_range": self.learning_rate_range(rows),
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
                "shape": _shape_of(rows),
                "numel": sum(row.numel for row in rows),
            }
            for (kind, route, reason), rows in kinds.items()
        ]

    def to_text(self) -> str:
        """A plain table by kind of tensor, for a terminal of 80 columns."""
        from .terminal import plain_text

        return plain_text(self)

    def to_markdown(self) -> str:
        """Facts, and a table by kind of tensor and by layer, or of SWAN's routes."""
        from .markdown import report_markdown

        return report_markdown(self)

    def to_html(self) -> str:
        """A page that needs no network: facts, pictures with details, and a table of all tensors to sort."""
        from .html import report_html

        return report_html(self)

    def plot(self) -> Any:
        """
        The picture as a `matplotlib.figure.Figure`, which a notebook shows and `savefig` writes.

        Raises:
            `ImportError`: matplotlib is not installed.
        """
        from .plots import report_figure

        return report_figure(self)

    def diff(self, other: GSNRReport) -> ReportDiff:
        """
        Compares with the report of another run, tensor by tensor.

        Args:
            other (`GSNRReport`): Of the run whose scales are divided by those of this one.

        Raises:
            `ReportError`: One of them is of SWAN, which has no scales.
        """
        from .compare import compare

        return compare(self, other)

    def save(self, directory: str | os.PathLike[str], picture: bool = True) -> Path:
        """
        Writes `gsnr_report.json`, and where matplotlib is installed `gsnr_report.png` (of g-SNR tracked over time
        `gsnr_history.png` too); each whole or not at all. A `gsnr_history.png` of an earlier run is removed.

        Args:
            directory (`str` or path): Made where it is missing.
            picture (`bool`, *optional*, defaults to `True`): Whether to draw.

        Returns:
            `pathlib.Path`: The JSON file.
        """
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / REPORT_JSON
        write_whole(path, self.to_json().encode("utf-8"))
        if picture and importlib.util.find_spec("matplotlib") is not None:
            from .plots import history_png, report_png

            write_whole(folder / REPORT_PNG, report_png(self))
            if self.history:
                write_whole(folder / HISTORY_PNG, history_png(self))
        if not self.history:
            (folder / HISTORY_PNG).unlink(missing_ok=True)
        return path

    def to_json(self) -> str:
        """The report as JSON; [`GSNRReport.from_json`] gives an equal one."""
        content = {"schema": SCHEMA, **dataclasses.asdict(self), "tensors": [], "routes": []}
        text = json.dumps(content, indent=1, allow_nan=False)
        for field, rows in (("tensors", self.tensors), ("routes", self.routes)):  # one line per tensor
            lines = ",\n  ".join(json.dumps(dataclasses.asdict(row), allow_nan=False) for row in rows)
            text = text.replace(f'"{field}": []', f'"{field}": [\n  {lines}\n ]' if rows else f'"{field}": []', 1)
        return text + "\n"

    @classmethod
    def from_json(cls, text: str) -> GSNRReport:
        """
        The report that [`GSNRReport.to_json`] wrote.

        Raises:
            `ReportError`: It is not JSON, is larger than any report, has another schema, or a field is missing, of
                another type or out of its range.
        """
        fields = schema.parse(text)
        for field, row_class in (("tensors", TensorRow), ("routes", RouteRow)):
            fields[field] = schema.rows(row_class, fields.get(field), field)
        schema.check_history(fields.get("history"))
        report: GSNRReport = schema.build(cls, fields)
        return report

    @classmethod
    def from_pretrained(
        cls, repo_id_or_path: str | os.PathLike[str], revision: str | None = None, token: str | bool | None = None
    ) -> GSNRReport:
        """
        The report of a run: a file or folder here, else a repository of the Hub.

        Args:
            repo_id_or_path (`str` or path): Such as `"user/repo"`.
            revision (`str`, *optional*): Branch, tag or commit of the repository.
            token (`str` or `bool`, *optional*): As in `huggingface_hub`; defaults to the one that is logged in.

        Raises:
            `ReportError`: There is no report, or it can't be read.
        """
        if Path(repo_id_or_path).exists():
            return cls.load(repo_id_or_path)
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError

        try:
            file = hf_hub_download(str(repo_id_or_path), REPORT_JSON, revision=revision, token=token)
        except (HfHubHTTPError, HFValidationError, EntryNotFoundError, OSError) as error:
            reason = " ".join(str(error).split())  # whole: the advice on private and gated ones comes last
            raise ReportError(
                f"a g-SNR report must be a file, a folder or a Hub repository with {REPORT_JSON}, but "
                f"{repo_id_or_path!s} gave {type(error).__name__}: {reason}"
            ) from None
        return cls.load(file)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        token: str | bool | None = None,
        commit_message: str = "g-SNR report",
    ) -> CommitInfo:
        """
        Uploads the report and its picture in one commit; [`hf_sai.hub.push.push_folder`] takes model and card along.

        Args:
            repo_id (`str`): Such as `"user/repo"`; without a user it is the token's.
            private (`bool`, *optional*): Visibility where the repository has to be made; else it keeps its own.
            revision (`str`, *optional*): Branch, made where it is missing; defaults to `main`.
            create_pr (`bool`, *optional*, defaults to `False`): Whether to open a pull request instead.
            token (`str` or `bool`, *optional*): As in `huggingface_hub`; defaults to the one that is logged in.
            commit_message (`str`, *optional*): Of the commit.

        Returns:
            `huggingface_hub.CommitInfo`: Of the commit.

        Raises:
            `UploadError`: It did not work out.
        """
        from ..upload import Destination, upload

        with tempfile.TemporaryDirectory() as folder:
            self.save(folder)
            files = {path.name: path for path in Path(folder).iterdir()}
            destination = Destination(repo_id, private, revision, create_pr, token)
            return upload(files, destination, commit_message)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> GSNRReport:
        """
        Reads a report.

        Args:
            path (`str` or path): The JSON file, or the folder that holds it.

        Raises:
            `ReportError`: It can't be read.
        """
        file = Path(path)
        file = file / REPORT_JSON if file.is_dir() else file
        return cls.from_json(schema.read_text(file))


def split_name(name: str) -> tuple[str, int | None]:
    """
    Kind and layer of a parameter's name.

    `base_model.model.model.layers.3.self_attn.q_proj.lora_A.default.weight` gives `("self_attn.q_proj.lora_A", 3)`.
    """
    for prefix in _WRAPPER_PREFIXES:
        name = name.removeprefix(prefix)
    parts = name.split(".")
    layer = next((index for index, part in enumerate(parts) if part.isdigit()), None)
    rest = parts if layer is None else parts[layer + 1 :]
    if layer is not None and not any(not part.isdigit() and part not in ("weight", "bias") for part in rest):
        rest, layer = parts, None  # a bare nn.Sequential: the number is all there is
    if rest[-1] == "weight" and len(rest) > 1:
        rest = rest[:-1]
    rest = [part for part in rest if part != "default"] or rest  # the adapter's name, where it is PEFT's default
    if layer is None:
        rest = rest[-2:] if rest[-1] == "bias" or rest[-1].startswith("lora_") else rest[-1:]
    return ".".join(rest), None if layer is None else int(parts[layer])


def _record_of(optimizer: Any) -> OptimizerRecord:
    from ..optim.registry import record_of

    record = record_of(optimizer)
    if record is not None:
        return record
    raise TypeError(
        f"a g-SNR report needs an optimizer of hf_sai but got {type(optimizer).__name__}; pass SGDSaI or SWAN itself"
    )


def _plain(value: Any) -> Any:
    """As JSON gives it back."""
    return list(value) if isinstance(value, tuple) else value


def _route_row(route: Route) -> RouteRow:
    kind, layer = split_name(route.name)
    shape = tuple(route.param.shape)
    return RouteRow(route.name, kind, layer, shape, route.param.numel(), route.route, route.reason)


def _shape_of(rows: Sequence[TensorRow | RouteRow]) -> str:
    """The one that all have, or how many there are."""
    shapes = sorted({"x".join(map(str, row.shape)) or "scalar" for row in rows})
    return shapes[0] if len(shapes) == 1 else f"{len(shapes)} shapes"


def _row(statistics: Any, peak_learning_rate: float) -> TensorRow:
    kind, layer = split_name(statistics.name)
    return TensorRow(
        name=statistics.name,
        kind=kind,
        layer=layer,
        shape=statistics.shape,
        numel=statistics.numel,
        gsnr=statistics.gsnr,
        gsnr_over_sqrt_numel=statistics.gsnr / math.sqrt(statistics.numel) if statistics.numel else 0.0,
        scale=statistics.scale,
        learning_rate=peak_learning_rate * statistics.scale,
        step=statistics.step,
        status=statistics.status,
    )


def _grouped(rows: Iterable[TensorRow], field: str) -> dict[Any, list[TensorRow]]:
    groups: dict[Any, list[TensorRow]] = {}
    for row in rows:
        groups.setdefault(getattr(row, field), []).append(row)
    return groups


def _median(values: Iterable[float]) -> float:
    """The upper median; 0.0 of nothing."""
    ordered = sorted(values)
    return ordered[len(ordered) // 2] if ordered else 0.0


def scale_limits(rows: Iterable[TensorRow]) -> tuple[float, float]:
    """Ends of a scale of colours, in which small differences are not blown up to the whole range."""
    scales = [row.scale for row in rows if row.status != "pending"]
    low, high = (min(scales), max(scales)) if scales else (1.0, 1.0)
    spread = math.sqrt(max(1.0, 4.0 / (high / low)))
    return low / spread, high * spread


def mean_scale(rows: Sequence[TensorRow]) -> float:
    """Geometric mean over tensors that are not pending."""
    return math.exp(sum(math.log(row.scale) for row in rows) / len(rows))


def moved_most(drift: list[dict[str, Any]], count: int) -> list[str]:
    """The kinds of tensors whose g-SNR is furthest from its first measurement at the end."""
    last = drift[-1]["kinds"]
    return sorted(last, key=lambda kind: abs(math.log(last[kind] or 1.0)), reverse=True)[:count]


def format_bytes(count: int) -> str:
    """`1_500_000` as `1.5 MB`."""
    size = float(count)
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def optimizer_state_bytes(optimizer: Any) -> int:
    """Bytes of the tensors in the optimizer's state."""
    import torch

    return sum(
        value.numel() * value.element_size()
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    )


def _adamw_state_bytes(groups: Iterable[dict[str, Any]]) -> int:
    """Bytes of AdamW's two moments for the same tensors, in the parameters' dtype as torch keeps them."""
    return sum(
        2 * param.numel() * param.element_size()
        for group in groups
        for param in group["params"]
        if param.requires_grad
    )


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in ("hf_sai", "torch", "transformers", "peft", "trl"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
