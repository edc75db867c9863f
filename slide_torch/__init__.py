"""LSHLinear: a drop-in for a huge nn.Linear output layer that trains only the neurons that matter."""

from . import functional, metrics, optim
from .convert import convert_
from .feed_forward import LSHFeedForward
from .gradients import clip_grad_norm_
from .linear import LSHLinear
from .logits import SampledLogits
from .ops import instruction_set
from .options import LSHOptions
from .persistence import load_sampler_state, sampler_state
from .tables import HashTables
from .tune import TuneResult, tune
from .watch import RecallProbe

__version__ = "0.1.0"

__all__ = [
    "HashTables",
    "LSHFeedForward",
    "LSHLinear",
    "LSHOptions",
    "RecallProbe",
    "SampledLogits",
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
