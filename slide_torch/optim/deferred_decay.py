"""Decoupled weight decay that a row catches up with when it is next touched."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .. import ops

# Rows that catch up at a time, which bounds the memory for their values.
_BLOCK = 65_536


class DeferredDecay(NamedTuple):
    """How far the rows of a parameter have decayed: views of an optimizer's state, changed in place.

    A row is multiplied by ``exp(total - seen)``, both rounded alike: the next interval undoes the rounding of
    the last one, and a row that was touched in the last step keeps its bits.

    Attributes:
        param: the parameter, (N, ...).
        total: float64 (), the sum over all steps of ``log1p(-lr * weight_decay)``.
        seen: (N), what ``total`` was after each row's last step, in the dtype of the parameter but float32 at
            least.
    """

    param: Tensor
    total: Tensor
    seen: Tensor

    def catch_up_(self, rows: Tensor | None, step: int) -> None:
        """Decays ``rows`` (None: all) as far as ``total``; ``step``, the steps so far, seeds the rounding of
        bfloat16."""
        missed = self.total.to(self.seen.dtype) - (self.seen if rows is None else self.seen[rows])
        behind = missed.nonzero().flatten()
        for part in behind.split(_BLOCK):
            numbers = part if rows is None else rows[part]
            lost = torch.expm1(missed[part]).neg_()
            values = self.param[numbers]
            decay = values * lost.view(lost.shape + (1,) * (values.dim() - 1))
            # SGD at rate 1 subtracts in one pass, and rounds bfloat16 stochastically
            ops.sgd_rows_(
                self.param,
                None,
                numbers,
                decay.to(self.param.dtype),
                lr=1.0,
                momentum=0.0,
                weight_decay=0.0,
                nesterov=False,
                maximize=False,
                step=-1 - step,  # other bits than those of a step
            )

    def count_(self, lr: float, weight_decay: float) -> None:
        """Counts the decay of a step."""
        self.total.add_(math.log1p(-lr * weight_decay))

    def mark_(self, rows: Tensor | None) -> None:
        """Says that ``rows`` (None: all) have decayed as far as ``total``."""
        if rows is None:
            self.seen.fill_(self.total.item())
        else:
            self.seen[rows] = self.total.to(self.seen.dtype)
