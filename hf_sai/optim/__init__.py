"""The optimizers. Needs torch only, and serves any training loop."""

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
