"""
SGD-SaI and SWAN for the Hugging Face trainers: `import hf_sai`, then `TrainingArguments(optim="sgd_sai")`.

Importing registers the optimizer names with transformers where that is installed; nothing heavy is imported.
"""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from typing import TYPE_CHECKING, Any


__version__ = "0.1.0"

# Module to the names that are found there when they are asked for.
_NAMES = {
    ".callback": "GSNRCallback",
    ".config": "SaIConfig",
    ".integration": "create_optimizer optimizer_cls_and_kwargs param_groups",
    ".live": "OptimizerMismatchError assert_optimizer",
    ".lr_test": "lr_find",
    ".optim": "OptionError SGDSaI SGDSaILayerwise SWAN SWANLayerwise convert_lr measure_gsnr optimizer_state_bytes",
    ".registration": "register unregister",
    ".report": "GSNRReport",
    ".script_report": "write_report",
    ".trainer": "SaITrainer SaITrainerMixin make_trainer",
}
_HOME = {name: module for module, names in _NAMES.items() for name in names.split()}
__all__ = sorted(_HOME)

if TYPE_CHECKING:  # the same for a type checker or an editor, which runs nothing; a test keeps both in step
    from .callback import GSNRCallback as GSNRCallback
    from .config import SaIConfig as SaIConfig
    from .integration import create_optimizer as create_optimizer
    from .integration import optimizer_cls_and_kwargs as optimizer_cls_and_kwargs
    from .integration import param_groups as param_groups
    from .live import OptimizerMismatchError as OptimizerMismatchError
    from .live import assert_optimizer as assert_optimizer
    from .lr_test import lr_find as lr_find
    from .optim import SWAN as SWAN
    from .optim import OptionError as OptionError
    from .optim import SGDSaI as SGDSaI
    from .optim import SGDSaILayerwise as SGDSaILayerwise
    from .optim import SWANLayerwise as SWANLayerwise
    from .optim import convert_lr as convert_lr
    from .optim import measure_gsnr as measure_gsnr
    from .optim import optimizer_state_bytes as optimizer_state_bytes
    from .registration import register as register
    from .registration import unregister as unregister
    from .report import GSNRReport as GSNRReport
    from .script_report import write_report as write_report
    from .trainer import SaITrainer as SaITrainer
    from .trainer import SaITrainerMixin as SaITrainerMixin
    from .trainer import make_trainer as make_trainer


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
