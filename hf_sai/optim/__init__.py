"""The optimizers. Needs torch only, and serves any training loop."""

from .gsnr import GradientMoments, TensorGSNR, gradient_moments, gradient_snr
from .layerwise import SGDSaILayerwise
from .measure import convert_lr, measure_gsnr
from .registry import OptimizerRecord, OptionError, get_record, list_records, parse_options
from .sgd_sai import SGDSaI


__all__ = [
    "GradientMoments",
    "OptimizerRecord",
    "OptionError",
    "SGDSaI",
    "SGDSaILayerwise",
    "TensorGSNR",
    "convert_lr",
    "get_record",
    "gradient_moments",
    "gradient_snr",
    "list_records",
    "measure_gsnr",
    "parse_options",
]
