"""The same mathematics in plain torch and Python: slow, short, what every kernel is tested against."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def hadamard_matrix(size: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """The Sylvester Hadamard matrix (size, size), size a power of two."""
    H = torch.ones(1, 1, dtype=dtype)
    while H.shape[0] < size:
        H = torch.cat([torch.cat([H, H], 1), torch.cat([H, -H], 1)], 0)
    return H


def simhash_hadamard_values(
    input: Tensor, bias: Tensor | None, signs: Tensor, bias_projection: Tensor
) -> Tensor:
    """What SimHash takes the signs of, by rotations H S3 H S2 H S1: (n, rotations * size)."""
    n, d = input.shape
    rotations, _, size = signs.shape
    H = hadamard_matrix(size, input.dtype)
    padded = torch.cat([input, input.new_zeros(n, size - d)], 1)
    values = []
    for r in range(rotations):
        x = padded
        for s in signs[r].to(input.dtype):
            x = (x * s) @ H
        if bias is not None:
            x = x + size * bias[:, None] * bias_projection[r].to(input.dtype)
        values.append(x)
    return torch.cat(values, 1)


def pack_bits(bits: Tensor, K: int, L: int) -> Tensor:
    """Booleans (n, >= K L) -> codes int64 (L, n): hash k of a table is bit k of its code."""
    n = bits.shape[0]
    grouped = bits[:, : K * L].view(n, L, K).to(torch.int64)
    return (grouped << torch.arange(K)).sum(2).T.contiguous()


def simhash_dense_values(input: Tensor, bias: Tensor | None, projection: Tensor) -> Tensor:
    """What SimHash takes the signs of, by an explicit matrix: (n, K * L)."""
    x = input if bias is None else torch.cat([input, bias[:, None]], 1)
    return x @ projection.to(x.dtype).T


def dwta_winners(input: Tensor, bias: Tensor | None, coordinates: Tensor) -> Tensor:
    """Place of the largest non-zero coordinate of each bin, -1 for an empty bin: int64 (n, K * L)."""
    x = input if bias is None else torch.cat([input, bias[:, None]], 1)
    bins = x[:, coordinates.long()]
    absent = bins == 0
    winners = bins.masked_fill(absent, float("-inf")).argmax(2)
    return winners.masked_fill(absent.all(2), -1)


def small_integers(x: Tensor, extras: int) -> tuple[Tensor, Tensor]:
    """x (n, width) as ``nearest_in_groups`` codes it, and the unit (n) that its integers are multiples of:
    int64 of at most 63 in magnitude, the last ``extras`` in sixteenths up to 1023; halves away from zero."""
    features = x.shape[1] - extras
    unit = x[:, :features].abs().amax(1) / 63
    if extras:
        unit = torch.maximum(unit, x[:, features:].abs().amax(1) / 1023)
    finer = torch.tensor([1.0] * features + [16.0] * extras, dtype=x.dtype)
    doubled = (x * ((2 / unit)[:, None] * finer)).long()
    codes = doubled.sign() * ((doubled.abs() + 1) // 2)
    return codes.masked_fill(unit[:, None] == 0, 0), unit


def nearest_in_groups(
    x: Tensor,
    extras: int,
    centroids: Tensor,
    group_centroids: Tensor,
    offsets: Tensor,
    members: Tensor,
    looked: int,
) -> Tensor:
    """Each row's best centroid of those in its ``looked`` best groups; of equal ones the first."""
    features = x.shape[1] - extras
    rows, _ = small_integers(x, extras)

    def scores(vectors: Tensor) -> Tensor:
        codes, unit = small_integers(vectors, extras)
        sums = rows[:, features:] @ codes[:, features:].T >> 8
        return (sums + rows[:, :features] @ codes[:, :features].T).float() * unit

    sizes = offsets.diff()
    coarse = scores(group_centroids).masked_fill(sizes == 0, -torch.inf)
    best = coarse.argsort(dim=1, descending=True, stable=True)[:, :looked]
    allowed = torch.zeros_like(coarse, dtype=torch.bool).scatter_(1, best, True)
    group = torch.empty_like(members, dtype=torch.long)
    group[members.long()] = torch.arange(len(sizes)).repeat_interleave(sizes)
    fine = scores(centroids).masked_fill(~allowed[:, group], -torch.inf)
    return (fine == fine.amax(1, keepdim=True)).int().argmax(1)


def buckets(codes: Tensor) -> list[dict[int, list[int]]]:
    """Codes (L, N) -> for each table, neurons by code."""
    tables = []
    for row in codes.tolist():
        table: dict[int, list[int]] = {}
        for neuron, code in enumerate(row):
            table.setdefault(code, []).append(neuron)
        tables.append(table)
    return tables


def collision_counts(row_codes: Tensor, query_codes: Tensor) -> Tensor:
    """In how many tables each query shares each neuron's bucket: int64 (B, N)."""
    return (query_codes.T[:, :, None] == row_codes[None]).sum(1)


def sampled_cross_entropy(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    active: Tensor,
    target: Tensor,
    log_weight: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:
    """Losses (B) of softmax cross entropy over active sets, by masking dense logits.

    Args:
        input: (B, d); weight: (N, d); bias: (N) or None.
        active: bool (B, N), which neurons a sample computes.
        target: probabilities (B, N), zero where not active.
        log_weight: (B, N), added to the logits, or None.
        scale: factor of the logits.
    """
    logits = F.linear(input, weight, bias) * scale
    if log_weight is not None:
        logits = logits + log_weight
    log_normalizer = logits.masked_fill(~active, float("-inf")).logsumexp(1, keepdim=True)
    return (target * (log_normalizer - logits)).sum(1)


def sampled_binary_cross_entropy(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    active: Tensor,
    target: Tensor,
    row_weight: Tensor,
    scale: float = 1.0,
) -> Tensor:
    """Losses (B) of binary cross entropy over active sets: ``row_weight`` (B, N) times the share of a target
    of 0, and the labels' own; ``active`` bool (B, N), ``target`` (B, N)."""
    logits = F.linear(input, weight, bias) * scale
    negatives = (F.softplus(logits) * row_weight).masked_fill(~active, 0)
    return (negatives - target * logits).sum(1)


def decoupled_cross_entropy(logits: Tensor, target: Tensor, positive: Tensor) -> Tensor:
    """Losses (B) of the decoupled softmax: each label against the row's negatives alone.

    Args:
        logits: (B, N), -inf where not active.
        target: probabilities (B, N).
        positive: bool (B, N), which classes are labels of a row; others are its negatives.
    """
    negatives = logits.masked_fill(positive, float("-inf"))
    losses = logits.new_zeros(logits.shape[0])
    for label in positive.any(0).nonzero().flatten().tolist():
        rows = positive[:, label].nonzero().flatten()
        own = logits[rows, label]
        log_normalizer = torch.cat([own[:, None], negatives[rows]], 1).logsumexp(1)
        losses = losses.index_add(0, rows, target[rows, label] * (log_normalizer - own))
    return losses
