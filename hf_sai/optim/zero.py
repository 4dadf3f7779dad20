"""
An optimizer that DeepSpeed ZeRO has taken over: inside, an ordinary one of the same class over the pieces.

ZeRO hands the optimizer flat buffers, a group (or sub-group) at a time. [`ZeroPieces`] keeps a second optimizer of the
same class whose parameters are the pieces of the model's tensors in these buffers, as views. What is measured of a
tensor is combined over the ranks; what is updated is this rank's piece. So both do what they do in one process.

Each step of ZeRO is a round: it begins with the first flat buffer, where all gradients are measured, those that are
yet to come as DeepSpeed holds them. That all ranks agree is due to their measuring the same.

State: tensors with an element per element of the parameter lie in flat buffers, `state[flat]`, where DeepSpeed finds
them; all else is a plain value in `group["tensors"]`, a row per tensor, equal on all ranks. `group["zero"]` says where
the pieces lie, so that a checkpoint of another layout is refused.
"""

from __future__ import annotations

import bisect
import inspect
import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .gsnr import GradientMoments, combine_moments, local_moments
from .zero_layout import Flat, Piece, Zero, ZeroLayoutError


# Keys of a group that hold one entry per parameter.
_PER_PARAMETER = ("param_names", "gsnr_given", "routes", "reasons")
_OWN = ("params", "tensors", "zero", *_PER_PARAMETER)
# How far what DeepSpeed hands over may be from what was measured, relative to it.
_SAME = 1e-2


class ZeroPieces:
    """
    The inner optimizer, and the traffic between it and the one that DeepSpeed calls.

    Args:
        optimizer (`NamedOptimizer`): The one that DeepSpeed calls.
        zero ([`Zero`]): What has taken it over.
    """

    def __init__(self, optimizer: Any, zero: Zero) -> None:
        optimizer._refuse_pieces()
        self.outer, self.zero = optimizer, zero
        self._shared = [key for key in optimizer._progress if key != "lr"]
        self.flats: dict[Tensor, Flat] = {flat.tensor: flat for flat in zero.flats}
        self.places: dict[Piece, list[tuple[int, int]]] = {}
        self.views: dict[Piece, Tensor] = {}
        self.pieces: dict[Tensor, Piece] = {}
        self.flat_of: dict[Piece, Flat] = {}
        for flat in zero.flats:
            for piece in flat.pieces:
                view = piece.cut(flat.tensor.detach()).requires_grad_()
                self.views[piece], self.pieces[view], self.flat_of[piece] = view, piece, flat
        self.inner = self._make_inner()
        self._now: set[Flat] = set()
        self._waiting: set[Flat] = set()
        self._measured: dict[Piece, float] = {}
        self._weights: dict[Piece, GradientMoments] = {}
        self._places_in: dict[Flat, list[tuple[int, int, Tensor]]] = {flat: [] for flat in zero.flats}
        for place in self.inner._params():
            self.inner._make_state(*place)
            self._places_in[self.flat_of[self.pieces[place[2]]]].append(place)
        self._adopt()

    # ---- a step ----

    def advance(self) -> None:
        """A step of DeepSpeed: some of the flat buffers, which have their gradients."""
        now = [self.flats[param] for group in self.outer.param_groups for param in group["params"]]
        if self.zero.flats[0] in now:
            self._begin_round(now)
        if not self._waiting.issuperset(now):
            raise ZeroLayoutError(
                "ZeRO must step each of its flat buffers once, in their order, but began with another; report this"
            )
        self._waiting.difference_update(now)
        self._take_options(flat.group for flat in now)
        present = [place for flat in now for place in self._places_in[flat] if flat.tensor.grad is not None]
        for _, _, view in present:
            piece = self.pieces[view]
            view.grad = piece.cut(self.flat_of[piece].gradient()[0])
        self._check_measured([view for _, _, view in present])
        self.inner._move(present)
        for _, _, view in present:
            view.grad = None
        self._give_back(flat.group for flat in now)

    def _begin_round(self, now: list[Flat]) -> None:
        if not self.places:  # not before: while DeepSpeed loads, model and buffers differ
            self.places = self.zero.check()
        self._waiting, self._measured, self._now = set(self.zero.flats), {}, set(now)
        self._take_options(range(len(self.inner.param_groups)))
        self.inner._read_late_news()
        self.inner._look()

    def moments(self, views: list[Tensor]) -> list[GradientMoments]:
        """
        Moments of whole gradients, as [`gradient_moments`], and of the parameters, which are kept; one collective for
        all. Memory: none to speak of.
        """
        if not views:
            return []
        pieces = [self.pieces[view] for view in views]
        unit = {flat: 1.0 if flat in self._now else self.zero.unit() for flat in self.zero.flats}
        cuts = {flat: _Cuts(self._gradients(flat)) for flat in {self.flat_of[piece] for piece in pieces}}
        local = local_moments([cuts[self.flat_of[piece]].cut(piece) for piece in pieces])
        units = torch.tensor([unit[self.flat_of[piece]] for piece in pieces], dtype=local.dtype, device=local.device)
        local = torch.stack([local[:, 0], local[:, 1] * units, local[:, 2] * units.square()], dim=-1)
        norms = (local[:, 2] + local[:, 0] * local[:, 1].square()).sqrt()
        self._measured = dict(zip(pieces, norms.tolist(), strict=True))
        weights = local_moments([view.detach() for view in views]).to(local)
        local = torch.cat([local, weights]).to(self.zero.device())
        tables = [torch.empty_like(local) for _ in range(dist.get_world_size(self.zero.process_group))]
        dist.all_gather(tables, local, group=self.zero.process_group)
        whole = tables[0]
        for table in tables[1:]:
            whole = combine_moments(whole, table)
        found = [
            GradientMoments(math.prod(piece.shape), mean, deviations, torch.finfo(piece.param.dtype).eps)
            for piece, (_, mean, deviations) in zip(pieces * 2, whole.tolist(), strict=True)
        ]
        self._weights = dict(zip(pieces, found[len(pieces) :], strict=True))
        return found[: len(pieces)]

    def weight_moments(self, views: list[Tensor]) -> list[GradientMoments]:
        """Of whole parameters, as they were when [`ZeroPieces.moments`] last looked at their gradients."""
        return [self._weights[self.pieces[view]] for view in views]

    def shape(self, view: Tensor) -> tuple[int, ...]:
        """Of the whole tensor."""
        return self.pieces[view].shape

    def where(self, view: Tensor) -> list[tuple[int, int]]:
        """`(offset, numel)` of the whole tensor's pieces on all ranks."""
        return self.places[self.pieces[view]]

    def ranks(self) -> tuple[Any, torch.device]:
        """Those that share the tensors, and the device on which they talk."""
        return self.zero.process_group, torch.device(self.zero.device())

    def _gradients(self, flat: Flat) -> list[Tensor]:
        if flat in self._now:
            return flat.gradient()
        return self.zero.pending(self.zero.flats.index(flat))

    def _check_measured(self, views: list[Tensor]) -> None:
        """Compares the gradients that came with what was measured before they came."""
        late = [view for view in views if self._measured and self.pieces[view] in self._measured]
        late = [view for view in late if self.flat_of[self.pieces[view]] not in self._now]
        if not late:
            return
        norms = torch.stack([torch.linalg.vector_norm(view.grad, dtype=torch.float32) for view in late]).tolist()
        for view, norm in zip(late, norms, strict=True):
            measured = self._measured[self.pieces[view]]
            if math.isfinite(norm) and abs(norm - measured) > _SAME * max(norm, measured):
                raise ZeroLayoutError(
                    f"DeepSpeed must hand over the gradients that it held before, times {self.zero.unit():g}, but one "
                    f"of norm {measured:g} came with {norm:g}; report this, and use normalize='none' till then"
                )

    # ---- options and state ----

    def _make_inner(self) -> Any:
        groups = []
        for index, group in enumerate(self.outer._every_group()):
            pieces = [piece for flat in self.zero.flats if flat.group == index for piece in flat.pieces]
            kept = self._positions(group, pieces)
            names = self._names(index, group, pieces, kept)
            inner = {key: value for key, value in group.items() if key not in _OWN}
            for key in _PER_PARAMETER[1:]:
                if key in group:
                    inner[key] = [group[key][position] for position in kept]
            views = [self.views[piece] for piece in pieces]
            groups.append({**inner, "params": list(zip(names, views, strict=True))})
        options = inspect.signature(type(self.outer)).parameters
        made = type(self.outer)(groups, **{key: value for key, value in self.outer.defaults.items() if key in options})
        for group, given in zip(made.param_groups, groups, strict=True):
            group.update({key: value for key, value in given.items() if key != "params"})
        made._pieces = self
        return made

    def _positions(self, group: dict[str, Any], pieces: list[Piece]) -> list[int]:
        """Where the tensors stood in the group before ZeRO took frozen ones out."""
        known = self.outer._positions()
        found = [known.get(piece.param) for piece in pieces]
        return list(range(len(pieces))) if None in found else found

    def _names(self, index: int, group: dict[str, Any], pieces: list[Piece], kept: list[int]) -> list[str]:
        if "param_names" in group and len(group["param_names"]) > max(kept, default=-1):
            return [group["param_names"][position] for position in kept]
        model = self.zero.names()
        return [model.get(piece.param, f"group{index}.{at}") for piece, at in zip(pieces, kept, strict=True)]

    def _take_options(self, groups: Any) -> None:
        """What schedulers, and a load, changed in the groups that DeepSpeed has."""
        every = self.outer._every_group()
        for index in set(groups):
            options = {key: value for key, value in every[index].items() if key not in (*_OWN, *self._shared)}
            self.inner.param_groups[index].update(options)

    def _give_back(self, groups: Any) -> None:
        every = self.outer._every_group()
        for index in set(groups):
            every[index].update({key: self.inner.param_groups[index][key] for key in self._shared})

    def _adopt(self) -> None:
        """Moves tensors of the inner state that are as large as their pieces into flat buffers, and views of these."""
        for piece, view in self.views.items():
            flat, state = self.flat_of[piece].tensor, self.inner.state[view]
            for key, value in state.items():
                if not (isinstance(value, Tensor) and value.shape == view.shape):
                    continue
                state_of_flat = self.outer.state[flat]
                if key not in state_of_flat:
                    state_of_flat[key] = torch.zeros_like(flat.detach(), dtype=value.dtype)
                place = piece.cut(state_of_flat[key])
                if place.data_ptr() != value.data_ptr() or not piece.numel:
                    state[key] = place.copy_(value)

    def write(self) -> None:
        """Puts rows and places into the groups that DeepSpeed saves."""
        self.inner._read_late_news()
        self._adopt()
        self._give_back(range(len(self.inner.param_groups)))
        rank, ranks = dist.get_rank(self.zero.process_group), dist.get_world_size(self.zero.process_group)
        for index, group in enumerate(self.outer._every_group()):
            names, views = self.inner.param_groups[index]["param_names"], self.inner.param_groups[index]["params"]
            pieces = [self.pieces[view] for view in views]
            group["tensors"] = [
                {"name": name, "shape": list(piece.shape), **self._row(view)}
                for name, piece, view in zip(names, pieces, views, strict=True)
            ]
            where = [[piece.start, piece.offset, piece.numel] for piece in pieces]
            group["zero"] = {"rank": rank, "ranks": ranks, "pieces": where}

    def _row(self, view: Tensor) -> dict[str, Any]:
        state = self.inner.state[view].items()
        plain = {key: value.item() if isinstance(value, Tensor) and not value.shape else value for key, value in state}
        return {key: value for key, value in plain.items() if not isinstance(value, Tensor)}

    def check_saved(self, groups: list[dict[str, Any]]) -> None:
        """
        Checks that saved groups are of this rank and this layout.

        Raises:
            `ValueError`: They are not.
        """
        self.write()
        for saved, group in zip(groups, self.outer._every_group(), strict=False):
            there = saved.get("zero")
            if there is None:
                raise ZeroLayoutError(
                    "a state that is loaded under ZeRO must have been saved under it, but this one holds whole "
                    "tensors; resume as it was trained, or start without the optimizer's state"
                )
            if there["ranks"] != group["zero"]["ranks"]:
                raise ZeroLayoutError(
                    f"ZeRO resumes on as many ranks as it was saved on, but these are {group['zero']['ranks']} and it "
                    f"was {there['ranks']}; use {there['ranks']}, or start without the optimizer's state"
                )
            mine = [[row["name"], row["shape"]] for row in group["tensors"]]
            if there != group["zero"] or [[row["name"], row["shape"]] for row in saved["tensors"]] != mine:
                raise ZeroLayoutError(
                    f"a state must have been saved with this layout of ZeRO's flat buffers, by rank "
                    f"{group['zero']['rank']}, but the saved one is another (of rank {there['rank']}); keep stage, "
                    "groups, round_robin_gradients and sub_group_size as they were"
                )

    def read(self) -> None:
        """Takes what was loaded into the outer optimizer."""
        self.places = {}
        every = self.outer._every_group()
        for index, inner in enumerate(self.inner.param_groups):
            inner.update({key: value for key, value in every[index].items() if key not in _OWN})
            for view, row in zip(inner["params"], every[index]["tensors"], strict=True):
                state, piece = self.inner.state[view], self.pieces[view]
                for key, value in row.items():
                    if key not in ("name", "shape"):
                        state[key] = state[key].fill_(value) if isinstance(state.get(key), Tensor) else value
                flat = self.flat_of[piece].tensor
                for key, value in self.outer.state[flat].items():
                    if isinstance(value, Tensor) and value.shape == flat.shape:
                        state[key] = piece.cut(value)


class _Cuts:
    """Pieces of flat tensors that follow on one another."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self.tensors = tensors
        self.ends: list[int] = []
        end = 0
        for tensor in tensors:
            end += tensor.numel()
            self.ends.append(end)

    def cut(self, piece: Piece) -> Tensor:
        """The piece: a view where it lies in one of the tensors, as it does in all that was seen."""
        found, at, end = [], piece.start, piece.start + piece.numel
        index = bisect.bisect_right(self.ends, at)
        while at < end and index < len(self.ends):
            tensor, stop = self.tensors[index], min(self.ends[index], end)
            found.append(tensor.narrow(0, at - (self.ends[index] - tensor.numel()), stop - at))
            at, index = stop, index + 1
        if sum(each.numel() for each in found) != piece.numel:
            raise ZeroLayoutError(
                "the gradients that DeepSpeed holds must cover its flat buffer, but do not; report this"
            )
        if not found:
            return piece.there[:0]
        return found[0] if len(found) == 1 else torch.cat(found)
