"""The output layers that time_to_accuracy.py trains: all of nn.Linear's shape and initialisation, each with
its own loss and optimizer; evaluation reads their weight and bias."""

from __future__ import annotations

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.common.classifier import loss_of as decoupled_softmax
from slide_torch import LSHLinear, LSHOptions, SampledLogits
from slide_torch.data import IGNORE_INDEX
from slide_torch.ops import topk_linear
from slide_torch.optim import Adagrad, Adam

__all__ = ["DenseLayer", "LSHLayer", "SampledLayer", "loss_of"]

# The rate of row-wise Adagrad for each unit of the body's, of Adam.
HEAD_RATE = 20.0


def loss_of(logits: Tensor | SampledLogits, labels: Tensor) -> Tensor:
    """Decoupled softmax of labels (B, M), padded with IGNORE_INDEX: the same loss for every contender. Of one
    label a row it is the plain cross entropy, which costs less."""
    if labels.shape[1] == 1:
        return F.cross_entropy(logits, labels[:, 0], ignore_index=IGNORE_INDEX)
    return decoupled_softmax(logits, labels)


class DenseLayer(nn.Module):
    """Every class, every step, with torch's fused Adam. Variants compute the same loss:

    - ``eager``: ``F.linear`` and a log-softmax.
    - ``compile``: the same under ``torch.compile``.
    - ``linear_cross_entropy``: ``F.linear_cross_entropy``, where every row has one label.

    With ``bf16`` logits are computed under autocast, the loss of them in float32.
    """

    VARIANTS = ("eager", "compile", "linear_cross_entropy")
    FEW_VARIANTS = ("eager", "compile")

    def __init__(self, linear: nn.Linear, variant: str, bf16: bool = False) -> None:
        super().__init__()
        self.linear = linear
        self._compute = partial(_dense_loss, bf16=bf16)
        if variant == "linear_cross_entropy":
            self._compute = _linear_cross_entropy
        elif variant == "compile":
            self._compute = torch.compile(self._compute, dynamic=True)

    def loss(self, hidden: Tensor, labels: Tensor) -> Tensor:
        return self._compute(hidden, self.linear.weight, self.linear.bias, labels)

    def classes(self) -> tuple[float, float]:
        """Classes whose rows the last step read, and how many of them a sample met."""
        return self.linear.out_features, self.linear.out_features

    def optimizers(
        self, body: nn.Module, lr: float, decay: float, *, row_wise: bool
    ) -> list[torch.optim.Optimizer]:
        """torch's Adam, whatever ``row_wise`` says: in row-wise Adagrad a dense layer learns less."""
        return [
            Adam(body.parameters(), lr=lr),
            torch.optim.AdamW(self.parameters(), lr=lr, weight_decay=decay, fused=True),
        ]


def _dense_loss(
    hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, *, bf16: bool
) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        logits = F.linear(hidden, weight, bias)
    return loss_of(logits.float() if bf16 else logits, labels)


def _linear_cross_entropy(hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
    return F.linear_cross_entropy(
        hidden, weight, labels[:, 0], linear_bias=bias, ignore_index=IGNORE_INDEX
    )


class SampledLayer(nn.Module):
    """Sampled softmax in plain torch: the batch's labels are the classes, one set for all rows.

    Args:
        drawn: classes drawn uniformly besides.
        corrected: adds log((N - labels) / drawn) to the logits of those, which makes the softmax's
            normaliser an unbiased estimate of the full one.
        log_uniform: draws with replacement, ids being sorted by falling frequency: class i with
            probability q = log((i + 2) / (i + 1)) / log(N + 1); corrected by
            -log(1 - (1 - q) ** drawn), the probability of being drawn at all.
        exact: besides, the so many largest logits of every row, found exactly at the cost of all N.

    Its gradients are row-sparse, for slide_torch's optimizers, which are faster than torch.optim.SparseAdam.
    """

    def __init__(
        self,
        linear: nn.Linear,
        drawn: int = 0,
        corrected: bool = False,
        exact: int = 0,
        log_uniform: bool = False,
    ) -> None:
        super().__init__()
        self.linear = linear
        self.drawn, self.corrected, self.exact = drawn, corrected, exact
        self.log_uniform = log_uniform
        self._classes = 0

    def loss(self, hidden: Tensor, labels: Tensor) -> Tensor:
        weight, bias = self.linear.weight, self.linear.bias
        neurons = self.linear.out_features
        kept = labels != IGNORE_INDEX
        parts = [labels[kept]]
        if self.exact:
            best = min(self.exact, neurons)
            with torch.no_grad():
                parts.append(topk_linear(hidden.detach(), weight, bias, best)[1].flatten())
        certain = torch.cat(parts).unique()
        classes = certain
        if self.drawn:
            classes = torch.cat([certain, self._draw(neurons)]).unique()
        self._classes = len(classes)
        rows = F.embedding(classes, weight, sparse=True)
        logits = torch.addmm(bias.gather(0, classes, sparse_grad=True), hidden, rows.T)
        if self.corrected or self.log_uniform:
            if self.log_uniform:
                share = (1 / (classes + 1.0)).log1p() / math.log(neurons + 1)
                shift = -(1 - (1 - share) ** self.drawn).log()
            else:
                shift = torch.tensor((neurons - len(certain)) / max(1, len(classes) - len(certain)))
                shift = shift.log().repeat(len(classes))
            shift[torch.searchsorted(classes, certain)] = 0
            logits = logits + shift
        places = torch.searchsorted(classes, labels.clamp(min=0))
        return loss_of(logits, torch.where(kept, places, IGNORE_INDEX))

    def _draw(self, neurons: int) -> Tensor:
        if not self.log_uniform:
            return torch.randint(neurons, (self.drawn,))
        exponent = torch.rand(self.drawn, dtype=torch.float64) * math.log(neurons + 1)
        return (exponent.exp().long() - 1).clamp(max=neurons - 1)

    def classes(self) -> tuple[float, float]:
        """Classes whose rows the last step read, and how many of them a sample met."""
        return self._classes, self._classes

    def optimizers(
        self, body: nn.Module, lr: float, decay: float, *, row_wise: bool
    ) -> list[torch.optim.Optimizer]:
        return _row_sparse_optimizers(body, self, lr, decay, row_wise)


class LSHLayer(nn.Module):
    """LSHLinear; Adam updates it inside backward."""

    def __init__(self, linear: nn.Linear, options: LSHOptions) -> None:
        super().__init__()
        self.linear = LSHLinear.from_linear(linear, options=options, sparse=True)

    def loss(self, hidden: Tensor, labels: Tensor) -> Tensor:
        return loss_of(self.linear(hidden), labels)

    def classes(self) -> tuple[float, float]:
        """Classes whose rows the last step read, and how many of them a sample met."""
        stats = self.linear.stats()
        return stats["union"], stats["active_per_sample"]

    def optimizers(
        self, body: nn.Module, lr: float, decay: float, *, row_wise: bool
    ) -> list[torch.optim.Optimizer]:
        return _row_sparse_optimizers(body, self, lr, decay, row_wise, fuse_backward=True)


def _row_sparse_optimizers(
    body: nn.Module, head: nn.Module, lr: float, decay: float, row_wise: bool, **of_adam: bool
) -> list[torch.optim.Optimizer]:
    """Adam for all; or for the head row-wise Adagrad, as in examples/common/recipe.py."""
    if row_wise:
        own = {"params": list(head.parameters()), "weight_decay": decay / HEAD_RATE}
        return [
            Adam(body.parameters(), lr=lr),
            Adagrad([own], lr=HEAD_RATE * lr, row_wise=True),
        ]
    own = {"params": list(head.parameters()), "weight_decay": decay, **of_adam}
    return [Adam([{"params": list(body.parameters())}, own], lr=lr)]
