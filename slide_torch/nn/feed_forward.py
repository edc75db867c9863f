"""LSHFeedForward: two linear layers with an activation between, over the hidden neurons that matter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import checked_int
from ..functional.checks import check_leaves
from ..ops.rows import advise_hugepages_
from ..options import LSHOptions
from ..storage import check_in_memory
from . import carry_over, hidden
from .linear import LSHLinear
from .linear_checks import MOST_FEATURES, MOST_NEURONS, check_parameters


class LSHFeedForward(nn.Module):
    r"""``activation(x @ W1.T + b1) @ W2 + b2`` over some of its hidden neurons: the feed-forward
    of a transformer block, or a wide MLP (SLIDE: Chen et al., MLSys 2020; adaptive dropout: Spring &
    Shrivastava, KDD 2017).

    In training, hash tables over the rows of W1 return the hidden neurons that matter for an input. Only
    their rows of W1 and W2 are read and get a gradient; the other neurons count as zero after the activation.
    In eval every neuron is active, or as many as in training.

    Args:
        in_features: width d of an input.
        hidden_features: number of hidden neurons N.
        out_features: width of an output; d if None.
        activation: an elementwise function or module. It is applied to the active values only, in an
            unspecified shape.
        bias: whether both layers have a bias.
        options: how active neurons are found; ``"auto"`` is resolved by
            :meth:`LSHOptions.for_hidden_layer`, to 5% of the hidden neurons. If None,
            ``LSHOptions(pattern="per_sample")``: a set for each input; with ``pattern="shared"`` the batch
            shares one set, computed in dense blocks.
        sparse: whether W1, its bias and W2 get row-sparse gradients, for :mod:`slide_torch.optim`.
        eval_active: ``"all"`` or ``"budget"``, see :class:`LSHLinear`.
        device: must be the CPU.
        dtype: float32 (default), float64 or bfloat16.

    Shape:
        - Input: (\*, d)
        - Output: (\*, out_features)

    Attributes:
        first: the :class:`LSHLinear` of W1 (N, d) and b1 (N), with the tables; its ``stats``, ``recall`` and
            ``rehash`` describe the whole layer.
        second_weight: W2, (N, out_features): the transpose of an ``nn.Linear``'s weight, so that each hidden
            neuron has one row.
        second_bias: (out_features), or None.

    Raises:
        ValueError: an argument is wrong, or an option does not apply to hidden layers.

    Examples:
        >>> block = LSHFeedForward(512, 65_536, sparse=True)
        >>> block(torch.randn(8, 16, 512)).shape
        torch.Size([8, 16, 512])
    """

    second_bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        out_features: int | None = None,
        *,
        activation: Callable[[Tensor], Tensor] = F.relu,
        bias: bool = True,
        options: LSHOptions | None = None,
        sparse: bool = False,
        eval_active: Literal["all", "budget"] = "all",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        _check_activation(activation)
        in_features = checked_int(in_features, 1, MOST_FEATURES, "LSHFeedForward: in_features")
        hidden_features = checked_int(
            hidden_features, 1, MOST_NEURONS, "LSHFeedForward: hidden_features"
        )
        width = in_features
        if out_features is not None:
            width = checked_int(out_features, 1, None, "LSHFeedForward: out_features")
        super().__init__()
        first = LSHLinear(
            in_features,
            hidden_features,
            bias,
            options=options,
            sparse=sparse,
            output="dense",
            eval_active=eval_active,
            device=device,
            dtype=dtype,
        )
        weight = first.weight.new_empty((hidden_features, width))
        second_bias = first.weight.new_empty((width,)) if bias else None
        self._set_up(first, activation, weight, second_bias)
        self._reset_second()

    def _set_up(
        self,
        first: LSHLinear,
        activation: Callable[[Tensor], Tensor],
        second_weight: Tensor,
        second_bias: Tensor | None,
    ) -> None:
        self.first = first
        self.activation = activation
        self.second_weight = nn.Parameter(second_weight)
        self.register_parameter(
            "second_bias", None if second_bias is None else nn.Parameter(second_bias)
        )

    @property
    def in_features(self) -> int:
        return self.first.in_features

    @property
    def hidden_features(self) -> int:
        return self.first.out_features

    @property
    def out_features(self) -> int:
        return self.second_weight.shape[1]

    def reset_parameters(self) -> None:
        """Initialises as two ``nn.Linear`` do; the tables are rebuilt at the next use."""
        self.first.reset_parameters()
        self._reset_second()

    def _reset_second(self) -> None:
        bound = self.hidden_features**-0.5
        if self.second_weight.device.type == "cpu":
            advise_hugepages_(self.second_weight.detach())
        nn.init.uniform_(self.second_weight, -bound, bound)
        if self.second_bias is not None:
            nn.init.uniform_(self.second_bias, -bound, bound)

    def forward(self, input: Tensor) -> Tensor:
        first = self.first
        self._check_parameters()
        drawn = first.draw_active(input)
        if drawn is None:
            values = self.activation(F.linear(input, first.weight, first.bias))
            return F.linear(values, self.second_weight.T, self.second_bias)
        check_in_memory("LSHFeedForward", second_weight=self.second_weight)
        if first.sparse:
            check_leaves(self.second_weight, None, "LSHFeedForward")
        flat, active = drawn
        values = hidden.into_active(flat, first.weight, first.bias, active, sparse=first.sparse)
        activated = self.activation(values)
        if activated.shape != values.shape:
            raise ValueError(
                "LSHFeedForward: activation: expected an elementwise function, got one that makes "
                f"{tuple(activated.shape)} of {tuple(values.shape)}"
            )
        output = hidden.out_of_active(
            activated.to(values.dtype), self.second_weight, active, sparse=first.sparse
        )
        if self.second_bias is not None:
            output = output + self.second_bias
        return output.reshape(*input.shape[:-1], self.out_features)

    def _check_parameters(self) -> None:
        """Checks the shapes of the parameters, and that none is computed by hooks of ``first``, which is
        never called."""
        check_parameters("LSHFeedForward: first", self.first, self.first.tables, called=False)
        weight, bias = self.second_weight, self.second_bias
        fits = weight.dim() == 2 and weight.shape[0] == self.hidden_features
        if not fits or (bias is not None and bias.shape != weight.shape[1:]):
            raise ValueError(
                "LSHFeedForward: second_weight: expected shape (hidden_features, out_features) = "
                f"({self.hidden_features}, out_features) and a second_bias (out_features), got "
                f"{tuple(weight.shape)} and {None if bias is None else tuple(bias.shape)}: of resized "
                "parameters make a new layer"
            )

    @classmethod
    def from_linears(
        cls,
        first: nn.Linear,
        second: nn.Linear,
        *,
        activation: Callable[[Tensor], Tensor] = F.relu,
        options: LSHOptions | None = None,
        sparse: bool = False,
        eval_active: Literal["all", "budget"] = "all",
    ) -> LSHFeedForward:
        """An LSHFeedForward made of the layers ``first`` and ``second`` of a model. It shares their
        Parameters, except the weight of ``second``, of which it holds a transposed copy: make the optimizer
        afterwards.

        Raises:
            ValueError: the layers do not follow each other, or differ in dtype; or one has hooks (neither is
                called as a module), or anything else that would be lost (see :meth:`LSHLinear.from_linear`).
        """
        for name, linear in (("first", first), ("second", second)):
            where = f"LSHFeedForward.from_linears: {name}"
            if not isinstance(linear, nn.Linear):
                raise ValueError(f"{where}: expected nn.Linear, got {type(linear).__name__}")
            carry_over.check_carried(linear, where)
            if carry_over.has_hooks(linear):
                raise ValueError(
                    f"{where}: expected a plain nn.Linear, got one with hooks, which would not be called: "
                    "remove them, and register them with the LSHFeedForward"
                )
        extras = carry_over.extras(second)
        if extras:
            raise ValueError(
                "LSHFeedForward.from_linears: second: expected a plain nn.Linear, of which only weight and "
                f"bias are kept, got one with {', '.join(extras)}: remove it first"
            )
        if second.in_features != first.out_features or second.weight.dtype != first.weight.dtype:
            raise ValueError(
                f"LSHFeedForward.from_linears: second: expected in_features {first.out_features}, "
                f"{first.weight.dtype}, as first gives, got {second.in_features}, {second.weight.dtype}"
            )
        _check_activation(activation)
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._set_up(
            LSHLinear.from_linear(
                first, options=options, sparse=sparse, output="dense", eval_active=eval_active
            ),
            activation,
            second.weight.detach().T.contiguous(),
            None,
        )
        layer.second_weight.requires_grad_(second.weight.requires_grad)
        layer.register_parameter("second_bias", second.bias)
        layer.training = first.training
        return layer

    def to_linears(self) -> tuple[nn.Linear, nn.Linear]:
        """Two ``nn.Linear``: the first shares W1 and b1, the second b2; its weight is a copy of W2,
        transposed."""
        second = nn.Linear.__new__(nn.Linear)
        nn.Module.__init__(second)
        second.in_features, second.out_features = self.hidden_features, self.out_features
        second.weight = nn.Parameter(
            self.second_weight.detach().T.contiguous(), self.second_weight.requires_grad
        )
        second.register_parameter("bias", self.second_bias)
        second.training = self.training
        return self.first.to_linear(), second

    def extra_repr(self) -> str:
        return f"out_features={self.out_features}, bias={self.second_bias is not None}"


def _check_activation(activation: Any) -> None:
    if not callable(activation):
        raise ValueError(f"LSHFeedForward: activation: expected a callable, got {activation!r}")
    if isinstance(activation, nn.PReLU) and activation.num_parameters != 1:
        raise ValueError(
            "LSHFeedForward: activation: expected nn.PReLU(num_parameters=1), got "
            f"{activation.num_parameters}: active values come without their channel"
        )
