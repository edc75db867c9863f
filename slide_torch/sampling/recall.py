"""Recall of the tables: which of the neurons with the largest logits are among the candidates."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..precision import blocks, some_rows

ROWS_AT_ONCE = 16  # inputs whose logits over all neurons are held together


class Exact(NamedTuple):
    """The exact answers for n inputs.

    Attributes:
        top: int64 (n, k), the neurons of the k largest logits.
        log_normalizer: (n), the log of the softmax's denominator.
    """

    top: Tensor
    log_normalizer: Tensor

    @staticmethod
    def of(weight: Tensor, bias: Tensor | None, input: Tensor, k: int) -> Exact:
        """The answers for ``input`` (n, d), in the dtype that is computed in."""
        tops, normalizers = [], []
        for some in input.split(ROWS_AT_ONCE):  # no inputs are one empty part
            logits = _dense_logits(weight, bias, some)
            tops.append(logits.topk(k, dim=1).indices)
            normalizers.append(logits.logsumexp(1))
        return Exact(torch.cat(tops), torch.cat(normalizers))


def _dense_logits(weight: Tensor, bias: Tensor | None, input: Tensor) -> Tensor:
    if weight.dtype != torch.bfloat16:
        return F.linear(input, weight, bias)
    parts = [F.linear(input, *some_rows(weight, bias, block)) for block in blocks(weight.shape[0])]
    return torch.cat(parts, 1)


def found_among(top: Tensor, offsets: Tensor, candidates: Tensor, neurons: int) -> Tensor:
    """Which of the neurons ``top`` int64 (n, k) are among the candidates of their input: bool (n, k), whose
    mean is the recall.

    Args:
        offsets: int64 (n + 1), where each input's candidates begin.
        candidates: int64 (pairs), from 0 to ``neurons`` - 1.
    """
    sample = torch.arange(top.shape[0])
    keys = sample.repeat_interleave(offsets.diff()) * neurons + candidates
    return torch.isin(sample.unsqueeze(1) * neurons + top, keys)


def softmax_mass(
    weight: Tensor,
    bias: Tensor | None,
    input: Tensor,
    log_normalizer: Tensor,
    offsets: Tensor,
    candidates: Tensor,
) -> Tensor:
    """The softmax probability of each input's candidates together, (n), for ``input`` (n, d)."""
    mass = torch.zeros_like(log_normalizer)
    for i, own in enumerate(candidates.split(offsets.diff().tolist())):
        rows, shift = some_rows(weight, bias, own)
        logits = rows @ input[i] if shift is None else rows @ input[i] + shift
        mass[i] = (logits - log_normalizer[i]).exp().sum()
    return mass
