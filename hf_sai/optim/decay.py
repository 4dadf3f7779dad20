"""Which parameters weight decay is for, by the module that owns them: no biases, no norms of any library."""

from __future__ import annotations

import re
from collections.abc import Collection

from torch import Tensor, nn

from .names import plain_name, unwrapped
from .routing import multiplies_by


_NORMS = (
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
    nn.LocalResponseNorm,
    nn.modules.batchnorm._NormBase,  # batch and instance norms
)
# RMSNorm, LayerNorm2d, BatchNormAct2d, T5LayerNorm, FrozenBatchNorm2d, LayerNormMlp; a norm with layers inside it
# (AdaLayerNorm) owns none of their parameters.
_NORM_NAME = re.compile(r"norm(\d*d)?(act\w*|fp32|gated|\d)*$", re.IGNORECASE)
_LAYERS = (nn.Linear, nn.Embedding, nn.modules.conv._ConvNd)


def is_norm(module: nn.Module) -> bool:
    """Whether a module's own parameters are a norm's: by torch's classes, by its class's name, or by what it has."""
    if isinstance(module, _LAYERS):
        return False
    return (
        isinstance(module, _NORMS)
        or hasattr(module, "normalized_shape")
        or any(_NORM_NAME.search(cls.__name__) for cls in type(module).__mro__ if cls is not nn.Module)
    )


def decaying(model: nn.Module, names: Collection[str]) -> set[str]:
    """
    Names that decay: those that a host's rule finds by name, put right by module.

    Args:
        model (`torch.nn.Module`): Of any library.
        names (collection of `str`): What the host's rule gives. It knows some norms by their names only.

    Returns:
        `set[str]`: Without the parameters of norms, and with the weights of linear layers, convolutions and embeddings
            that happen to stand in a module called a norm.
    """
    model = unwrapped(model)
    found = {plain_name(name) for name in names}
    norms: set[Tensor] = set()
    weights: set[Tensor] = set()
    for module in model.modules():
        norm = is_norm(module)
        for attribute, param in module._parameters.items():
            if param is None:
                continue
            if norm:
                norms.add(param)
            elif attribute == "weight" and param.ndim > 1 and _is_layer(module):
                weights.add(param)
    for raw, param in model.named_parameters(remove_duplicate=False):
        if param in norms:
            found.discard(plain_name(raw))
        elif param in weights:
            found.add(plain_name(raw))
    return found


def _is_layer(module: nn.Module) -> bool:
    return isinstance(module, _LAYERS) or multiplies_by(module, "weight")
