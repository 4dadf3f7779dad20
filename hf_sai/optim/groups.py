"""Parameter groups of a model: with weight decay and without, and split by what an optimizer does to a tensor."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Iterable
from typing import Any

from torch import Tensor, nn

from .lora_pairs import PairPolicy, adapter_pairs
from .names import named_parameters
from .routing import ADAM, LoraPolicy, route_by_shape, route_parameters, summary
from .tensors import whole_shape


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
    named = [(name, param) for name, param in named_parameters(model) if param.requires_grad]
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
    SGD-SaI's groups: with and without decay; after them LoRA's pairs, likewise, A and B in turn. All hold the policy.

    Args:
        model, weight_decay, decay_names: As in [`plain_groups`].
        lora_policy (`str`, *optional*, defaults to `"plain"`): As in [`hf_sai.optim.lora_pairs.adapter_pairs`].

    Raises:
        `ValueError`: `lora_policy` is not known, or it is `"paired"` and there is no pair.
    """
    pairs = adapter_pairs(model, lora_policy)
    named = [(name, param) for name, param in named_parameters(model) if param.requires_grad]
    names: dict[Tensor, str] = {param: name for name, param in named}
    chosen = {} if lora_policy == "plain" else {"lora_policy": lora_policy}  # SGDSaI's default is plain
    in_pairs = {param for pair in pairs for param in pair}
    groups: list[Group] = []
    for paired in (False, True):
        for decay in (True, False):
            if paired:
                mine = [pair for pair in pairs if (names[pair[0]] in decay_names) == decay]
                params = [(names[param], param) for pair in mine for param in pair]
            else:
                params = [row for row in named if row[1] not in in_pairs and (row[0] in decay_names) == decay]
            groups.append({"params": params, "weight_decay": weight_decay * decay, **chosen})
            if paired:
                groups[-1]["paired"] = True
    return _without_empty(groups)


def swan_groups(
    model: nn.Module,
    weight_decay: float = 0.0,
    decay_names: Collection[str] = (),
    lora_whitening: LoraPolicy = "b_only",
    split_qkv: bool = False,
    target_modules: str | list[str] | None = None,
    targets: Targets | None = None,
) -> list[Group]:
    """
    SWAN's groups: matrices to whiten, and what goes to Adam, each with and without decay; with routes and reasons.

    All hold what was chosen: `lora_whitening`, `split_qkv` and `target_modules`.

    Args:
        model, weight_decay, decay_names: As in [`plain_groups`].
        lora_whitening (`str`, *optional*, defaults to `"b_only"`): `lora_policy` of
            [`hf_sai.optim.route_parameters`].
        split_qkv, targets: As in [`hf_sai.optim.route_parameters`].
        target_modules (`str` or `list[str]`, *optional*): What `targets` was made of, for the groups to hold.

    Raises:
        `ValueError`: `lora_whitening` is not known, nothing is left to whiten, or `target_modules` came alone.
    """
    if target_modules is not None and targets is None:
        raise ValueError(
            f"target_modules must come with targets, the rule made of it, but is {target_modules!r} alone; "
            "hf_sai.param_groups(model, 'swan', target_modules=...) makes the rule"
        )
    if target_modules is not None and not isinstance(target_modules, str):
        target_modules = [str(each) for each in target_modules]
    routes = route_parameters(model, targets, lora_whitening, split_qkv)
    chosen = {"lora_whitening": lora_whitening, "split_qkv": split_qkv, "target_modules": target_modules}
    logger.info("swan: %s", summary([(row.route, row.reason, math.prod(whole_shape(row.param))) for row in routes]))
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
                    **chosen,
                }
            )
    return _without_empty(groups)


def swan_groups_of(
    groups: list[Group],
    modules: Collection[nn.Module],
    lora_whitening: LoraPolicy = "b_only",
    split_qkv: bool = False,
) -> tuple[list[Group], int, str]:
    """
    Groups that came without a model, with SWAN's routes from the modules that are found to hold their tensors, or else
    by shape.

    Args:
        groups (`list[dict]`): Whose `"params"` are `("name", tensor)` pairs.
        modules (collection of `torch.nn.Module`): That hold them.
        lora_whitening, split_qkv: As in [`swan_groups`].

    Returns:
        `tuple`: The groups, how many trainable tensors no module was found for, and one line that sums the routes up.
    """
    known: dict[Tensor, tuple[str, str]] = {}
    if modules:  # with a matrix beside them: whether there is one is asked of the whole optimizer, when it is built
        tree = nn.ModuleList([*modules, nn.Linear(2, 2)])
        rows = route_parameters(tree, lora_policy=lora_whitening, split_qkv=split_qkv, frozen=True)
        known = {row.param: (row.route, row.reason) for row in rows}
    routed, lost, counted = [], 0, []
    for group in groups:
        params = [param for _, param in group["params"]]
        found = [known.get(param) or route_by_shape(param.shape) for param in params]
        lost += sum(param not in known and param.requires_grad for param in params)
        counted += [(*row, param.numel()) for row, param in zip(found, params, strict=True)]
        chosen = {"lora_whitening": lora_whitening, "split_qkv": split_qkv}
        routed.append({**group, **chosen, "routes": [row[0] for row in found], "reasons": [row[1] for row in found]})
    return routed, lost, summary(counted)


def _without_empty(groups: Iterable[Group]) -> list[Group]:
    return [group for group in groups if group["params"]]
