"""The optimizers. Needs torch only, and serves any training loop."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any


# Module to the names that are found there when they are asked for: `hf_sai.optim.facts` needs no torch.
_NAMES = {
    ".gsnr": "GradientMoments TensorGSNR gradient_moments gradient_snr",
    ".layerwise": "SGDSaILayerwise SWANLayerwise",
    ".measure": "convert_lr measure_gsnr",
    ".presets": "swan_preset",
    ".registry": "OptimizerRecord OptionError get_record list_records parse_options register_record unregister_record",
    ".routing": "Route route_parameters",
    ".sgd_sai": "SGDSaI",
    ".swan": "SWAN",
    ".tensors": "optimizer_state_bytes",
}
_HOME = {name: module for module, names in _NAMES.items() for name in names.split()}
__all__ = sorted(_HOME)

if TYPE_CHECKING:  # the same for a type checker or an editor, which runs nothing; a test keeps both in step
    from .gsnr import GradientMoments as GradientMoments
    from .gsnr import TensorGSNR as TensorGSNR
    from .gsnr import gradient_moments as gradient_moments
    from .gsnr import gradient_snr as gradient_snr
    from .layerwise import SGDSaILayerwise as SGDSaILayerwise
    from .layerwise import SWANLayerwise as SWANLayerwise
    from .measure import convert_lr as convert_lr
    from .measure import measure_gsnr as measure_gsnr
    from .presets import swan_preset as swan_preset
    from .registry import OptimizerRecord as OptimizerRecord
    from .registry import OptionError as OptionError
    from .registry import get_record as get_record
    from .registry import list_records as list_records
    from .registry import parse_options as parse_options
    from .registry import register_record as register_record
    from .registry import unregister_record as unregister_record
    from .routing import Route as Route
    from .routing import route_parameters as route_parameters
    from .sgd_sai import SGDSaI as SGDSaI
    from .swan import SWAN as SWAN
    from .tensors import optimizer_state_bytes as optimizer_state_bytes


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name], __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
