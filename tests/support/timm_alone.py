"""
timm as it is released, where torchvision is not.

Its models take one class of torchvision; what else it takes prepares images. The torchvision that belongs to a torch
without CUDA is not where pip looks first, so that `make` installs timm alone.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import ModuleType
from unittest.mock import MagicMock

from torch import nn


NAMES = ("", ".ops", ".ops.misc", ".models", ".models.feature_extraction")
NAMES += (".datasets", ".transforms", ".transforms.functional")


def import_timm() -> ModuleType:
    """Beside torchvision where that is installed; else, while it is imported, beside modules that nothing calls."""
    if importlib.util.find_spec("torchvision") is not None:
        return importlib.import_module("timm")
    modules = {f"torchvision{name}": MagicMock(__path__=[], __spec__=None) for name in NAMES}
    modules["torchvision.ops.misc"].FrozenBatchNorm2d = type("FrozenBatchNorm2d", (nn.Module,), {})
    sys.modules.update(modules)
    try:
        return importlib.import_module("timm")
    finally:  # transformers asks whether torchvision is there
        for name in modules:
            del sys.modules[name]
