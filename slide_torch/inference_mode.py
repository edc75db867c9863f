"""Tensors made under ``torch.inference_mode()`` that training uses later, and their versions."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

_P = ParamSpec("_P")
_R = TypeVar("_R")


def keeps_normal_tensors(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Decorates a function whose result, or what it keeps, must be normal tensors: under inference mode torch
    makes *inference tensors*, which can never be written to, or saved for backward, outside of it."""

    @functools.wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        if not torch.is_inference_mode_enabled():
            return function(*args, **kwargs)
        with torch.inference_mode(False), torch.no_grad():
            return function(*args, **kwargs)

    return call


def version_of(tensor: Tensor) -> int:
    """How often ``tensor`` has been written to; of an inference tensor, which does not count this, -1."""
    return -1 if tensor.is_inference() else tensor._version
