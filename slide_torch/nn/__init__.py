"""The layers, and the logits that they return."""

from .convert import convert_
from .feed_forward import LSHFeedForward
from .linear import LSHLinear
from .sampled_logits import SampledLogits

__all__ = ["LSHFeedForward", "LSHLinear", "SampledLogits", "convert_"]
