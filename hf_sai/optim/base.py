"""What both optimizers have in common: the step with its closure, names, and warnings that name a tensor once."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, ClassVar, Self, overload

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer
from torch.utils.weak import WeakIdKeyDictionary

from .clip_guard import listen
from .finite import Found, LateNews, find_not_finite
from .precision import undisturbed
from .rounding import Rounding
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


def check_writer(name: str, keys: frozenset[str], state_dict: dict[str, Any]) -> None:
    """
    Checks that an optimizer of that name saved this state.

    Args:
        name (`str`): `"SGDSaI"` or `"SWAN"`.
        keys (`frozenset[str]`): That its groups have, and no other's.
        state_dict (`dict`): As `load_state_dict` gets it.

    Raises:
        `ValueError`: Another one did; it is named where it can be told.
    """
    groups = state_dict["param_groups"]
    foreign = [group for group in groups if not keys <= set(group)]
    if not foreign:
        return
    group = foreign[0]
    writer = next((each for each, its in (_OURS | _OTHERS).items() if its <= set(group)), "another optimizer")
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
    # Whether a step has matrix products.
    _multiplies: ClassVar[bool] = False
    # What a group holds for each of its parameters, and decides updates.
    _per_tensor: ClassVar[tuple[str, ...]] = ()

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """
        Raises:
            `ValueError`: A host hands on groups of its own beside those that the Trainer's table gave it.
        """
        if args and "params" in kwargs:
            raise ValueError(
                f"{cls.__name__} needs one list of groups but got two: a host has made groups of its own, with rates "
                "for parts of the model, beside params= of get_optimizer_cls_and_kwargs(args, model); leave those "
                "rates out, or the model out of that call"
            )
        return super().__new__(cls)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; a group without parameters may stand beside named ones, before them and after."""
        params = param_group["params"]
        if not params and any("param_names" in group for group in self.param_groups):
            param_group = {**param_group, "param_names": []}
        elif params and isinstance(params[0], tuple):
            for group in self.param_groups:
                if not group["params"]:
                    group.setdefault("param_names", [])
        super().add_param_group(param_group)
        listen()
        self.__dict__["_all_groups"] = self.param_groups
        self._positions().update({param: at for at, param in enumerate(self.param_groups[-1]["params"])})

    def state_dict(self) -> dict[str, Any]:
        """As torch's; under ZeRO of this rank, with the rows of all tensors in the groups."""
        self._read_late_news()
        taken = self._taken_over()
        if taken is not None:
            taken.write()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """
        Loads what `state_dict()` gave, or what a `load_state_dict` pre-hook made of it: each tensor to its parameter's
        device and in the dtype that is documented for it.

        Raises:
            `ValueError`: The state was written by another optimizer.
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
        # The last hook: it sees what the others return, which is what is loaded.
        handle = self.register_load_state_dict_pre_hook(_see_what_is_loaded)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
            self.__dict__.pop("_loading", None)
        if taken is not None:
            taken.read()

    def _check_loaded(self, state_dict: dict[str, Any]) -> None:
        """Raises `ValueError` for a state that it can't go on with."""

    def _loaded_dtype(self, key: str, saved: Tensor, param: Tensor, group: dict[str, Any]) -> torch.dtype:
        """The dtype of a tensor of the state once it is loaded; torch makes all but `step` the parameter's."""
        return param.dtype

    def _restore(self, state: dict[str, Any], loading: dict[str, Any]) -> None:
        """Undoes in a state to load what torch's casts lose, and moves what they leave where it was saved."""
        saved_groups = loading["param_groups"]
        for saved_group, group, mine in zip(saved_groups, state["param_groups"], self.param_groups, strict=True):
            for saved_id, param in zip(saved_group["params"], mine["params"], strict=True):
                for key, saved in loading["state"].get(saved_id, {}).items():
                    if not isinstance(saved, Tensor):
                        continue
                    dtype, loaded = self._loaded_dtype(key, saved, param, group), state["state"][param][key]
                    if loaded.dtype != dtype or loaded.device != param.device:
                        # torch's cast may have lost digits: from what was saved, once more
                        state["state"][param][key] = saved.to(device=param.device, dtype=dtype, copy=True)

    def __setstate__(self, state: dict[str, Any]) -> None:
        own_groups = self.__dict__.get("param_groups", [])
        loading = self.__dict__.get("_loading")
        if loading is not None:
            self._warn_of_other_options(state["param_groups"])
            self._restore(state, loading)
        super().__setstate__(state)
        for group, own in zip(self.param_groups, own_groups, strict=False):
            for key in self._chosen:
                group.setdefault(key, own[key])
        self.__dict__["_all_groups"] = self.param_groups
        for group in self.param_groups:
            for key, value in self.defaults.items():
                if key != "differentiable":  # torch's own, which it adds to the defaults on the way
                    group.setdefault(key, value)

    def _taken_over(self) -> ZeroPieces | None:
        """Its life under ZeRO; `None` where it has whole tensors. Those that it was given are seen at once."""
        known = self.__dict__
        taken: ZeroPieces | None = known.get("_zero_pieces")
        if torch.compiler.is_compiling():  # it can't trace dictionaries with weak keys
            return taken
        first = next((param for group in self.param_groups for param in group["params"]), None)
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

    def _every_group(self) -> list[dict[str, Any]]:
        """All groups, also while DeepSpeed shows one only."""
        return self.__dict__.get("_all_groups", self.param_groups)

    def _positions(self) -> Any:
        """Where each of the tensors that it was given stood in its group; they are not kept alive by it."""
        if "_placed" not in self.__dict__:
            self.__dict__["_placed"] = WeakIdKeyDictionary()
        return self.__dict__["_placed"]

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
        self._read_late_news()
        with undisturbed(self._multiplies):
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

    @torch.compiler.disable
    def _read_late_news(self) -> None:
        """Tells of gradients of the step before that were not finite, and puts right what did not know."""
        late = self._late_news.read()
        self._tell_not_finite([name for name, _ in late])
        for _, undo in late:
            if undo is not None:
                undo()

    @property
    def _late_news(self) -> LateNews:
        news: LateNews = self.__dict__.setdefault("_news_from_devices", LateNews())
        return news

    def _find_not_finite(
        self,
        gradients: Sequence[Tensor],
        name: Callable[[int], str],
        undo: Callable[[list[int]], Callable[[], None]] | None = None,
    ) -> Found:
        """
        Which gradients are to be left alone in this step; warns of them, on an accelerator in the next step.

        Args:
            gradients (sequence of `torch.Tensor`): Of the step.
            name (callable): From index to name.
            undo (callable, *optional*): From indices of gradients on one accelerator to what puts right, in the next
                step, plain values of their states, which were written before it was known that one is not finite.
                May be called more than once.
        """
        taken = self._pieces
        found = find_not_finite(gradients) if taken is None else find_not_finite(gradients, taken.ranks())
        if found.bad:
            self._tell_not_finite([name(index) for index in sorted(found.bad)])
        for indices, flags in found.tables:
            put_right = undo(indices) if undo else None
            self._late_news.send(flags, [(name(index), put_right) for index in indices])
        return found

    def _tell_not_finite(self, names: list[str]) -> None:
        """One warning per step, with tensors that no earlier one named."""
        new = self._new_names(names)
        if new:
            logger.warning(
                "The gradient of %s has inf or NaN: not updated in this step, nor in later ones like it.", new
            )

    def _warn_of_other_options(self, saved_groups: list[dict[str, Any]]) -> None:
        """As in every torch optimizer the saved options replace those of the constructor; here not in silence."""
        names = [name for name in self.defaults if name not in self._progress]
        changed = {
            f"{name}={saved[name]} (not {group[name]})"
            for group, saved in zip(self.param_groups, saved_groups, strict=False)
            for name in names
            if name in saved and _as_list(saved[name]) != _as_list(group[name])
        }
        for name in self._per_tensor:
            pairs = [
                pair
                for group, saved in zip(self.param_groups, saved_groups, strict=False)
                for pair in zip(saved.get(name, group[name]), group[name], strict=False)
            ]
            others = [pair for pair in pairs if pair[0] != pair[1]]
            if others:
                changed.add(f"{name} of {len(others)} tensors, such as {others[0][0]} (not {others[0][1]})")
        if changed:
            logger.warning("The loaded state goes on with its own options: %s.", ", ".join(sorted(changed)))

    def _advance(self) -> None:
        taken = self._taken_over()
        if taken is not None:
            taken.advance()
            return
        self._look()
        self._move(self._params())

    def _look(self) -> None:
        """What comes before anything moves."""
        self._begin()

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
            `ValueError`: Two have the same name.
        """
        if isinstance(params, (set, frozenset)):
            raise TypeError(
                "params must be in an order that a checkpoint can rely on, but they are a set; pass a list"
            )
        params = [params] if isinstance(params, Tensor) else list(params)
        taken = {name for group in self.param_groups for name in group.get("param_names", ())}
        for name in [each[0] for each in params if isinstance(each, tuple)]:
            if name in taken:
                raise ValueError(
                    f"two parameters must not share a name, by which scales and reports tell them apart, but {name!r} "
                    "is given twice; give each its own"
                )
            taken.add(name)
        if not any(group.get("param_names") for group in self.param_groups):
            return params
        index = len(self.param_groups)
        return [p if isinstance(p, tuple) else (f"group{index}.{i}", p) for i, p in enumerate(params)]

    def _new_names(self, names: list[str]) -> str:
        """Those that no earlier call named, as text for a warning: three of them, and how many more; or nothing."""
        known: set[str] = self.__dict__.setdefault("_named_in_warnings", set())
        new = [name for name in names if name not in known]
        known.update(new)
        return ", ".join(new[:3]) + (f" and of {len(new) - 3} more tensors" if len(new) > 3 else "")


def _see_what_is_loaded(optimizer: Any, state_dict: dict[str, Any]) -> None:
    """A `load_state_dict` pre-hook."""
    optimizer._check_loaded(state_dict)
    optimizer.__dict__["_loading"] = state_dict


def _as_list(value: Any) -> Any:
    """A pair that was read from text comes back as a list."""
    return list(value) if isinstance(value, tuple) else value
