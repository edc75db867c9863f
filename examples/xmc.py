"""Extreme classification on files of the Extreme Classification Repository, with LSHLinear.

    python examples/xmc.py train.txt test.txt --save model.pt    # chooses rate and decay, trains, measures
    python examples/xmc.py --predict rows.txt --save model.pt    # five labels a row, best first
    python examples/xmc.py train.txt test.txt --dense-seconds 60 --propensity Amazon-670K

Files start with a line "rows features labels"; each further line is "l1,l2 f:v f:v ...".
"""

from __future__ import annotations

import argparse
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from common.checkpoint import add_checkpoint_options, save_checkpoint
from common.classifier import Classifier, labels_of, predict
from common.machine import machine_line
from common.output import check_outputs, plot, print_table
from common.recipe import Recipe, choose, train
from common.run import Run
from data.sparse_rows import split, with_unit_rows
from slide_torch import LSHLinear, LSHOptions, metrics
from slide_torch.data import SparseRows, XMCData, read_xmc


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("train", type=Path, nargs="?")
    parser.add_argument("test", type=Path, nargs="?")
    parser.add_argument(
        "--predict", type=Path, metavar="FILE", help="print labels of its rows by the --save model"
    )
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument(
        "--lr", type=float, help="at the first step, falls to 0; default: by validation rows"
    )
    parser.add_argument(
        "--decay", type=float, help="of the LSH head's rows; default: by validation rows"
    )
    parser.add_argument("--validation", type=float, default=0.02, help="share of training rows")
    parser.add_argument("--dense-seconds", type=float, default=0.0, help="0: no dense model")
    parser.add_argument(
        "--pattern", choices=("shared", "per_sample"), default="shared", help="of active sets"
    )
    parser.add_argument("--budget", type=int, help="active neurons per sample")
    parser.add_argument(
        "--propensity",
        help="name of a data set whose propensity A and B are published: "
        + ", ".join(metrics.PROPENSITY_CONSTANTS),
    )
    parser.add_argument("--propensity-a", type=float, default=0.55)
    parser.add_argument("--propensity-b", type=float, default=1.5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", type=Path, metavar="FILE", help="where the LSH model is kept")
    add_checkpoint_options(parser)
    parser.add_argument("--plot", type=Path, default=Path("xmc.png"))
    args = parser.parse_args()
    if args.predict is None and args.test is None:
        parser.error("expected the files train and test, or --predict FILE --save MODEL")
    if args.predict is not None and (args.train is not None or args.save is None):
        parser.error("--predict FILE goes with --save MODEL alone, made by an earlier run")
    counts = (args.hidden, args.epochs, args.batch, args.threads, args.checkpoint_every)
    if min(counts) < 1:
        parser.error(
            "--hidden, --epochs, --batch, --threads and --checkpoint-every must be at least 1"
        )
    if args.budget is not None and args.budget < 0:
        parser.error("--budget must not be negative")
    if not 0 < args.validation < 1:
        parser.error("--validation must be between 0 and 1")
    if args.propensity_a <= 0 or args.propensity_b <= 0:
        parser.error("--propensity-a and --propensity-b must be positive")
    check_outputs(parser, args.save, args.checkpoint, args.plot)
    if args.propensity is not None:
        if args.propensity not in metrics.PROPENSITY_CONSTANTS:
            parser.error(
                f"--propensity: expected one of {', '.join(metrics.PROPENSITY_CONSTANTS)}, "
                f"got {args.propensity!r}; give --propensity-a and --propensity-b instead"
            )
        args.propensity_a, args.propensity_b = metrics.PROPENSITY_CONSTANTS[args.propensity]
    return args


def read(path: Path, **sizes: int) -> XMCData:
    try:
        return read_xmc(path, **sizes, progress=True)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise SystemExit(str(error)) from None


def load(train_file: Path, test_file: Path) -> tuple[XMCData, XMCData]:
    """Training and test rows."""
    data = read(train_file)
    test_data = read(test_file, num_features=data.num_features, num_labels=data.num_labels)
    if len(data) < 2 or len(test_data) < 1:
        raise SystemExit("expected at least two training rows and one test row")
    return data, test_data


def scores(top: Tensor, labels: Tensor, propensity: Tensor, ks: list[int]) -> list[str]:
    """P@k, nDCG@k and PSP@k of ranked labels (n, 5), cells of the table."""
    found = [metrics.precision_at_k(top, labels, k) for k in ks]
    found += [metrics.ndcg_at_k(top, labels, k) for k in ks]
    found += [metrics.psp_at_k(top, labels, k, propensity) for k in ks]
    return [f"{score:.4f}" for score in found]


def predict_file(args: argparse.Namespace) -> None:
    """Prints the five best labels of each row of a file, best first."""
    if not args.save.exists():
        raise SystemExit(
            f"{args.save}: expected a trained model, got no file: train with --save first"
        )
    state = torch.load(args.save, weights_only=True)["model"]
    num_features, hidden = state["embedding.weight"].shape
    num_labels = len(state["head.weight"])
    rows = with_unit_rows(read(args.predict, num_features=num_features, num_labels=num_labels))
    model = Classifier(num_features, hidden, nn.Linear(hidden, num_labels))
    model.load_state_dict(state)
    for labels in predict(model, rows, 5).tolist():
        print(",".join(map(str, labels)))


def recipe_of(
    args: argparse.Namespace,
    make_model: Callable[[], Classifier],
    rows: SparseRows,
    validation: SparseRows,
) -> Recipe:
    """The recipe of the command line; what that leaves open is chosen, or as in the checkpoint."""
    lr, decay = args.lr, args.decay
    if args.checkpoint is not None and args.checkpoint.exists():
        made_with = torch.load(args.checkpoint, weights_only=True, mmap=True)["settings"]
        lr = made_with["lr"] if lr is None else lr
        decay = made_with["decay"] if decay is None else decay
    recipe = Recipe(args.batch, lr or 0.0, decay or 0.0, args.seed, epochs=args.epochs)
    if lr is not None and decay is not None:
        return recipe
    fixed = {"rates": () if lr is None else (lr,), "decays": () if decay is None else (decay,)}
    recipe = choose(make_model, rows, validation, recipe, **{n: v for n, v in fixed.items() if v})
    print(
        f"chosen by {len(validation):,} validation rows: --lr {recipe.lr:g} --decay {recipe.decay:g}"
    )
    return recipe


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    if args.predict is not None:
        return predict_file(args)
    data, test_data = load(args.train, args.test)
    print(f"{len(data):,} rows, {data.num_features:,} features, {data.num_labels:,} labels")
    propensity = metrics.propensities(
        data.label_counts(), len(data), A=args.propensity_a, B=args.propensity_b
    )
    rows, validation = split(with_unit_rows(data), args.validation, args.seed)
    test = with_unit_rows(test_data)
    budget = "auto" if args.budget is None else args.budget
    options = LSHOptions(pattern=args.pattern, budget=budget)
    heads = {
        "LSHLinear": lambda: LSHLinear(args.hidden, data.num_labels, options=options, sparse=True)
    }
    if args.dense_seconds > 0:
        heads["dense torch"] = lambda: nn.Linear(args.hidden, data.num_labels)

    def make_model(head: str = "LSHLinear") -> Classifier:
        torch.manual_seed(args.seed)
        return Classifier(data.num_features, args.hidden, heads[head]())

    recipe = recipe_of(args, make_model, rows, validation)
    ks = [k for k in (1, 3, 5) if k <= data.num_labels]
    steps_per_epoch = -(-len(rows) // args.batch)
    runs, lines = [], []
    labels = labels_of(test)
    for name in heads:
        run = Run(name)
        model = make_model(name)
        lsh = name == "LSHLinear"
        train(
            run,
            model,
            rows,
            validation,
            recipe if lsh else replace(recipe, decay=0.0, epochs=None, seconds=args.dense_seconds),
            evaluate_every=lambda step: step % steps_per_epoch == 0,
            checkpoint=args.checkpoint if lsh else None,
            checkpoint_every=args.checkpoint_every,
        )
        if lsh and args.save:
            save_checkpoint(args.save, {"model": model.state_dict()})
        top = predict(model, test, 5, progress=f"{name}: exact evaluation")
        line = [name, *scores(top, labels, propensity, ks)]
        line += [f"{run.ms_step:.1f}", f"{run.steps:,}", f"{run.seconds:.0f}", f"{run.peak_gb:.2f}"]
        lines.append(line)
        runs.append(run)
        if run.interrupted:
            break
    print(f"\n{len(test):,} test rows; {machine_line(args.seed)}\n")
    names = [f"{m}@{k}" for m in ("P", "nDCG", "PSP") for k in ks]
    print_table(["head", *names, "ms/step", "steps", "seconds", "peak GB"], lines)
    plot(runs, f"{args.train.name}: {data.num_labels:,} labels", args.plot)


if __name__ == "__main__":
    main()
