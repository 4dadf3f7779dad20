"""The optimizers by name: one frozen record each, and typed parsing of their options."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch.optim.optimizer import Optimizer

from . import sgd_options, swan_options
from .base import name_writer
from .checks import none_is, one_of, or_none, to_bool, to_float, to_int, to_pair, to_source
from .groups import Group, plain_groups, sgd_sai_groups, swan_groups, swan_groups_of
from .gsnr import NORMALIZATIONS
from .layerwise import SGDSaILayerwise, SWANLayerwise
from .lora_pairs import PAIR_POLICIES
from .matrices import WHITENING_DTYPES
from .routing import LORA_POLICIES
from .sgd_sai import SGDSaI
from .swan import SWAN
from .whitening import METHODS


Watcher = Callable[["OptimizerRecord", bool], None]


class OptionError(ValueError):
    """An optimizer, an option or a value that is not known; the message lists those that are."""


@dataclass(frozen=True)
class Option:
    """
    One option of an optimizer, as it is typed in `optim_args`.

    Args:
        name (`str`): The constructor's argument.
        kind (`str`): What a value must be, as the error says it: `"a number"`, `"a whole number"`, `"true or false"`.
        parse (callable): Text or value to value; raises `ValueError` where it can't.
        help (`str`): One line for the command line.
        routing (`bool`): Whether it is an argument of [`hf_sai.param_groups`] and not of the constructor.
        aliases (`tuple[str, ...]`): Older names, which still work.
    """

    name: str
    kind: str
    parse: Callable[[Any], Any]
    help: str
    routing: bool = False
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True)
class OptimizerRecord:
    """
    All that a host needs to know of an optimizer; [`register_record`] adds one.

    Args:
        name (`str`): Lower case; what a user types after `optim=`.
        cls (`type`): The `torch.optim.Optimizer` subclass, of this record alone.
        description (`str`): One line.
        options (`tuple[Option, ...]`): Options besides `lr` and `weight_decay`, which hosts have fields for.
        paper (`str`): arXiv id.
        learning_rate_hint (`str`): What to set the learning rate to, in one sentence.
        layerwise (`bool`, *optional*, defaults to `False`): Whether it updates inside the backward pass.
        grouping (callable, *optional*): From a model, a weight decay, the names that decay, and the options that are
            marked `routing` (and `target_modules` with `targets`, where it has these arguments) to parameter groups,
            which hold what was chosen. Defaults to [`hf_sai.optim.groups.plain_groups`].
        needs_modules (`bool`, *optional*, defaults to `False`): Whether it has to have these groups, whatever the
            options. Otherwise groups that a host makes will do where no `routing` option is set.
        regroup (callable, *optional*): From groups of named tensors, the modules that hold them, and the options that
            are marked `routing` to groups, a number of tensors without a module, and a line for the terminal; for
            scripts that give no model. `None`: groups stay as they are, and these options are refused.
        host_settings (`tuple[str, ...]`, *optional*): Arguments of the constructor that the host's settings hold
            for: of Adam `"betas"` and `"eps"`; `"share_whitening"`, whether it runs under DDP.
        adam_rates (`bool`, *optional*, defaults to `False`): Whether learning rates are in AdamW's terms, so that its
            usual ones need no warning.
        pretrained_rates (`tuple[float, float]`, *optional*): Learning rates, from and to, that pretrained weights were
            found to take; one far above them is warned about. Empty: not known.
        saved_keys (`frozenset[str]`, *optional*): Keys of its groups that tell its state from those of others.
        rows (`str`): What a report shows of each tensor: `"scales"` (from `gsnr_statistics()`), `"routes"` (from
            `routes()`), or `"groups"`, which needs neither: the tensor's group with its options.
    """

    name: str
    cls: type[Optimizer]
    description: str
    options: tuple[Option, ...]
    paper: str
    learning_rate_hint: str
    layerwise: bool = False
    grouping: Callable[..., list[Group]] = plain_groups
    needs_modules: bool = False
    regroup: Callable[..., tuple[list[Group], int, str]] | None = None
    host_settings: tuple[str, ...] = ()
    adam_rates: bool = False
    pretrained_rates: tuple[float, ...] = ()
    saved_keys: frozenset[str] = frozenset()
    rows: str = "groups"

    @property
    def ordinary(self) -> str:
        """The name of the variant that is not layer-wise."""
        return self.name.removesuffix(_LAYERWISE)

    @functools.cached_property
    def facts(self) -> dict[str, Any]:
        """What can be said of it without torch: a row of [`hf_sai.optimizer_facts.optimizer_table`]."""
        options = []
        for option in self.options:
            try:
                default = self.default(option.name)
            except KeyError:  # a constructor that takes it among `**kwargs` says no default
                default = None
            plain = list(default) if isinstance(default, tuple) else default
            options.append({"name": option.name, "kind": option.kind, "help": option.help, "default": plain})
        return {"name": self.name, "description": self.description, "rows": self.rows, "options": options}

    def spelling(self, name: str) -> str:
        """The name of an option that is given by its name or an older one; any other as it is."""
        return next((option.name for option in self.options if name in option.aliases), name)

    def default(self, name: str) -> Any:
        """The default of an option, or of another argument of the constructor."""
        routing = any(option.name == name and option.routing for option in self.options)
        return inspect.signature(self.grouping if routing else self.cls).parameters[name].default

    def layer_wise(self, cls: type[Optimizer]) -> OptimizerRecord:
        """The record of the variant of that class, which updates inside the backward pass."""
        what = self.description.partition(":")[0]
        return dataclasses.replace(
            self,
            name=f"{self.name}{_LAYERWISE}",
            cls=cls,
            description=f"{what} that updates, and frees each gradient, inside the backward pass; one process",
            layerwise=True,
        )


_LAYERWISE = "_layerwise"

_SGD_SAI = OptimizerRecord(
    name="sgd_sai",
    cls=SGDSaI,
    description="SGD-SaI: momentum SGD, learning-rate scale per tensor measured once; half of AdamW's state",
    options=(
        Option("momentum", "a number", to_float, "decay of the momentum buffer, in [0, 1); 0 keeps none"),
        Option("eps", "a number", to_float, "added to the gradient's standard deviation"),
        Option("normalize", "none, max or rms", one_of(*NORMALIZATIONS), "divide g-SNR by its maximum, or by an RMS"),
        Option("measure_steps", "a whole number", to_int, "average g-SNR over this many first gradients"),
        Option("maximize", "true or false", to_bool, "ascend instead of descend"),
        Option("foreach", "true, false or none", or_none(to_bool), "update lists of tensors at once"),
        Option("fused", "true, false or none", or_none(to_bool), "one pass over memory; none chooses"),
        Option(
            "state_dtype",
            "float32, bfloat16 or none",
            or_none(one_of(*sgd_options.STATE_DTYPES)),
            "of the momentum buffer",
        ),
        Option("stochastic_rounding", "true or false", to_bool, "of bf16 parameters"),
        Option("kahan_sum", "true or false", to_bool, "keep what rounding of bf16 and fp16 parameters loses"),
        Option("gsnr", "a report: file, folder or Hub repository", to_source, "take scales, measure nothing"),
        Option(
            "lora_policy",
            " or ".join(PAIR_POLICIES),
            none_is("plain", one_of(*PAIR_POLICIES)),
            "LoRA factors as pairs",
            True,
        ),
    ),
    paper="2412.11768",
    learning_rate_hint=(
        "with normalize=none start at 1e-3 on pretrained weights (1e-4 to 1e-3; LoRA too, with lora_policy=paired), "
        "and at 1e-2 on random ones; with normalize=max, multiply by the largest g-SNR in the report; with "
        "normalize=rms, start at AdamW's"
    ),
    pretrained_rates=(1e-4, 1e-3),
    grouping=sgd_sai_groups,
    saved_keys=sgd_options.SAVED_KEYS,
    rows="scales",
)

_SWAN = OptimizerRecord(
    name="swan",
    cls=SWAN,
    description="SWAN: whitened gradients without state for the matrices in the blocks, Adam for the rest",
    options=(
        Option("whitening", " or ".join(METHODS), one_of(*METHODS), "how matrices are whitened"),
        Option("ns_steps", "a whole number or none", or_none(to_int), "of the iteration; none takes the method's own"),
        Option("ns_beta", "a number or none", or_none(to_float), "step size of newton_schulz and nsds"),
        Option("whitening_dtype", " or ".join(WHITENING_DTYPES), one_of(*WHITENING_DTYPES), "of the products"),
        Option("scale", "a number", to_float, "of the learning rate, for matrices"),
        Option("adam_lr_ratio", "a number", to_float, "of the learning rate, for what goes to Adam"),
        Option("betas", "two numbers, such as 0.9/0.999", to_pair, "Adam's"),
        Option("eps", "a number", to_float, "Adam's"),
        Option("momentum", "a number", to_float, "whiten a running mean, in [0, 1); 0 keeps none"),
        Option("maximize", "true or false", to_bool, "ascend instead of descend"),
        Option("stochastic_rounding", "true or false", to_bool, "of bf16 parameters"),
        Option("max_batch_bytes", "a whole number or none", or_none(to_int), "bound on whitening's extra memory"),
        Option("share_whitening", "true or false", to_bool, "over the ranks, under DDP; a trainer sets it there"),
        Option(
            "lora_whitening",
            " or ".join(LORA_POLICIES),
            one_of(*LORA_POLICIES),
            "LoRA factors to whiten (once lora_policy)",
            routing=True,
            aliases=("lora_policy",),
        ),
        Option("split_qkv", "true or false", to_bool, "whiten fused query, key and value one by one", True),
    ),
    paper="2412.13148",
    learning_rate_hint="start at the rate that is right for AdamW; for LoRA at a third of it",
    grouping=swan_groups,
    needs_modules=True,
    regroup=swan_groups_of,
    host_settings=("betas", "eps", "share_whitening"),  # the first two of the tensors that go to Adam
    adam_rates=True,
    saved_keys=swan_options.SAVED_KEYS,
    rows="routes",
)

_RECORDS: dict[str, OptimizerRecord] = {}
_watchers: list[Watcher] = []


def register_record(record: OptimizerRecord) -> None:
    """
    Adds an optimizer: to [`list_records`], and to every host that [`hf_sai.register`] serves.

    Args:
        record (`OptimizerRecord`): With a name and a class that no other record has.

    Raises:
        `OptionError`: The name or the class is taken.
        `ValueError`: A host has an optimizer of that name.

    Example:

    ```python
    register_record(OptimizerRecord("my_sgd", MySGD, "SGD, mine", (), "1609.04747", "start at 0.1"))
    TrainingArguments("out", optim="my_sgd", learning_rate=0.1)
    ```
    """
    for other in _RECORDS.values():
        if record.name == other.name or record.cls is other.cls:
            raise OptionError(
                f"a record must have a name and a class of its own, but {record.name} with {record.cls.__name__} is "
                f"beside {other.name} with {other.cls.__name__}; choose another, or call unregister_record first"
            )
    for watcher in _watchers:
        watcher(record, True)
    _RECORDS[record.name] = record
    if not record.layerwise:
        name_writer(record.cls.__name__, record.saved_keys)


def unregister_record(name: str) -> None:
    """
    Undoes [`register_record`].

    Raises:
        `OptionError`: No optimizer has that name.
    """
    record = get_record(name)
    del _RECORDS[name]
    if not record.layerwise:
        name_writer(record.cls.__name__, None)
    for watcher in _watchers:
        watcher(record, False)


def watch_records(watcher: Watcher, watching: bool = True) -> None:
    """
    Has `watcher(record, there)` called with each record that comes or goes from now on, or no longer.

    Args:
        watcher (callable): Called before a record comes (what it raises keeps it out), and after one went.
        watching (`bool`, *optional*, defaults to `True`): Whether to begin or to end.
    """
    if watcher in _watchers:
        _watchers.remove(watcher)
    if watching:
        _watchers.append(watcher)


for _record in (_SGD_SAI, _SGD_SAI.layer_wise(SGDSaILayerwise), _SWAN, _SWAN.layer_wise(SWANLayerwise)):
    register_record(_record)


def list_records() -> list[OptimizerRecord]:
    """All optimizers, by name."""
    return [_RECORDS[name] for name in sorted(_RECORDS)]


def get_record(name: str) -> OptimizerRecord:
    """
    The record of an optimizer.

    Args:
        name (`str`): Such as `"sgd_sai"`.

    Raises:
        `OptionError`: No optimizer has that name.
    """
    if name not in _RECORDS:
        raise OptionError(f"{name!r} is not an optimizer of hf_sai; choose one of: {', '.join(sorted(_RECORDS))}")
    return _RECORDS[name]


def record_of(optimizer: Optimizer) -> OptimizerRecord | None:
    """The record of a live optimizer's class, or of the nearest class that it derives from; `None` if not ours."""
    for cls in type(optimizer).__mro__:
        for record in _RECORDS.values():
            if record.cls is cls:
                return record
    return None


def parse_options(record: OptimizerRecord, given: Mapping[str, Any]) -> dict[str, Any]:
    """
    Options as typed values.

    Args:
        record (`OptimizerRecord`): The optimizer.
        given (mapping of `str` to text or value): As from `optim_args="momentum=0.9,normalize=max"`.

    Returns:
        `dict`: What was given, typed. Ranges are the constructor's to check.

    Raises:
        `OptionError`: An option is not known or its value can't be read.
    """
    known = {option.name: option for option in record.options}
    parsed: dict[str, Any] = {}
    for given_name, value in given.items():
        name = record.spelling(given_name)
        if name in ("lr", "learning_rate", "weight_decay"):
            field = "weight_decay" if name == "weight_decay" else "learning_rate"
            raise OptionError(f"{name} is not set through the options of {record.name}; set {field} itself")
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]}? " if close else ""
            raise OptionError(
                f"{name} is not an option of {record.name}; {hint}valid options: {', '.join(sorted(known))}"
            )
        if name in parsed:
            raise OptionError(f"{name} of {record.name} must be given once, but {given_name} is it too; leave one out")
        option = known[name]
        try:
            parsed[name] = option.parse(value)
        except (ValueError, KeyError, TypeError):
            raise OptionError(
                f"{given_name} of {record.name} must be {option.kind} but is {value!r}; "
                f"write for example {name}={record.default(name)}"
            ) from None
    return parsed


def split_routing(record: OptimizerRecord, options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """
    Typed options in two: the constructor's, and those that decide about groups.

    Of the latter a default asks for nothing, where the groups of a host will do: it is left out, and needs no model.
    """
    names = {option.name for option in record.options if option.routing}
    routing = {name: value for name, value in options.items() if name in names}
    if not record.needs_modules:
        routing = {name: value for name, value in routing.items() if value != record.default(name)}
    return {name: value for name, value in options.items() if name not in names}, routing
