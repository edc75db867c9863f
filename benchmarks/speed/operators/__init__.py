"""A case for each operator, in the file of its subject. To add an operator: a function marked with @case."""

from . import active_set, hashing, losses, rows, topk
from .case import CASES, Case
from .problem import Problem

__all__ = ["CASES", "Case", "Problem", "active_set", "hashing", "losses", "rows", "topk"]
