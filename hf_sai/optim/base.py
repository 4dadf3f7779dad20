"""What both optimizers have in common: the step with its closure, names, and warnings that name a tensor once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer


# What tells whose a state is: keys that its groups have, the most telling first.
_WRITERS = {
    "SWAN": {"kind", "routes"},
    "SGDSaI": {"normalize", "gsnr_max"},
    "Prodigy": {"d_coef", "d_numerator"},
    "AdamW or Adam": {"betas", "amsgrad"},
    "SGD": {"nesterov", "dampening"},
}


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
    if all(_WRITERS[name] <= set(group) for group in groups):
        return
    group = next(group for group in groups if not _WRITERS[name] <= set(group))
    writer = next((each for each, keys in _WRITERS.items() if keys <= set(group)), "another optimizer")
    if "decoupled_weight_decay" in group and writer == "AdamW or Adam":
        writer = "AdamW" if group["decoupled_weight_decay"] else "Adam"
    kept = ", ".join(sorted({str(key) for values in state_dict["state"].values() for key in values})) or "nothing"
    raise ValueError(
        f"{name} loads only state that {name} saved, but {writer} saved this one (it keeps {kept} per tensor); resume "
        f"with {writer}, or start without its checkpoint"
    )


class NamedOptimizer(Optimizer):
    """A `torch.optim.Optimizer` whose subclasses have `_advance()`, one update of all that has a gradient."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
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

    def _advance(self) -> None:
        raise NotImplementedError

    @property
    def measurements(self) -> int:
        """How much there is to report, to be compared with a later answer: here, tensors with a state."""
        return len(self.state)

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
