"""LSHLinear: a drop-in for a huge nn.Linear output layer that trains only the neurons that matter."""

from . import functional, metrics, optim
from .nn.convert import convert_
from .nn.feed_forward import LSHFeedForward
from .nn.linear import LSHLinear
from .nn.sampled_logits import SampledLogits
from .ops import instruction_set
from .optim.clipping import clip_grad_norm_
from .options import LSHOptions
from .persistence import load_sampler_state, sampler_state
from .prediction.module import Predictor
from .prediction.topk import TopK
from .tables import HashTables
from .tuning.probe import RecallProbe
from .tuning.result import TuneResult
from .tuning.tune import tune

__version__ = "0.2.0"

__all__ = [
    "HashTables",
    "LSHFeedForward",
    "LSHLinear",
    "LSHOptions",
    "Predictor",
    "RecallProbe",
    "SampledLogits",
    "TopK",
    "TuneResult",
    "clip_grad_norm_",
    "convert_",
    "functional",
    "instruction_set",
    "load_sampler_state",
    "metrics",
    "optim",
    "sampler_state",
    "tune",
]
