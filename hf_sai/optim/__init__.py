"""The optimizers. Needs torch only, and serves any training loop."""

from .gsnr import GradientMoments, TensorGSNR, gradient_moments, gradient_snr
from .layerwise import SGDSaILayerwise, SWANLayerwise
from .measure import convert_lr, measure_gsnr
from .presets import swan_preset
from .registry import (
    OptimizerRecord,
    OptionError,
    get_record,
    list_records,
    parse_options,
    register_record,
    unregister_record,
)
from .routing import Route, route_parameters
from .sgd_sai import SGDSaI
from .swan import SWAN
from .tensors import optimizer_state_bytes


__all__ = [
    "SWAN",
    "GradientMoments",
    "OptimizerRecord",
    "OptionError",
    "Route",
    "SGDSaI",
    "SGDSaILayerwise",
    "SWANLayerwise",
    "TensorGSNR",
    "convert_lr",
    "get_record",
    "gradient_moments",
    "gradient_snr",
    "list_records",
    "measure_gsnr",
    "optimizer_state_bytes",
    "parse_options",
    "register_record",
    "route_parameters",
    "swan_preset",
    "unregister_record",
]
