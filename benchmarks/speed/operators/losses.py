"""Cross entropy over active sets, its gradients, and Adam inside backward."""

from __future__ import annotations

import torch

from .case import Case, case
from .problem import Problem


def shared_arguments(p: Problem) -> tuple:
    places = p.labels.offsets, p.shared.label_places, p.labels.probabilities
    return p.input, p.weight, p.bias, p.shared.rows, None, *places, 1.0, False, True


def sample_arguments(p: Problem) -> tuple:
    s = p.sample
    places = p.labels.offsets, s.label_places, p.labels.probabilities
    active = s.rows, s.offsets, s.pair_offsets, s.pair_positions, s.pair_samples
    return p.input, p.weight, p.bias, *active, None, *places, 1.0, False, True


@case
def shared_cross_entropy(p: Problem) -> Case:
    pairs, arguments = p.shared.rows.numel() * p.batch, shared_arguments(p)
    return Case(
        lambda: torch.ops.slide_torch.shared_cross_entropy(*arguments),
        {"row_read": p.row_bytes(p.shared.rows)},
        2 * pairs * p.width,
    )


@case
def shared_cross_entropy_backward(p: Problem) -> Case:
    x, weight, _, rows, _, *places, _, _, _ = arguments = shared_arguments(p)
    _, *kept = torch.ops.slide_torch.shared_cross_entropy(*arguments)
    grad_loss = torch.full((p.batch,), 1 / p.batch)
    backward = torch.ops.slide_torch.shared_cross_entropy_backward
    return Case(
        lambda: backward(grad_loss, x, weight, rows, *places, *kept, False, True, True),
        {"row_read": p.row_bytes(rows), "write": p.row_bytes(rows)},
        4 * rows.numel() * p.batch * p.width,
    )


@case
def sample_cross_entropy(p: Problem) -> Case:
    arguments = sample_arguments(p)
    return Case(
        lambda: torch.ops.slide_torch.sample_cross_entropy(*arguments),
        {"row_read": p.row_bytes(p.sample.rows)},
        2 * p.sample.active.numel() * p.width,
    )


@case
def sample_cross_entropy_backward(p: Problem) -> Case:
    x, weight, _, rows, *active, _, _, _, _, _, _, _ = arguments = sample_arguments(p)
    places = arguments[-6:-3]
    _, *kept = torch.ops.slide_torch.sample_cross_entropy(*arguments)
    grad_loss = torch.full((p.batch,), 1 / p.batch)
    backward = torch.ops.slide_torch.sample_cross_entropy_backward
    return Case(
        lambda: backward(grad_loss, x, weight, rows, *active, *places, *kept, False, True, True),
        {"row_read": p.row_bytes(rows), "write": p.row_bytes(rows)},
        4 * p.sample.active.numel() * p.width,
    )


@case
def sample_cross_entropy_backward_adam_(p: Problem) -> Case:
    x, weight, _, rows, *active, _, _, _, _, _, _, _ = arguments = sample_arguments(p)
    places = arguments[-6:-3]
    _, *kept = torch.ops.slide_torch.sample_cross_entropy(*arguments)
    grad_loss = torch.full((p.batch,), 1 / p.batch)
    backward = torch.ops.slide_torch.sample_cross_entropy_backward_adam_
    adam = torch.zeros_like(weight), torch.zeros_like(weight), 1e-9, 0.9, 0.999, 1e-8, 0.0, 5, False
    return Case(
        lambda: backward(grad_loss, x, weight, rows, *active, *places, *kept, False, True, *adam),
        {"row_update": 6 * p.row_bytes(rows)},
        4 * p.sample.active.numel() * p.width,
    )
