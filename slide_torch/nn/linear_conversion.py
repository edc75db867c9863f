"""An LSHLinear made from an nn.Linear, and the other way round: the two share their Parameters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn

from ..options import LSHOptions
from . import carry_over
from . import linear_checks as checks

if TYPE_CHECKING:
    from .linear import LSHLinear

# The attributes that an LSHLinear has and an nn.Linear lacks.
OWN_ATTRIBUTES = frozenset(
    ("options", "sparse", "output", "eval_active", "tables", "calibration", "_tied")
)


class Settings(NamedTuple):
    """The arguments that an LSHLinear has and an nn.Linear lacks."""

    options: LSHOptions | None
    sparse: bool
    output: str
    eval_active: str


def from_linear(
    linear: Any,
    cls: type[LSHLinear],
    settings: Settings,
    *,
    classes: tuple[type, ...],
    own_hooks: tuple[Any, ...],
) -> LSHLinear:
    """See :meth:`LSHLinear.from_linear`.

    Args:
        cls: the class of the new layer.
        classes, own_hooks: see :func:`carry_over.check_carried`.
    """
    where = "LSHLinear.from_linear: linear"
    if not isinstance(linear, nn.Linear):
        raise ValueError(f"{where}: expected nn.Linear, got {type(linear).__name__}")
    carry_over.check_carried(linear, where, classes=classes, own_hooks=own_hooks)
    weight, bias = linear.weight, linear.bias
    checks.check_shapes(where, weight, bias)
    in_features, out_features = checks.check_arguments(
        weight.shape[1], weight.shape[0], settings.options, weight.device, weight.dtype
    )
    options = checks.options_of(
        settings.options, out_features, settings.output, settings.eval_active
    )
    layer = cls.__new__(cls)
    nn.Module.__init__(layer)
    layer.in_features = in_features
    layer.out_features = out_features
    layer.weight = weight
    layer.register_parameter("bias", bias)
    layer._set_up(options, settings.sparse, settings.output, settings.eval_active)
    own = frozenset[str]() if type(linear) is nn.Linear else OWN_ATTRIBUTES
    carry_over.check_names(linear, layer, where, own)
    carry_over.carry_over(linear, layer, own)
    return layer


def to_linear(layer: LSHLinear, *, own_hooks: tuple[Any, ...]) -> nn.Linear:
    """See :meth:`LSHLinear.to_linear`."""
    where = "LSHLinear.to_linear: layer"
    carry_over.check_carried(layer, where, classes=(type(layer),), own_hooks=own_hooks)
    linear = nn.Linear.__new__(nn.Linear)
    nn.Module.__init__(linear)
    linear.out_features, linear.in_features = layer.weight.shape
    carry_over.check_names(layer, linear, where, OWN_ATTRIBUTES)
    carry_over.carry_over(layer, linear, OWN_ATTRIBUTES)
    return linear
