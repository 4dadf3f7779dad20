"""The optimizers. Needs torch only, and serves any training loop."""

from .gsnr import GradientMoments, gradient_moments, gradient_snr
from .registry import OptimizerRecord, OptionError, get_record, list_records, parse_options
from .sgd_sai import SGDSaI, TensorGSNR


__all__ = [
    "GradientMoments",
    "OptimizerRecord",
    "OptionError",
    "SGDSaI",
    "TensorGSNR",
    "get_record",
    "gradient_moments",
    "gradient_snr",
    "list_records",
    "parse_options",
]
