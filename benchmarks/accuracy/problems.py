"""What a contender of time_to_accuracy.py is trained and judged on: training rows, held-out rows, the model's
body, the measure."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.common.generated import HIDDEN
from examples.common.classifier import Classifier, labels_of
from examples.common.recipe import warm_start_
from slide_torch import metrics
from slide_torch.data import SparseRows, batches
from slide_torch.ops import topk_linear

__all__ = ["Problem", "SparseProblem"]


class Problem(ABC):
    """What a contender is trained and judged on.

    Attributes:
        name: in records and titles.
        hidden: width of what the body gives to the output layer.
        num_labels: rows of the output layer.
        train_rows: rows of an epoch.
        metric: the key of :meth:`evaluate`'s answer by which settings are chosen and curves are drawn.
        larger_is_better: whether a larger value of it is better (precision), or a smaller one (perplexity).
        several_labels: whether a row may have more than one.
        start: what :meth:`start_` gives, "random" or how it learns from the training rows.
    """

    name: str
    hidden: int
    num_labels: int
    train_rows: int
    metric: str
    larger_is_better: bool
    several_labels: bool = False
    start: str = "random"

    @abstractmethod
    def body(self) -> nn.Module:
        """All but the output layer: features -> (B, hidden). Initialised from torch's generator; its
        parameters may have row-sparse gradients."""

    def start_(self, body: nn.Module, linear: nn.Linear, seed: int) -> None:  # noqa: B027
        """May give body and output layer other initial values, the same for every contender. Draws nothing
        from torch's generator, and is made once a seed."""

    @abstractmethod
    def batches(
        self, size: int, *, seed: int, skip: int = 0
    ) -> Iterator[tuple[tuple[Tensor, ...], Tensor]]:
        """One epoch of training rows, shuffled by ``seed``, without the first ``skip`` batches: the body's
        arguments, and labels (B, M), int64, padded with -100."""

    @abstractmethod
    def evaluate(
        self, body: nn.Module, weight: Tensor, bias: Tensor, part: str
    ) -> dict[str, float]:
        """Exact measures on the rows of ``part``, "validation" (a fixed subset) or "test" (all)."""

    def description(self) -> dict[str, Any]:
        """What two records must share to stand in one table."""
        names = ("name", "hidden", "num_labels", "train_rows", "metric", "larger_is_better")
        return {name: getattr(self, name) for name in names}


class SparseProblem(Problem):
    """Sparse rows with one or more labels each, judged by precision and propensity scored precision.

    Model and start are those of examples/common/recipe.py: a weighted bag of features without an activation,
    which begins at label embedding and class means.

    Args:
        classes: only the first so many labels, and rows that have one of them; 0 for all.
        validation_rows: so many of the validation rows, the same for everyone.
        propensity: constants A and B of the propensities, see ``slide_torch.metrics``.
    """

    metric = "P@1"
    larger_is_better = True
    hidden = HIDDEN
    start = "label embedding and class means"

    def __init__(
        self,
        name: str,
        parts: dict[str, SparseRows],
        num_features: int,
        num_labels: int,
        *,
        classes: int = 0,
        validation_rows: int = 5_000,
        propensity: tuple[float, float] = (0.55, 1.5),
    ) -> None:
        self.name = name
        self.num_features = num_features
        self.num_labels = num_labels
        if 0 < classes < num_labels:
            self.num_labels = classes
            parts = {part: with_first_labels(rows, classes) for part, rows in parts.items()}
        order = np.random.default_rng(0).permutation(len(parts["validation"]))
        parts = parts | {"validation": parts["validation"].select(order[:validation_rows])}
        self.parts = parts
        self.labels = {part: labels_of(parts[part]) for part in ("validation", "test")}
        self.train_rows = len(parts["train"])
        self.several_labels = bool(np.diff(parts["train"].label_indptr).max(initial=0) > 1)
        self._starts: dict[int, dict[str, Tensor]] = {}  # by seed
        counts = np.bincount(parts["train"].label_indices, minlength=self.num_labels)
        self.propensities = metrics.propensities(
            torch.from_numpy(counts), self.train_rows, *propensity
        )

    def body(self) -> nn.Module:
        return Classifier(self.num_features, self.hidden, nn.Identity())

    def start_(self, body: nn.Module, linear: nn.Linear, seed: int) -> None:
        if seed not in self._starts:
            self._starts = {seed: self.make_start(seed)}
        start = self._starts[seed]
        body.load_state_dict({"embedding.weight": start["embedding.weight"]})
        linear.load_state_dict({name: start[f"head.{name}"] for name in ("weight", "bias")})

    def make_start(self, seed: int) -> dict[str, Tensor]:
        """Weights of embedding and output layer, made from the training rows."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            head = nn.Linear(self.hidden, self.num_labels)
            model = Classifier(self.num_features, self.hidden, head)
            warm_start_(model, self.parts["train"], seed, progress=False)
        return model.state_dict()

    def batches(
        self, size: int, *, seed: int, skip: int = 0
    ) -> Iterator[tuple[tuple[Tensor, ...], Tensor]]:
        for *features, labels in batches(self.parts["train"], size, seed=seed, skip=skip):
            yield tuple(features), labels

    @torch.no_grad()
    def predict(self, body: nn.Module, weight: Tensor, bias: Tensor, part: str) -> Tensor:
        """The five best labels of each row by the exact logits, int64."""
        k = min(5, self.num_labels)
        found = [
            topk_linear(body(*features), weight, bias, k)[1]
            for *features, _ in batches(self.parts[part], 256)
        ]
        return torch.cat(found)

    def evaluate(
        self, body: nn.Module, weight: Tensor, bias: Tensor, part: str
    ) -> dict[str, float]:
        return self.score(self.predict(body, weight, bias, part), part)

    def score(self, predicted: Tensor, part: str) -> dict[str, float]:
        """P@1, P@5, PSP@1 and PSP@5 of ranked labels (rows, 5)."""
        labels, answer = self.labels[part], {}
        for k in (1, min(5, self.num_labels)):
            answer[f"P@{k}"] = metrics.precision_at_k(predicted, labels, k)
            answer[f"PSP@{k}"] = metrics.psp_at_k(predicted, labels, k, self.propensities)
        return answer

    def description(self) -> dict[str, Any]:
        held_out = {f"{part}_rows": len(self.parts[part]) for part in ("validation", "test")}
        about = {"num_features": self.num_features, "start": self.start}
        return super().description() | about | held_out


def with_first_labels(rows: SparseRows, classes: int) -> SparseRows:
    """The rows that have a label below ``classes``, with those labels only."""
    kept = rows.label_indices < classes
    before = np.concatenate([[0], np.cumsum(kept)])
    counts = np.diff(before[rows.label_indptr])
    chosen = rows.select(np.flatnonzero(counts))
    return SparseRows(
        chosen.feature_indptr,
        chosen.feature_indices,
        chosen.feature_values,
        np.concatenate([[0], np.cumsum(counts[counts > 0])]),
        rows.label_indices[kept],
    )
