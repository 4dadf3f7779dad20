"""
Another optimizer for a script that builds `torch.optim.AdamW` itself, as diffusers' training scripts do.

All of them look the name up in `torch.optim` when they build it, so a class put there before they start reaches them.
What this can't reach (an optimizer of another library, a name that was imported before) is stopped at its first step.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook, register_optimizer_step_pre_hook


Group = dict[str, Any]

_MODULES = ("torch.optim", "torch.optim.adamw")  # both hold the class under the name AdamW
_SIGNATURE = inspect.signature(torch.optim.AdamW)
_SHARED = ("lr", "weight_decay", "maximize")  # mean the same in every optimizer
ADAM_ARGUMENTS = tuple(name for name in _SIGNATURE.parameters if name not in ("params", *_SHARED))


class ForeignOptimizerError(ValueError, RuntimeError):
    """A script steps an optimizer that was not put there for it."""


@dataclass(frozen=True)
class _Plan:
    options: Mapping[str, Any]
    uses: tuple[str, ...]
    prepare: Callable[[list[Group]], list[Group]]
    on_build: Callable[[Optimizer, list[str]], None]


def stand_in_for_adamw(
    cls: type[Optimizer],
    options: Mapping[str, Any] | None = None,
    *,
    uses: Iterable[str] = (),
    prepare: Callable[[list[Group]], list[Group]] | None = None,
    on_build: Callable[[Optimizer, list[str]], None] | None = None,
) -> type[Optimizer]:
    """
    A subclass of an optimizer that is built with `torch.optim.AdamW`'s arguments.

    Groups keep their order, their number and their own `lr` and `weight_decay`. Where the script gives no `lr`, the
    default is that of `cls`; where it gives no `weight_decay`, that of AdamW, which the script counts on.

    Args:
        cls (`type`): The optimizer; its constructor takes `params`, `lr`, `weight_decay` and `options`.
        options (mapping, *optional*): Keyword arguments for `cls`; they go before what the script gives.
        uses (iterable of `str`, *optional*): AdamW's arguments that `cls` takes in the same sense, such as `"betas"`.
            The others are dropped, from the groups as well.
        prepare (callable, *optional*): From the groups to the groups that `cls` gets, such as with keys added.
        on_build (callable, *optional*): Called with each new optimizer and the names of the dropped arguments.

    Returns:
        `type`: A real class, so that `isinstance(optimizer, torch.optim.AdamW)` holds while it stands there.

    Example:

    ```python
    with replaced_adamw(stand_in_for_adamw(torch.optim.SGD, {"momentum": 0.9})):
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, betas=(0.9, 0.95))
    ```
    """
    nothing: Callable[..., None] = lambda optimizer, unused: None  # noqa: E731
    plan = _Plan(dict(options or {}), tuple(uses), prepare or list, on_build or nothing)
    fields = {"_plan": plan, "__module__": cls.__module__, "__doc__": cls.__doc__, "__signature__": _SIGNATURE}
    return type(cls.__name__, (_AdamWArguments, cls), fields)


class _AdamWArguments:
    """Put before an optimizer: takes AdamW's arguments and hands on those that it knows."""

    _plan: ClassVar[_Plan]
    _building = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        plan = self._plan
        given = _SIGNATURE.bind(*args, **kwargs).arguments
        params = given.pop("params")
        unused = {name for name in ADAM_ARGUMENTS if name in given and name not in plan.uses}
        taken = {name: _plain(value) for name, value in given.items() if name not in unused}
        taken.setdefault("weight_decay", _SIGNATURE.parameters["weight_decay"].default)
        groups = _as_groups(params)
        if isinstance(groups, list):
            unused.update(name for group in groups for name in group if name in _foreign(plan))
            groups = plan.prepare(groups)
        self._building = True
        super().__init__(groups, **{**taken, **plan.options})  # type: ignore[call-arg]
        self._building = False
        plan.on_build(self, sorted(unused))  # type: ignore[arg-type]

    def add_param_group(self, param_group: Group) -> None:
        """As the optimizer's own; what only Adam knows is dropped, since a name such as `eps` may mean another."""
        if not self._building:
            (param_group,) = self._plan.prepare(_as_groups([param_group]))
        kept = {key: value for key, value in param_group.items() if key not in _foreign(self._plan)}
        super().add_param_group(kept)  # type: ignore[misc]


def _foreign(plan: _Plan) -> set[str]:
    return set(ADAM_ARGUMENTS) - set(plan.uses)


def _plain(value: Any) -> Any:
    """A learning rate or a beta as a number: AdamW takes tensors of one element too."""
    if isinstance(value, Tensor):
        return value.item()
    return tuple(_plain(item) for item in value) if isinstance(value, (tuple, list)) else value


def _as_groups(params: Any) -> Any:
    """`params` as a list of new group dicts; what torch refuses is handed on for it to refuse."""
    if isinstance(params, (Tensor, set, Mapping)):
        return params
    entries = list(params)
    if not entries or not isinstance(entries[0], dict):
        return [{"params": entries}] if entries else entries
    for entry in entries:
        if not isinstance(entry, dict) or isinstance(entry.get("params"), (set, type(None))):
            return entries
    return [{**entry, "params": _listed(entry["params"])} for entry in entries]


def _listed(params: Any) -> list[Any]:
    return [params] if isinstance(params, Tensor) else list(params)


@contextlib.contextmanager
def replaced_adamw(stand_in: type[Optimizer]) -> Iterator[None]:
    """
    While it is open, `torch.optim.AdamW` is another class, under both of its names.

    Args:
        stand_in (`type`): What [`stand_in_for_adamw`] gives.
    """
    modules = [importlib.import_module(name) for name in _MODULES]
    before = [module.__dict__["AdamW"] for module in modules]
    for module in modules:
        module.__dict__["AdamW"] = stand_in
    try:
        yield
    finally:
        for module, cls in zip(modules, before, strict=True):
            module.__dict__["AdamW"] = cls


@contextlib.contextmanager
def guarded_steps(
    accepts: Callable[[Optimizer], bool],
    refusal: Callable[[Optimizer], str],
    after: Callable[[Optimizer], None] | None = None,
) -> Iterator[dict[type[Optimizer], int]]:
    """
    While it is open, the first step of an optimizer that is not accepted is an error.

    An optimizer that does not derive from torch's, or that is stepped by another (as DeepSpeed does), is not seen.

    Args:
        accepts (callable): From an optimizer, without accelerate's wrapper, to whether it may step.
        refusal (callable): From one that may not to the message of the error.
        after (callable, *optional*): Called with an accepted one after each of its steps.

    Yields:
        `dict[type, int]`: How many steps the accepted optimizers have begun, by class.

    Raises:
        `ForeignOptimizerError`: In the optimizer's `step()`.
    """
    stepped: dict[type[Optimizer], int] = {}

    def check(optimizer: Any, args: Any, kwargs: Any) -> None:
        optimizer = unwrapped(optimizer)
        if _has_another_step(type(optimizer)) or not accepts(optimizer):
            raise ForeignOptimizerError(refusal(optimizer))
        stepped[type(optimizer)] = stepped.get(type(optimizer), 0) + 1

    def done(optimizer: Any, args: Any, kwargs: Any) -> None:
        if after is not None:
            after(unwrapped(optimizer))

    handles = [register_optimizer_step_pre_hook(check), register_optimizer_step_post_hook(done)]
    try:
        yield stepped
    finally:
        for handle in handles:
            handle.remove()


def unwrapped(optimizer: Any) -> Any:
    """The optimizer inside accelerate's wrapper, DeepSpeed's, and any other that keeps it as `.optimizer`."""
    inner = optimizer
    while (inner := getattr(inner, "optimizer", None)) is not None:
        if isinstance(inner, Optimizer):
            optimizer = inner
    return optimizer


def _has_another_step(cls: type) -> bool:
    """Whether a library derived from the stand-in, taking it for AdamW, and computes its own updates."""
    if not issubclass(cls, _AdamWArguments):
        return False
    start = cls.__mro__.index(_AdamWArguments)
    own = next(vars(each)["step"] for each in cls.__mro__[start:] if "step" in vars(each))
    # Torch wraps the step of the class that is built first, so what it wraps is compared.
    later = [vars(each)["step"] for each in cls.__mro__[: start - 1] if "step" in vars(each)]
    return any(inspect.unwrap(step) is not inspect.unwrap(own) for step in later)


def named_modules_of(params: Iterable[Tensor]) -> nn.ModuleDict:
    """
    The [`root_modules`] of some parameters, each under the name of its class, with a number from the second on.

    Args:
        params (iterable of `torch.Tensor`): As the optimizer gets them.

    Returns:
        `torch.nn.ModuleDict`: Such as `{"UNet2DConditionModel": ..., "CLIPTextModel": ..., "CLIPTextModel_2": ...}`.
    """
    found = nn.ModuleDict()
    for module in root_modules(params):
        name = type(module).__name__
        count = sum(re.fullmatch(rf"{name}(_\d+)?", each) is not None for each in found)
        found[f"{name}_{count + 1}" if count else name] = module
    return found


def root_modules(params: Iterable[Tensor]) -> list[nn.Module]:
    """
    The outermost live modules that hold any of these parameters.

    A script hands bare tensors to its optimizer; what kind of layer each belongs to is known only to the modules,
    which are found among all objects of the process. Takes some tenths of a second.

    Args:
        params (iterable of `torch.Tensor`): As the optimizer gets them.

    Returns:
        `list[torch.nn.Module]`: Each once.
    """
    wanted = set(params)
    parents: dict[int, list[nn.Module]] = {}
    reached: dict[int, nn.Module] = {}
    for thing in gc.get_objects():
        if not issubclass(type(thing), nn.Module):  # isinstance would ask proxies for their class
            continue
        fields = vars(thing)
        for child in fields.get("_modules", {}).values():
            parents.setdefault(id(child), []).append(thing)
        if any(param is not None and param in wanted for param in fields.get("_parameters", {}).values()):
            reached[id(thing)] = thing
    pending, roots = list(reached.values()), []
    while pending:
        module = pending.pop(0)
        above = parents.get(id(module), [])
        if not above:
            roots.append(module)
        for parent in above:
            if id(parent) not in reached:
                reached[id(parent)] = parent
                pending.append(parent)
    return roots
