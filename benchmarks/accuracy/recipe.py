"""The examples' recipe beside label trees: held-out accuracy, and seconds of training.

    python -m benchmarks.accuracy.recipe --problem taxa --width 256 --seeds 3 --json taxa.json
    python -m benchmarks.accuracy.recipe --problem places --decay 1 --lr 0.02
    python -m benchmarks.accuracy.recipe --problem lemmas --trees 1 3

The recipe is that of examples/common/recipe.py, as ``examples/xmc.py`` trains. Rate and decay that are not
given are chosen by short runs on validation rows with the first seed; what that takes stands by itself, as
for omikuji's defaults nothing is chosen. Seconds are those of training alone: of the recipe its warm start
included, of omikuji the reading of its file. Test rows are predicted exactly, once, at the end.

Contenders take turns, a seed of each at a time; medians are printed. omikuji takes no seed: it is trained
anew in each turn, or in the first --tree-turns where its predictions take long.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict, replace
from typing import Any

import torch

from benchmarks.common.arguments import argument_parser, parse
from benchmarks.common.record import finish
from benchmarks.common.timing import median
from examples.common.classifier import Classifier, predict
from examples.common.output import print_table
from examples.common.recipe import Recipe, choose, train
from examples.common.run import Run
from slide_torch import LSHLinear, LSHOptions

from .contenders import parse_options
from .label_trees import run_of_trees
from .load import PROBLEMS, load_problem
from .problems import SparseProblem
from .time_to_accuracy import TINY

MEASURES = ("P@1", "P@5", "PSP@1", "PSP@5")


def arguments() -> argparse.Namespace:
    parser = argument_parser(__doc__, "the tiny files of examples/data")
    add = parser.add_argument
    names = [name for name in PROBLEMS if name not in ("words", "xmc")]
    add("--problem", choices=names, default="places")
    add("--classes", type=int, default=0, help="only the first so many classes; 0: all")
    add("--validation-rows", type=int, default=5_000)
    add("--width", type=int, default=128, help="of the embedding")
    add("--epochs", type=float, default=2.0)
    add("--batch", type=int, default=256)
    add("--options", default="", help="of LSHOptions, as option:value,...; default: its own")
    add("--lr", type=float, help="default: chosen")
    add("--decay", type=float, help="default: chosen")
    add("--seeds", type=int, default=1, help="turns, with seeds from --seed on")
    add("--trees", type=int, nargs="*", default=[1, 3], help="of omikuji; none: without it")
    add("--tree-turns", type=int, help="those of the turns that train trees; default: all")
    args = parse(parser)
    try:
        args.options = parse_options(args.options)
    except ValueError as error:
        parser.error(f"--options: {error}")
    args.tree_turns = args.seeds if args.tree_turns is None else args.tree_turns
    for name in ("validation_rows", "width", "epochs", "batch", "seeds", "tree_turns"):
        if getattr(args, name) <= 0:
            parser.error(f"--{name.replace('_', '-')}: expected a positive number")
    return args


def main() -> None:
    args = arguments()
    problem = load(args)
    print(", ".join(f"{key} {value}" for key, value in problem.description().items()), flush=True)
    recipe, seconds = chosen(args, problem)
    runs: dict[str, list[dict[str, Any]]] = {"recipe": []}
    for turn in range(args.seeds):
        runs["recipe"].append(train_recipe(args, problem, replace(recipe, seed=args.seed + turn)))
        for trees in args.trees if turn < args.tree_turns else ():
            run = run_of_trees(problem, trees)
            found = {"seconds": run["seconds"], "peak_gb": run["peak_gb"], **run["test"]}
            runs.setdefault(f"omikuji_{trees}", []).append(found)
    columns = ["contender", *(m for m in MEASURES if m in runs["recipe"][0]), "seconds", "peak GB"]
    keys = [*columns[1:-1], "peak_gb"]
    lines = []
    for name, own in runs.items():
        middle = {key: median([run[key] for run in own]) for key in keys}
        scores = [f"{middle[key]:.4f}" for key in keys[:-2]]
        lines.append([name, *scores, f"{middle['seconds']:.1f}", f"{middle['peak_gb']:.2f}"])
    print_table(columns, lines)
    print(f"\nrecipe: {recipe}; {seconds:.0f} s of choosing beside that")
    content = {"problem": problem.description(), "recipe": asdict(recipe), "width": args.width}
    content |= {"options": args.options, "choosing_seconds": seconds, "runs": runs}
    finish(args, {"seeds": args.seeds}, content, lambda axes: paint(axes, runs))


def load(args: argparse.Namespace) -> SparseProblem:
    options = {"validation_rows": args.validation_rows, "classes": args.classes}
    name, files = args.problem, None
    if args.quick:
        name, files = "xmc", (TINY / "tiny_train.txt", TINY / "tiny_test.txt")
        args.batch, args.epochs = 8, 8.0
    problem = load_problem(name, files=files, **options)
    assert isinstance(problem, SparseProblem)
    return problem


def make_model(args: argparse.Namespace, problem: SparseProblem, seed: int) -> Classifier:
    torch.manual_seed(seed)
    options = LSHOptions(**args.options)
    head = LSHLinear(args.width, problem.num_labels, options=options, sparse=True)
    return Classifier(problem.num_features, args.width, head)


def chosen(args: argparse.Namespace, problem: SparseProblem) -> tuple[Recipe, float]:
    """The recipe, and the seconds that choosing took."""
    recipe = Recipe(args.batch, args.lr or 0.0, args.decay or 0.0, args.seed, epochs=args.epochs)
    given: dict[str, Any] = {}
    if args.lr is not None:
        given["rates"] = (args.lr,)
    if args.decay is not None:
        given["decays"] = (args.decay,)
    if len(given) == 2:
        return recipe, 0.0
    started = time.perf_counter()
    recipe = choose(
        lambda: make_model(args, problem, args.seed),
        problem.parts["train"],
        problem.parts["validation"],
        recipe,
        **given,
    )
    return recipe, time.perf_counter() - started


def train_recipe(
    args: argparse.Namespace, problem: SparseProblem, recipe: Recipe
) -> dict[str, Any]:
    run = Run(f"recipe, seed {recipe.seed}")
    model = make_model(args, problem, recipe.seed)
    train(run, model, problem.parts["train"], problem.parts["validation"], recipe)
    if run.interrupted:
        raise KeyboardInterrupt
    found = problem.score(predict(model, problem.parts["test"], 5), "test")
    return {
        "seed": recipe.seed,
        "steps": run.steps,
        "seconds": run.seconds,
        "peak_gb": run.peak_gb,
        "validation_P@1": run.curve[-1][2],
        **found,
    }


def paint(axes: Any, runs: dict[str, list[dict[str, Any]]]) -> None:
    for name, own in runs.items():
        axes.plot([r["seconds"] for r in own], [r["P@1"] for r in own], "o", label=name)
    axes.set_xlabel("seconds of training")
    axes.set_ylabel("P@1 on test rows")
    axes.set_xlim(left=0)
    axes.legend()


if __name__ == "__main__":
    main()
