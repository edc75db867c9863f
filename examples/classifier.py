"""What the examples share: a one-hidden-layer classifier over sparse rows, one training loop for an LSH
head and a dense head, exact evaluation, the table and the plot."""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from slide_torch import (
    LSHLinear,
    SampledLogits,
    __version__,
    instruction_set,
    load_sampler_state,
    sampler_state,
)
from slide_torch.data import IGNORE_INDEX, SparseRows, batches
from slide_torch.optim import Adam


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


@dataclass
class Run:
    """One contender's training: what the table and the plot show."""

    name: str
    steps: int = 0
    seconds: float = 0.0
    step_ms: list[float] = field(default_factory=list)
    curve: list[tuple[float, int, float]] = field(default_factory=list)  # seconds, step, P@1
    peak_gb: float = 0.0
    active: list[float] = field(default_factory=list)
    recall: float = float("nan")
    predicted: Tensor | None = None
    interrupted: bool = False
    lr: float = float("nan")
    trials: list[tuple[float, float]] = field(default_factory=list)  # rate, validation measure

    @property
    def ms_step(self) -> float:
        return float(np.median(self.step_ms or [float("nan")]))


_KEPT_OF_RUN = ("steps", "seconds", "step_ms", "curve", "peak_gb", "active")


def resident_gb(key: str = "VmRSS") -> float:
    """Resident gigabytes (VmRSS) of this process, or their peak (VmHWM); NaN but on Linux."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(key + ":"):
                return int(line.split()[1]) / 2**20
    except OSError:
        pass
    return float("nan")


def reset_peak_memory() -> float:
    """Forgets the peak so far and returns the resident gigabytes now."""
    gc.collect()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return resident_gb()


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


def machine() -> dict[str, Any]:
    """What a figure must be quoted with."""
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                cpu = line.split(":", 1)[1].strip()
                break
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instruction_set": instruction_set(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "slide_torch": __version__,
        "date": time.strftime("%Y-%m-%d"),
    }


def machine_line(seed: int) -> str:
    """The machine in a line, for quoting beside any number."""
    of = machine()
    return (
        f"{of['cpu']}, {of['threads']} of {of['cores']} cores, {of['instruction_set']}, "
        f"torch {of['torch']}, slide_torch {of['slide_torch']}, seed {seed}"
    )


def print_table(columns: list[str], lines: list[list[str]]) -> None:
    """A Markdown table with aligned columns."""
    widths = [max(len(row[i]) for row in [columns, *lines]) for i in range(len(columns))]
    for i, row in enumerate([columns, ["-" * w for w in widths], *lines]):
        cells = [
            c.ljust(w) if j == 0 else c.rjust(w)
            for j, (c, w) in enumerate(zip(row, widths, strict=True))
        ]
        if i == 1:
            cells = ["-" * widths[0], *["-" * (w - 1) + ":" for w in widths[1:]]]
        print("| " + " | ".join(cells) + " |")


def draw(path: Path, paint: Callable[[Any], None], size: tuple[float, float] = (7, 4.2)) -> None:
    """Lets ``paint`` fill the axes of a figure and saves it; without matplotlib, says that it did not."""
    try:
        import matplotlib
    except ImportError:
        print(
            f"{path}: not drawn, matplotlib is missing: "
            'pip install --no-build-isolation ".[examples]"'
        )
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=size, dpi=120)
    paint(axes)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
    print(f"picture: {path}")


def plot(runs: list[Run], title: str, path: Path) -> None:
    """P@1 on validation rows against seconds of training, one curve a contender."""

    def paint(axes: Any) -> None:
        for run in runs:
            seconds = [0.0, *[point[0] for point in run.curve]]
            scores = [0.0, *[point[2] for point in run.curve]]
            label = f"{run.name} ({run.ms_step:.0f} ms a step)"
            axes.plot(seconds, scores, marker="o", markersize=3, label=label)
        axes.set_xlabel("seconds of training")
        axes.set_ylabel("P@1 on validation rows")
        axes.set_title(title)
        axes.set_ylim(bottom=0)
        axes.legend()

    draw(path, paint)


def check_outputs(parser: argparse.ArgumentParser, *paths: Path | None) -> None:
    """Refuses, before any work, files that could not be written after it."""
    for path in paths:
        if path is not None and not path.absolute().parent.is_dir():
            parser.error(f"{path}: expected an existing folder, got {path.parent}: make it first")


def add_checkpoint_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoint",
        type=Path,
        metavar="FILE",
        help="keep the LSH training's state here; where it exists, go on from it",
    )
    parser.add_argument("--checkpoint-every", type=int, default=1000, metavar="STEPS")


def checkpoint_of(run: Run, model: Classifier, optimizer: Adam, settings: dict) -> dict:
    """All that the rest of the training depends on."""
    return {
        "settings": settings,
        "run": {name: getattr(run, name) for name in _KEPT_OF_RUN},
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "sampler": sampler_state(model),
        "rng": torch.get_rng_state(),
    }


def load_checkpoint(
    path: Path, run: Run, model: Classifier, optimizer: Adam, settings: dict
) -> None:
    content = torch.load(path, weights_only=True)
    for name, value in settings.items():
        if content["settings"][name] != value:
            raise SystemExit(
                f"{path}: {name}: expected {value!r} as in this call, got {content['settings'][name]!r}: "
                "call with what the checkpoint was made with, or name another file"
            )
    model.load_state_dict(content["model"])
    optimizer.load_state_dict(content["optimizer"])
    load_sampler_state(model, content["sampler"])
    torch.set_rng_state(content["rng"])
    for name, value in content["run"].items():
        setattr(run, name, value)
    print(f"{path}: going on after {run.steps:,} steps")


def save_checkpoint(path: Path, content: dict) -> None:
    """Writes beside the target, forces it to the disk and renames: whenever the program or the machine
    stops, `path` is the old file or the new one, whole. A full disk is an OSError that names it."""
    temporary = path.with_name(path.name + ".part")
    try:
        with open(temporary, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except Exception as error:
        # where a write fails, torch.save goes on to its own error, "unexpected pos"
        reason = error if isinstance(error, OSError) else error.__context__
        if not isinstance(reason, OSError):
            raise
        message = f"{reason.strerror or reason} (nothing was replaced)"
        raise OSError(reason.errno, message, str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.absolute().parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the renaming itself
    finally:
        os.close(folder)
