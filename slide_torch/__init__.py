"""LSHLinear: a drop-in for a huge nn.Linear output layer that trains only the neurons that matter."""

from . import functional, metrics, optim
from .convert import convert_
from .linear import LSHLinear
from .logits import SampledLogits
from .ops import instruction_set
from .options import LSHOptions
from .tables import HashTables

__version__ = "0.1.0"

__all__ = [
    "HashTables",
    "LSHLinear",
    "LSHOptions",
    "SampledLogits",
    "convert_",
    "functional",
    "instruction_set",
    "metrics",
    "optim",
]
