"""
timm as it is released, where torchvision is not.

Its models take one class of torchvision; what else it takes prepares images. The torchvision that belongs to a torch
without CUDA is not where pip looks first, so that `make` installs timm alone and apart, in `timm` of the environment.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from unittest.mock import MagicMock

from torch import nn


NAMES = ("", ".ops", ".ops.misc", ".models", ".models.feature_extraction")
NAMES += (".datasets", ".transforms", ".transforms.functional")


APART = Path(sys.prefix) / "timm"


def import_timm() -> ModuleType | None:
    """
    Beside torchvision where both are installed; else, while it is imported, beside modules that nothing calls. `None`
    where there is no timm.
    """
    if importlib.util.find_spec("timm") is not None and importlib.util.find_spec("torchvision") is not None:
        return importlib.import_module("timm")
    if not APART.is_dir():
        return None
    modules = {f"torchvision{name}": MagicMock(__path__=[], __spec__=None) for name in NAMES}
    modules["torchvision.ops.misc"].FrozenBatchNorm2d = type("FrozenBatchNorm2d", (nn.Module,), {})
    sys.modules.update(modules)
    sys.path.insert(0, str(APART))
    try:
        return importlib.import_module("timm")
    finally:  # transformers asks whether torchvision is there
        sys.path.remove(str(APART))
        for name in modules:
            del sys.modules[name]
