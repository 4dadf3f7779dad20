"""What both optimizers have in common: the step with its closure, names, and warnings that name a tensor once."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, overload

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from .rounding import Rounding


logger = logging.getLogger(__name__)

# What tells whose a state is: keys that its groups have, the most telling first. Ours are added by their records.
_OURS: dict[str, frozenset[str]] = {}
_OTHERS = {
    "Prodigy": {"d_coef", "d_numerator"},
    "AdamW or Adam": {"betas", "amsgrad"},
    "SGD": {"nesterov", "dampening"},
}


def name_writer(name: str, keys: frozenset[str] | None) -> None:
    """Has [`check_writer`] know the groups that an optimizer of that name saves by these keys; `None` forgets it."""
    _OURS.pop(name, None)
    if keys:
        _OURS[name] = keys


def check_writer(name: str, state_dict: dict[str, Any]) -> None:
    """
    Checks that an optimizer of that name saved this state.

    Args:
        name (`str`): `"SGDSaI"` or `"SWAN"`.
        state_dict (`dict`): As `load_state_dict` gets it.

    Raises:
        `ValueError`: Another one did; it is named where it can be told.
    """
    groups = state_dict["param_groups"]
    foreign = [group for group in groups if not _OURS[name] <= set(group)]
    if not foreign:
        return
    group = foreign[0]
    writer = next((each for each, keys in (_OURS | _OTHERS).items() if keys <= set(group)), "another optimizer")
    if "decoupled_weight_decay" in group and writer == "AdamW or Adam":
        writer = "AdamW" if group["decoupled_weight_decay"] else "Adam"
    kept = ", ".join(sorted({str(key) for values in state_dict["state"].values() for key in values})) or "nothing"
    raise ValueError(
        f"{name} loads only state that {name} saved, but {writer} saved this one (it keeps {kept} per tensor); resume "
        f"with {writer}, or start without its checkpoint"
    )


class NamedOptimizer(Optimizer):
    """A `torch.optim.Optimizer` whose subclasses have `_advance()`, one update of all that has a gradient."""

    # What a group holds that goes on with the training, and is no option.
    _progress: ClassVar[tuple[str, ...]] = ("lr",)
    # What a grouping function chose. A checkpoint of before groups held it leaves the run's own.
    _chosen: ClassVar[tuple[str, ...]] = ()

    def __setstate__(self, state: dict[str, Any]) -> None:
        own_groups = self.__dict__.get("param_groups", [])
        super().__setstate__(state)
        for group, own in zip(self.param_groups, own_groups, strict=False):
            for key in self._chosen:
                group.setdefault(key, own[key])
        for group in self.param_groups:
            for key, value in self.defaults.items():
                if key != "differentiable":  # torch's own, which it adds to the defaults on the way
                    group.setdefault(key, value)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """
        One update.

        Args:
            closure (callable, *optional*): Recomputes the loss and the gradients, and returns the loss. Called once.

        Returns:
            `float` or `None`: What the closure returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._advance()
        return loss

    def _warn_of_other_options(self, saved_groups: list[dict[str, Any]]) -> None:
        """As in every torch optimizer the saved options replace those of the constructor; here not in silence."""
        names = [name for name in self.defaults if name not in self._progress]
        changed = {
            f"{name}={saved[name]} (not {group[name]})"
            for group, saved in zip(self.param_groups, saved_groups, strict=False)
            for name in names
            if name in saved and _as_list(saved[name]) != _as_list(group[name])
        }
        if changed:
            logger.warning("The loaded state goes on with its own options: %s.", ", ".join(sorted(changed)))

    def _advance(self) -> None:
        raise NotImplementedError

    @property
    def measurements(self) -> int:
        """How much there is to report, to be compared with a later answer: here, tensors with a state."""
        return len(self.state)

    def _rounding(self, group: dict[str, Any]) -> Rounding | None:
        """
        How the next tensors of a group are rounded. A group has `step`, `stochastic_rounding` and perhaps `kahan_sum`.

        The seeds of a step are the same on all ranks, which come here in the same order, and in a resumed run.
        """
        if not group["stochastic_rounding"]:
            return Rounding() if group.get("kahan_sum") else None
        step, count = self.__dict__.get("_noise", (-1, 0))
        count = count + 1 if step == group["step"] else 0
        self.__dict__["_noise"] = (group["step"], count)
        return Rounding(seed=group["step"] * 2**24 + count)

    def _params(self) -> Iterator[tuple[int, int, Tensor]]:
        """Group index, index in the group, tensor."""
        for group_index, group in enumerate(self.param_groups):
            for index, param in enumerate(group["params"]):
                yield group_index, index, param

    def _name(self, group_index: int, index: int) -> str:
        """The name that the group keeps, or `group0.3`."""
        names = self.param_groups[group_index].get("param_names")
        return names[index] if names else f"group{group_index}.{index}"

    def _with_names(self, params: Any) -> list[Any]:
        """
        The parameters of a new group, with names where the other groups have them (a trainer adds them): torch wants
        all or none.

        Raises:
            `TypeError`: They are a set, whose order is another in every process.
        """
        if isinstance(params, (set, frozenset)):
            raise TypeError(
                "params must be in an order that a checkpoint can rely on, but they are a set; pass a list"
            )
        params = [params] if isinstance(params, Tensor) else list(params)
        if not self.param_groups or "param_names" not in self.param_groups[0]:
            return params
        index = len(self.param_groups)
        return [p if isinstance(p, tuple) else (f"group{index}.{i}", p) for i, p in enumerate(params)]

    def _new_names(self, names: list[str]) -> str:
        """Those that no earlier call named, as text for a warning: three of them, and how many more; or nothing."""
        known: set[str] = self.__dict__.setdefault("_named_in_warnings", set())
        new = [name for name in names if name not in known]
        known.update(new)
        return ", ".join(new[:3]) + (f" and of {len(new) - 3} more tensors" if len(new) > 3 else "")


def _as_list(value: Any) -> Any:
    """A pair that was read from text comes back as a list."""
    return list(value) if isinstance(value, tuple) else value
