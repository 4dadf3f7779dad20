"""Parameter groups of a model: with weight decay and without, and split by what an optimizer does to a tensor."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable
from typing import Any

from torch import Tensor, nn

from .lora_pairs import PairPolicy, adapter_pairs
from .routing import ADAM, LoraPolicy, Route, route_by_shape, route_parameters, summary


logger = logging.getLogger(__name__)

Group = dict[str, Any]
Targets = Callable[[str, nn.Module], bool]


def plain_groups(model: nn.Module, weight_decay: float = 0.0, decay_names: Collection[str] = ()) -> list[Group]:
    """
    Named parameters, with weight decay and without, for an optimizer that takes all tensors alike.

    Args:
        model (`torch.nn.Module`): Its trainable parameters are taken, each once.
        weight_decay (`float`, *optional*, defaults to 0.0): Of the group that decays.
        decay_names (collection of `str`, *optional*): Names that decay.
    """
    named = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
    groups = [
        {
            "params": [row for row in named if (row[0] in decay_names) == decay],
            "weight_decay": weight_decay * decay,
        }
        for decay in (True, False)
    ]
    return _without_empty(groups)


def sgd_sai_groups(
    model: nn.Module,
    weight_decay: float = 0.0,
    decay_names: Collection[str] = (),
    lora_policy: PairPolicy = "plain",
) -> list[Group]:
    """
    SGD-SaI's groups: with and without decay; after them LoRA's pairs, likewise, A and B in turn.

    Args:
        model, weight_decay, decay_names: As in [`plain_groups`].
        lora_policy (`str`, *optional*, defaults to `"plain"`): As in [`hf_sai.optim.lora_pairs.adapter_pairs`].

    Raises:
        `ValueError`: `lora_policy` is not known, or it is `"paired"` and there is no pair.
    """
    pairs = adapter_pairs(model, lora_policy)
    named = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
    names: dict[Tensor, str] = {param: name for name, param in named}
    in_pairs = {param for pair in pairs for param in pair}
    groups: list[Group] = []
    for paired in (False, True):
        for decay in (True, False):
            if paired:
                chosen = [pair for pair in pairs if (names[pair[0]] in decay_names) == decay]
                params = [(names[param], param) for pair in chosen for param in pair]
            else:
                params = [row for row in named if row[1] not in in_pairs and (row[0] in decay_names) == decay]
            mark = {"paired": True} if paired else {}
            groups.append({"params": params, "weight_decay": weight_decay * decay, **mark})
    return _without_empty(groups)


def swan_groups(
    model: nn.Module,
    weight_decay: float = 0.0,
    decay_names: Collection[str] = (),
    lora_policy: LoraPolicy = "b_only",
    split_qkv: bool = False,
    targets: Targets | None = None,
) -> list[Group]:
    """
    SWAN's groups: matrices to whiten, and what goes to Adam, each with and without decay; with routes and reasons.

    Args:
        model, weight_decay, decay_names: As in [`plain_groups`].
        lora_policy, split_qkv, targets: As in [`hf_sai.optim.route_parameters`].

    Raises:
        `ValueError`: `lora_policy` is not known, or nothing is left to whiten.
    """
    routes = route_parameters(model, targets, lora_policy, split_qkv)
    logger.info("SWAN: %s", summary([(row.route, row.reason, row.param.numel()) for row in routes]))
    groups = []
    for kind in ("swan", "adam"):
        for decay in (True, False):
            mine = [row for row in routes if (row.route == ADAM) == (kind == "adam")]
            rows = [row for row in mine if (row.name in decay_names) == decay]
            groups.append(
                {
                    "params": [(row.name, row.param) for row in rows],
                    "weight_decay": weight_decay * decay,
                    "kind": kind,
                    "routes": [row.route for row in rows],
                    "reasons": [row.reason for row in rows],
                }
            )
    return _without_empty(groups)


def swan_routes_of(
    params: Iterable[Tensor],
    modules: Collection[nn.Module],
    lora_policy: LoraPolicy = "b_only",
    split_qkv: bool = False,
) -> tuple[dict[Tensor, Route], int]:
    """
    Routes of tensors that came without a model, from the modules that are found to hold them, or else by shape.

    Args:
        params (iterable of `torch.Tensor`): What is to be trained.
        modules (collection of `torch.nn.Module`): That hold them.
        lora_policy, split_qkv: As in [`hf_sai.optim.route_parameters`].

    Returns:
        `tuple`: Each tensor's route, and how many trainable ones no module was found for.
    """
    known: dict[Tensor, Route] = {}
    if modules:  # with a matrix beside them: whether there is one is asked of the whole optimizer, when it is built
        tree = nn.ModuleList([*modules, nn.Linear(2, 2)])
        known = {row.param: row for row in route_parameters(tree, lora_policy=lora_policy, split_qkv=split_qkv)}
    found = {param: known.get(param) or Route("", param, *route_by_shape(param.shape)) for param in params}
    return found, sum(param not in known and param.requires_grad for param in found)


def _without_empty(groups: Iterable[Group]) -> list[Group]:
    return [group for group in groups if group["params"]]
