"""The extension module, loaded once, and what every operator's Python side is made with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch

from .. import _C  # type: ignore[attr-defined]  # noqa: F401  (importing it registers the operators)

operators: Any = torch.ops.slide_torch

# Shapes and dtypes of an operator's results, given its arguments by the names of its schema.
Shapes = Callable[[SimpleNamespace], Any]


def argument_names(name: str) -> list[str]:
    """The arguments of the operator ``slide_torch::name``, in order."""
    return [argument.name for argument in _schema(name).arguments]


def result_names(name: str) -> list[str]:
    """The results of the operator ``slide_torch::name``, in order; empty strings where it names none."""
    return [result.name for result in _schema(name).returns]


def bind(name: str, args: Sequence[Any], kwargs: dict[str, Any] | None = None) -> SimpleNamespace:
    """The arguments of a call of ``slide_torch::name`` by their names, defaults included."""
    bound = SimpleNamespace(**{a.name: a.default_value for a in _schema(name).arguments})
    bound.__dict__.update(zip(argument_names(name), args, strict=False))
    bound.__dict__.update(kwargs or {})
    return bound


def fake(*names: str) -> Callable[[Shapes], Shapes]:
    """Registers a function of :func:`bind`'s result as the fake (shape-only) version of operators."""

    def register(shapes: Shapes) -> Shapes:
        for name in names:

            def of_call(*args: Any, _name: str = name, **kwargs: Any) -> Any:
                return shapes(bind(_name, args, kwargs))

            torch.library.register_fake(f"slide_torch::{name}", of_call)
        return shapes

    return register


def instruction_set() -> str:
    """The level of the kernels in use: ``"baseline"``, ``"avx2"``, ``"avx2_vnni"``, ``"avx512"`` or
    ``"avx512_vnni"``. Those with VNNI sum products of bytes by one instruction: the same sums.

    It is the best of this machine unless the environment variable ``SLIDE_TORCH_ISA`` names another
    before the first use.
    """
    return operators.instruction_set()


def _schema(name: str) -> Any:
    return getattr(operators, name).default._schema
