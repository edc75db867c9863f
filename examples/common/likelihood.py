"""The exact likelihood of a text, over all words of the vocabulary."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["exact_losses", "log_frequency", "perplexity"]


@torch.no_grad()
def exact_losses(
    hidden: Tensor, targets: Tensor, weight: Tensor, bias: Tensor, block: int = 8192
) -> Tensor:
    """Cross entropy over all N classes of each row, (n); ``block`` classes at a time, never (n, N)."""
    normaliser = torch.full((len(hidden),), -math.inf)
    for start in range(0, len(weight), block):
        part = slice(start, start + block)
        logits = F.linear(hidden, weight[part], bias[part])
        normaliser = torch.logaddexp(normaliser, logits.logsumexp(1))
    return normaliser - (hidden * weight[targets]).sum(1) - bias[targets]


def log_frequency(counts: np.ndarray) -> Tensor:
    """Of words that occur ``counts`` (N) times, one added to each: float32 (N)."""
    return torch.from_numpy(np.log((counts + 1) / (counts + 1).sum())).float()


@torch.no_grad()
def perplexity(
    hidden: Callable[[Tensor], Tensor], windows: np.ndarray, weight: Tensor, bias: Tensor
) -> float:
    """Exact, of the last T words of each of ``windows`` (n, T + 1), read from a blank state; ``hidden`` gives
    what is known after each of (B, T) words."""
    losses = [
        exact_losses(hidden(part[:, :-1]).flatten(0, -2), part[:, 1:].flatten(), weight, bias)
        for part in torch.from_numpy(windows).split(max(1, 2048 // (windows.shape[1] - 1)))
    ]
    return math.exp(torch.cat(losses).double().mean().item())
