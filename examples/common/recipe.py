"""How the classifiers of sparse rows are trained: a warm start, a falling learning rate, decay of the head.

1. Features start at the mean random code of the labels that they occur with (``label_embedding``), the head's
   rows in the direction of their classes' mean inputs (``init_from_class_means_``).
2. Learning rates fall linearly to 0, over the steps or the seconds of the run.
3. An LSH head learns by row-wise Adagrad, at a rate of its own: a row that few steps touch takes large steps.
4. Rows of the head that a step touches decay, where a row has few examples and the model overfits.

:func:`choose` finds rate and decay by short runs, judged on validation rows.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm import tqdm

from slide_torch import LSHLinear, LSHOptions
from slide_torch.data import IGNORE_INDEX, SparseRows, batches, label_embedding
from slide_torch.metrics import precision_at_k
from slide_torch.optim import Adagrad, Adam

from .checkpoint import checkpoint_of, load_checkpoint, save_checkpoint
from .classifier import Classifier, labels_of, loss_of, precision_at_1, predict
from .machine import reset_peak_memory, resident_gb
from .run import Run

__all__ = ["DECAYS", "RATES", "Recipe", "choose", "head_rate", "train", "warm_start_"]

RATES = (0.005, 0.01, 0.02)
DECAYS = (0.0, 2.0)


@dataclass(frozen=True)
class Recipe:
    """What a training depends on beside model and rows.

    Attributes:
        batch: rows of a step.
        lr: learning rate at the first step, of the embedding; that of an LSH head is :func:`head_rate`.
        decay: decoupled weight decay: rows of the head that a step touches are multiplied by 1 - lr * decay.
        epochs: when training ends; None: after ``seconds``.
        seconds: when training ends, start included; None: after ``epochs``.
    """

    batch: int
    lr: float
    decay: float
    seed: int
    epochs: float | None = None
    seconds: float | None = None

    def steps(self, rows: int) -> int | None:
        """Steps of the whole training, or None where time ends it."""
        return None if self.epochs is None else max(1, round(self.epochs * -(-rows // self.batch)))

    def settings(self, rows: int, head: nn.Module) -> dict:
        """What a checkpoint must agree in."""
        fixed = {"rows": rows, "batch": self.batch, "lr": self.lr, "decay": self.decay}
        fixed |= {"epochs": self.epochs, "seed": self.seed}
        return fixed | {"head": repr(getattr(head, "options", None))}


def head_rate(lr: float) -> float:
    """The rate of an LSH head's row-wise Adagrad beside ``lr`` of the embedding's Adam."""
    return 0.4 * math.sqrt(lr / 0.02)


@torch.no_grad()
def warm_start_(model: Classifier, rows: SparseRows, seed: int, progress: bool) -> None:
    """Gives embedding and head their start from the training rows."""
    embedding, head = model.embedding.weight, model.head
    generator = torch.Generator().manual_seed(seed)
    features, width = embedding.shape
    embedding.copy_(
        label_embedding(rows, width, num_features=features, generator=generator, progress=progress)
    )

    def examples() -> Iterator[tuple[Tensor, Tensor]]:
        for *given, labels in batches(rows, 4096):
            yield model.hidden(*given), labels

    means = head
    if not isinstance(head, LSHLinear):
        everything = LSHOptions(budget=head.out_features)  # which needs no tables
        means = LSHLinear(head.in_features, head.out_features, options=everything)
    means.init_from_class_means_(examples(), ignore_index=IGNORE_INDEX, progress=progress)
    if means is not head:
        head.load_state_dict(means.state_dict())


def make_optimizers(model: Classifier, recipe: Recipe) -> tuple[Optimizer, Optimizer]:
    """One for the embedding, one for the head. A dense head learns by Adam, which is ahead there."""
    head = model.head
    embedding = Adam(model.embedding.parameters(), lr=recipe.lr)
    if not isinstance(head, LSHLinear):
        return embedding, Adam(head.parameters(), lr=recipe.lr, weight_decay=recipe.decay)
    lr = head_rate(recipe.lr)
    weight = {"params": [head.weight], "weight_decay": recipe.decay * recipe.lr / lr}
    groups = [weight] if head.bias is None else [weight, {"params": [head.bias]}]
    return embedding, Adagrad(groups, lr=lr, row_wise=True)


def train(
    run: Run,
    model: Classifier,
    rows: SparseRows,
    validation: SparseRows,
    recipe: Recipe,
    *,
    evaluate_every: Callable[[int], bool] = lambda step: False,
    checkpoint: Path | None = None,
    checkpoint_every: int = 1000,
    progress: bool = True,
) -> None:
    """Trains from the start to the end that the recipe sets; evaluation does not count as time.

    Where the file `checkpoint` exists, training goes on from it, bit for bit as if it had not stopped. Ctrl-C
    ends the training, not the program.
    """
    optimizers = make_optimizers(model, recipe)
    settings = recipe.settings(len(rows), model.head)
    base = reset_peak_memory()
    if checkpoint is not None and checkpoint.exists():
        load_checkpoint(checkpoint, run, model, optimizers, settings)
    else:
        started = time.perf_counter()
        warm_start_(model, rows, recipe.seed, progress)
        run.seconds += time.perf_counter() - started
    validation_labels = labels_of(validation)
    steps_per_epoch = -(-len(rows) // recipe.batch)
    steps = recipe.steps(len(rows))

    def share_done() -> float:
        return run.steps / steps if recipe.seconds is None else run.seconds / recipe.seconds

    def evaluate() -> None:
        run.peak_gb = max(run.peak_gb, resident_gb("VmHWM") - base)
        score = precision_at_1(predict(model, validation, 1), validation_labels)
        run.curve.append((run.seconds, run.steps, score))
        reset_peak_memory()

    def step(batch: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
        *features, labels = batch
        started = time.perf_counter()
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = optimizer.defaults["lr"] * (1 - share_done())
        loss = loss_of(model(*features), labels)
        model.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        run.step_ms.append((time.perf_counter() - started) * 1e3)
        run.seconds += run.step_ms[-1] / 1e3
        run.steps += 1
        return loss

    def save() -> None:
        save_checkpoint(checkpoint, checkpoint_of(run, model, optimizers, settings))

    saved_at = run.steps
    try:
        while share_done() < 1:
            epoch, skip = divmod(run.steps, steps_per_epoch)
            bar = tqdm(
                batches(rows, recipe.batch, seed=recipe.seed + epoch, skip=skip),
                initial=skip,
                total=None if steps is None else min(steps_per_epoch, skip + steps - run.steps),
                desc=f"{run.name}, epoch {epoch + 1}",
                unit=" steps",
                disable=not progress,
            )
            for batch in bar:
                loss = step(batch)
                if run.steps % 20 == 0 and isinstance(model.head, LSHLinear):
                    run.active.append(model.head.stats()["active_per_sample"])
                if run.steps % 20 == 0 or steps is None:
                    bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
                if evaluate_every(run.steps):
                    evaluate()
                if checkpoint is not None and run.steps % checkpoint_every == 0:
                    save()
                    saved_at = run.steps
                if share_done() >= 1:
                    break
            bar.close()
    except KeyboardInterrupt:
        run.interrupted = True
        print(f"\n{run.name}: interrupted after {run.steps:,} steps; evaluating what it has learnt")
    if not run.curve or run.curve[-1][1] != run.steps:
        evaluate()
    if checkpoint is not None and run.steps != saved_at and not run.interrupted:
        save()


def choose(
    make_model: Callable[[], Classifier],
    rows: SparseRows,
    validation: SparseRows,
    recipe: Recipe,
    *,
    rates: tuple[float, ...] = RATES,
    decays: tuple[float, ...] = DECAYS,
    share: float = 0.25,
) -> Recipe:
    """The recipe with that rate, and then that decay, by which short runs predict the validation rows best;
    each is a ``share`` of the whole training. The best has the largest sum of P@1 and P@5: where rows have
    several labels, decay may raise the first and lower the second."""
    kept: dict[Recipe, float] = {}
    labels = labels_of(validation)

    def score(candidate: Recipe) -> float:
        if candidate not in kept:
            run = Run("choice")
            short = replace(candidate, epochs=share * candidate.epochs)
            model = make_model()
            train(run, model, rows, validation, short, progress=False)
            if run.interrupted:
                raise KeyboardInterrupt
            best = predict(model, validation, 5)
            found = {f"P@{k}": precision_at_k(best, labels, k) for k in (1, best.shape[1])}
            kept[candidate] = sum(found.values())
            shown = {measure: f"{value:.4f}" for measure, value in found.items()}
            bar.set_postfix(lr=candidate.lr, decay=candidate.decay, **shown)
            bar.update()
        return kept[candidate]

    with tqdm(
        total=len(rates) + len(decays) - 1, desc="choosing rate and decay", unit=" runs"
    ) as bar:
        recipe = max((replace(recipe, lr=lr, decay=decays[0]) for lr in rates), key=score)
        return max((replace(recipe, decay=decay) for decay in decays), key=score)
