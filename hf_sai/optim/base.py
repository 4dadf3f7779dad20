"""What both optimizers have in common: the step with its closure, names, and warnings that name a tensor once."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar, overload

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer
from torch.utils.weak import WeakIdKeyDictionary

from .tensors import whole_shape
from .zero import ZeroPieces
from .zero_layout import ZeroLayoutError, find_zero


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
    """
    A `torch.optim.Optimizer` whose subclasses have `_begin()`, which looks at all gradients of a step,
    `_move(places)`, which updates some of the tensors, and `_make_state(group_index, index, param)`.

    Where DeepSpeed ZeRO has taken it over, it has an inner optimizer, over pieces; see [`ZeroPieces`].
    """

    # Of the inner optimizer: where it is.
    _pieces: ZeroPieces | None = None

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
        self.__dict__["_all_groups"] = self.param_groups
        for group in self.param_groups:
            for key, value in self.defaults.items():
                if key != "differentiable":  # torch's own, which it adds to the defaults on the way
                    group.setdefault(key, value)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's."""
        super().add_param_group(param_group)
        self.__dict__["_all_groups"] = self.param_groups
        self._positions().update({param: at for at, param in enumerate(self.param_groups[-1]["params"])})

    def state_dict(self) -> dict[str, Any]:
        """As torch's; under ZeRO of this rank, with the rows of all tensors in the groups."""
        taken = self._taken_over()
        if taken is not None:
            taken.write()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """
        As torch's.

        Raises:
            `ZeroLayoutError`: It was saved under ZeRO and is not loaded so, or the other way round, or in another
                layout.
        """
        taken = self._taken_over()
        if taken is not None:
            taken.check_saved(state_dict["param_groups"])
        elif any("zero" in group for group in state_dict["param_groups"]):
            raise ZeroLayoutError(
                "a state that was saved under DeepSpeed ZeRO must be loaded under it, but this optimizer has whole "
                "tensors; resume with the same DeepSpeed configuration, or start without the optimizer's state"
            )
        super().load_state_dict(state_dict)
        self._after_load(state_dict)
        if taken is not None:
            taken.read()

    def _after_load(self, state_dict: dict[str, Any]) -> None:
        """For what torch's load does to tensors and should not have done."""

    def _taken_over(self) -> ZeroPieces | None:
        """Its life under ZeRO; `None` where it has whole tensors. Those that it was given are seen at once."""
        known = self.__dict__
        first = next((param for group in self.param_groups for param in group["params"]), None)
        taken: ZeroPieces | None = known.get("_zero_pieces")
        if first is None or (taken is not None and first in taken.flats):
            if taken is not None or not self.param_groups:
                return taken
        elif first in self._positions() or ("_looked_at" in known and known["_looked_at"]() is first):
            return None
        zero = find_zero(self)
        if zero is None:
            if first is not None:  # FSDP, or a copy in another precision: whole tensors, or DTensors
                known["_looked_at"] = weakref.ref(first)
            return None
        known["_zero_pieces"] = ZeroPieces(self, zero)
        return known["_zero_pieces"]

    def _refuse_pieces(self) -> None:
        """Raises [`ZeroLayoutError`] where it can't work on pieces."""

    @property
    def per_tensor(self) -> Any:
        """The optimizer that has the groups and states of the tensors: under ZeRO that of the pieces, else this."""
        taken = self._taken_over()
        return self if taken is None else taken.inner

    @property
    def is_partitioned(self) -> bool:
        """Whether DeepSpeed ZeRO has put flat buffers in the place of the tensors."""
        return self._taken_over() is not None

    def measure_in_next_step(self) -> None:
        """Has all gradients of the next step measured, where a host gives no look at them before; see `measured`."""
        taken = self._taken_over()
        if taken is not None:
            taken.measure_next = True

    @property
    def measured(self) -> dict[str, float] | None:
        """What the step after [`NamedOptimizer.measure_in_next_step`] measured, by name; once."""
        taken = self._taken_over()
        return None if taken is None else taken.take_measured()

    def _every_group(self) -> list[dict[str, Any]]:
        """All groups, also while DeepSpeed shows one only."""
        return self.__dict__.get("_all_groups", self.param_groups)

    def _positions(self) -> Any:
        """Where each of the tensors that it was given stood in its group; they are not kept alive by it."""
        return self.__dict__.setdefault("_placed", WeakIdKeyDictionary())

    def _of_model(self, param: Tensor) -> Tensor:
        """The model's own parameter."""
        return param if self._pieces is None else self._pieces.pieces[param].param

    def shape_of(self, param: Tensor) -> tuple[int, ...]:
        """Of the whole tensor."""
        return whole_shape(param) if self._pieces is None else self._pieces.shape(param)

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
        if not self.__dict__.get("_has_gradients"):
            self._look_for_gradients()
        self._advance()
        return loss

    def _look_for_gradients(self) -> None:
        """One warning where there is none in the first step: another model may be the one that is trained."""
        found = self._any_gradient()
        if not found and "_has_gradients" not in self.__dict__:
            logger.warning(
                "%s.step() finds no gradient in any of its %d tensors. Where PEFT, quantisation or something else has "
                "replaced the model since, make the optimizer from the model that is trained.",
                type(self).__name__,
                sum(len(group["params"]) for group in self.param_groups),
            )
        self._has_gradients = found

    def _any_gradient(self) -> bool:
        return any(param.grad is not None for *_, param in self._params())

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
        taken = self._taken_over()
        if taken is not None:
            taken.advance()
            return
        self._begin()
        self._move(self._params())

    def _begin(self) -> None:
        raise NotImplementedError

    def _move(self, places: Iterable[tuple[int, int, Tensor]]) -> None:
        raise NotImplementedError

    def _make_state(self, group_index: int, index: int, param: Tensor) -> None:
        raise NotImplementedError

    @property
    def measurements(self) -> int:
        """How much there is to report, to be compared with a later answer: here, tensors with a state."""
        inner = self.per_tensor
        if inner is self:
            return len(self.state)
        return sum(bool(state.get("step", 1)) for state in inner.state.values())  # made before the first step

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
