"""Losses of a linear layer over active sets, as functions."""

from .binary_cross_entropy import lsh_linear_binary_cross_entropy
from .cross_entropy import lsh_linear_cross_entropy

__all__ = ["lsh_linear_binary_cross_entropy", "lsh_linear_cross_entropy"]
