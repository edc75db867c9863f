"""The extension module, loaded once, and what every operator's Python side is made with."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from .. import _C  # type: ignore[attr-defined]  # noqa: F401  (importing it registers the operators)

operators: Any = torch.ops.slide_torch
register_fake: Any = torch.library.register_fake


def differentiable_once(*names: str) -> None:
    """Makes the second derivative of these backward operators an error: without a formula torch would warn
    and take it for zero."""
    for name in names:
        torch.library.register_autograd(
            f"slide_torch::{name}", _refuse_twice, setup_context=_save_nothing
        )


def _refuse_twice(ctx: Any, *grads: Tensor) -> NoReturn:
    raise RuntimeError(
        "slide_torch: what is computed over active sets is differentiable once; backward with "
        "create_graph=True cannot be differentiated again"
    )


def _save_nothing(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    pass


def instruction_set() -> str:
    """The level of the kernels in use: ``"baseline"``, ``"avx2"`` or ``"avx512"``.

    It is the best of this machine unless the environment variable ``SLIDE_TORCH_ISA`` names another
    before the first use.
    """
    return str(operators.instruction_set())
