"""A one-hidden-layer classifier over sparse rows: the model, its loss, exact evaluation, and a training loop
for an LSH head or a dense head."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from slide_torch import LSHLinear, SampledLogits
from slide_torch.data import IGNORE_INDEX, SparseRows, batches
from slide_torch.optim import Adam

from .checkpoint import checkpoint_of, load_checkpoint, save_checkpoint
from .machine import reset_peak_memory, resident_gb
from .run import Run

__all__ = [
    "Classifier",
    "candidate_recall",
    "labels_of",
    "loss_of",
    "precision_at_1",
    "predict",
    "train",
]


class Classifier(nn.Module):
    """Weighted bag of features -> ReLU -> one logit a label."""

    def __init__(self, num_features: int, hidden: int, head: nn.Module) -> None:
        super().__init__()
        self.embedding = nn.EmbeddingBag(
            num_features, hidden, mode="sum", include_last_offset=True, sparse=True
        )
        nn.init.normal_(self.embedding.weight, std=0.3)
        self.head = head

    def hidden(self, indices: Tensor, offsets: Tensor, values: Tensor) -> Tensor:
        return torch.relu(self.embedding(indices, offsets, per_sample_weights=values))

    def forward(self, indices: Tensor, offsets: Tensor, values: Tensor) -> Tensor | SampledLogits:
        return self.head(self.hidden(indices, offsets, values))


def loss_of(logits: Tensor | SampledLogits, labels: Tensor) -> Tensor:
    """Cross entropy against targets uniform over each row's labels, (B, M) padded with IGNORE_INDEX."""
    if isinstance(logits, SampledLogits):
        return F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX)
    kept = labels != IGNORE_INDEX
    count = kept.sum(1)
    own = F.log_softmax(logits, dim=1).gather(1, labels.clamp(min=0)) * kept
    return -(own.sum(1) / count.clamp(min=1)).sum() / (count > 0).sum().clamp(min=1)


@torch.no_grad()
def predict(model: Classifier, rows: SparseRows, k: int, *, progress: str | None = None) -> Tensor:
    """The k best labels of each row by the exact logits, int64 (n, k); blocks keep memory small."""
    model.eval()
    found = []
    bar = tqdm(total=len(rows), desc=progress, disable=progress is None, unit=" rows", leave=False)
    for indices, offsets, values, _ in batches(rows, 256):
        logits = model(indices, offsets, values)
        found.append(logits.topk(min(k, logits.shape[1]), dim=1).indices)
        bar.update(len(logits))
    bar.close()
    model.train()
    return torch.cat(found)


def labels_of(rows: SparseRows) -> Tensor:
    """All rows' labels as (n, M), padded with IGNORE_INDEX."""
    counts = np.diff(rows.label_indptr)
    padded = np.full((len(rows), max(1, counts.max(initial=0))), IGNORE_INDEX, dtype=np.int64)
    padded[np.arange(padded.shape[1]) < counts[:, None]] = rows.label_indices
    return torch.from_numpy(padded)


def precision_at_1(predicted: Tensor, labels: Tensor) -> float:
    return (labels == predicted[:, :1]).any(1).float().mean().item()


@torch.no_grad()
def candidate_recall(model: Classifier, rows: SparseRows) -> float:
    """Share of each row's exact top 10 that the LSH head's tables return within its budget."""
    assert isinstance(model.head, LSHLinear)
    shares = [
        model.head.recall(model.hidden(indices, offsets, values), 10)
        for indices, offsets, values, _ in batches(rows, 256)
    ]
    return float(np.mean(shares))


def train(
    run: Run,
    model: Classifier,
    rows: SparseRows,
    validation: SparseRows,
    *,
    batch_size: int,
    lr: float,
    seed: int,
    epochs: int | None = None,
    seconds: float | None = None,
    evaluate_every: Callable[[int], bool],
    checkpoint: Path | None = None,
    checkpoint_every: int = 1000,
) -> None:
    """Trains for whole epochs, or for a number of seconds; evaluation does not count as time.

    Where the file `checkpoint` exists, training goes on from it, bit for bit as if it had not stopped. Ctrl-C
    ends the training, not the program.
    """
    optimizer = Adam(model.parameters(), lr=lr)
    settings = {"rows": len(rows), "batch": batch_size, "lr": lr, "seed": seed}
    settings["head"] = repr(getattr(model.head, "options", None))
    if checkpoint is not None and checkpoint.exists():
        load_checkpoint(checkpoint, run, model, optimizer, settings)
    validation_labels = labels_of(validation)
    base = reset_peak_memory()
    steps_per_epoch = -(-len(rows) // batch_size)

    def evaluate() -> None:
        run.peak_gb = max(run.peak_gb, resident_gb("VmHWM") - base)
        score = precision_at_1(predict(model, validation, 1), validation_labels)
        run.curve.append((run.seconds, run.steps, score))
        reset_peak_memory()

    def step(batch: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
        *features, labels = batch
        started = time.perf_counter()
        loss = loss_of(model(*features), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.step_ms.append((time.perf_counter() - started) * 1e3)
        run.seconds += run.step_ms[-1] / 1e3
        run.steps += 1
        return loss

    def save() -> None:
        save_checkpoint(checkpoint, checkpoint_of(run, model, optimizer, settings))

    saved_at = run.steps
    done = False
    try:
        while not done and (epochs is None or run.steps < epochs * steps_per_epoch):
            epoch, skip = divmod(run.steps, steps_per_epoch)
            bar = tqdm(
                batches(rows, batch_size, seed=seed + epoch, skip=skip),
                initial=skip,
                total=steps_per_epoch if seconds is None else None,
                desc=f"{run.name}, epoch {epoch + 1}",
                unit=" steps",
            )
            for batch in bar:
                loss = step(batch)
                if run.steps % 20 == 0 and isinstance(model.head, LSHLinear):
                    run.active.append(model.head.stats()["active_per_sample"])
                if run.steps % 20 == 0 or seconds is not None:
                    bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
                done = seconds is not None and run.seconds >= seconds
                if done or evaluate_every(run.steps):
                    evaluate()
                if checkpoint is not None and run.steps % checkpoint_every == 0:
                    save()
                    saved_at = run.steps
                if done:
                    break
            bar.close()
    except KeyboardInterrupt:
        run.interrupted = True
        print(f"\n{run.name}: interrupted after {run.steps:,} steps; evaluating what it has learnt")
    if not run.curve or run.curve[-1][1] != run.steps:
        evaluate()
    if checkpoint is not None and run.steps != saved_at and not run.interrupted:
        save()
