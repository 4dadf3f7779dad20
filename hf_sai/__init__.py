"""
SGD-SaI and SWAN for the Hugging Face trainers: `import hf_sai`, then `TrainingArguments(optim="sgd_sai")`.

Importing registers the optimizer names with transformers where that is installed; torch and transformers are not
imported by it.
"""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from typing import TYPE_CHECKING, Any


__version__ = "0.1.0"

if TYPE_CHECKING:
    from .callback import GSNRCallback
    from .config import SaIConfig
    from .integration import (
        create_optimizer,
        optimizer_cls_and_kwargs,
        param_groups,
    )
    from .live import OptimizerMismatchError, assert_optimizer
    from .optim import SWAN, OptionError, SGDSaI, SGDSaILayerwise, SWANLayerwise, convert_lr, measure_gsnr
    from .registration import register, unregister
    from .report import GSNRReport, optimizer_state_bytes
    from .trainer import SaITrainer, SaITrainerMixin, make_trainer

_HOME = {
    "GSNRCallback": ".callback",
    "GSNRReport": ".report",
    "OptimizerMismatchError": ".live",
    "OptionError": ".optim",
    "SGDSaI": ".optim",
    "SGDSaILayerwise": ".optim",
    "SWAN": ".optim",
    "SWANLayerwise": ".optim",
    "SaIConfig": ".config",
    "SaITrainer": ".trainer",
    "SaITrainerMixin": ".trainer",
    "assert_optimizer": ".live",
    "convert_lr": ".optim",
    "create_optimizer": ".integration",
    "make_trainer": ".trainer",
    "measure_gsnr": ".optim",
    "optimizer_cls_and_kwargs": ".integration",
    "optimizer_state_bytes": ".report",
    "param_groups": ".integration",
    "register": ".registration",
    "unregister": ".registration",
}

__all__ = [
    "SWAN",
    "GSNRCallback",
    "GSNRReport",
    "OptimizerMismatchError",
    "OptionError",
    "SGDSaI",
    "SGDSaILayerwise",
    "SWANLayerwise",
    "SaIConfig",
    "SaITrainer",
    "SaITrainerMixin",
    "assert_optimizer",
    "convert_lr",
    "create_optimizer",
    "make_trainer",
    "measure_gsnr",
    "optimizer_cls_and_kwargs",
    "optimizer_state_bytes",
    "param_groups",
    "register",
    "unregister",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name], __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


if importlib.util.find_spec("transformers") is not None:
    from trainer_patches import UnsupportedHostError

    try:
        importlib.import_module(".registration", __name__).register()
    except (UnsupportedHostError, ValueError) as error:  # hf_sai.optim works all the same; register() raises this
        warnings.warn(str(error), stacklevel=2)
