"""Held-out accuracy against seconds of training: LSHLinear, its rivals and dense torch on real problems.

    python -m benchmarks.accuracy.time_to_accuracy --json FILE --problem places --classes 20000 --seeds 3
    python -m benchmarks.accuracy.time_to_accuracy --json FILE --problem places --classes 20000 --clock
    python -m benchmarks.accuracy.time_to_accuracy --problem taxa --epochs 1 2
    python -m benchmarks.accuracy.time_to_accuracy --problem words --classes 20000 --batch 512 --epochs 0.2
    python -m benchmarks.accuracy.time_to_accuracy --contender wide=budget:64,tail:4096
    python -m benchmarks.accuracy.time_to_accuracy --xmc train.txt test.txt --propensity Amazon-670K

Model body, start, loss, batches and seed are the same for every contender; its output layer differs
(output_layers.py). Models of sparse rows begin as examples/common/recipe.py says, at label embedding and
class means, and learn by decoupled softmax, output layers with row-sparse gradients by row-wise Adagrad at 20
times the learning rate; that of --problem words begins at random weights and learns by Adam. Training knows
steps, no seconds, so that other work may keep the machine busy.
Each contender's learning rate is the one whose whole run ends best on validation rows, separately for each
of --epochs; it falls linearly to 0. The best of --decay, which shrinks the output layer's rows that a step
touches (of dense torch: all of them), is then chosen likewise. Evaluation is by the exact logits: of a
fixed subset of the validation rows on the way, of all test rows at the end. omikuji (label_trees.py) is
another kind of model, trained by its own defaults.

--clock then measures, on a machine at rest, what a step takes: contenders go on in turns from the states
that their runs kept in the middle of each third, upkeep of tables included; seconds on the curves are
those of the start, timed too and the same for all, and steps times that (step_timing.py). Dense torch is the
fastest of some ways to compute the same loss. omikuji is timed as a whole.

The record keeps every contender trained so far and trains only what is missing, so that it grows over several
calls; --again replaces.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.arguments import argument_parser, parse
from benchmarks.common.record import finish
from benchmarks.common.worker import Worker
from examples.common.machine import machine
from examples.common.output import print_table
from examples.common.recipe import DECAYS, RATES
from slide_torch import metrics

from .contenders import CONTENDERS, Contender, parse_contender
from .label_trees import run_of_trees
from .load import PROBLEMS, load_problem
from .problems import Problem
from .record import add_entry, find_entry, paint, read, table, write
from .step_timing import measure
from .training import THIRDS, choose_rate, train

DENSE_DECAYS = (0.0, 0.1)  # of all rows in every step
TINY = Path(__file__).parents[2] / "examples" / "data"


def main() -> None:
    args = arguments()
    record = read(args.json, on_problem(args, describe))
    about = record["problem"]
    print(", ".join(f"{key} {value}" for key, value in about.items()), flush=True)
    if args.clock:
        clock(record, args)
    else:
        for contender in args.contender:
            for epochs in [None] if contender.kind == "omikuji" else args.epochs:
                train_entry(record, contender, epochs, args)
    if not record["contenders"]:
        raise SystemExit("nothing to report: no contender was trained")
    columns, lines = table(record)
    print()
    print_table(columns, lines)
    finish(args, {"batch": args.batch}, record, lambda axes: paint(axes, record), size=(8, 5))


def arguments() -> argparse.Namespace:
    parser = argument_parser(__doc__, "the tiny files of examples/data, two epochs, two rates")
    add = parser.add_argument
    add("--problem", choices=PROBLEMS, default=None, help="places unless --xmc is given")
    add("--xmc", type=Path, nargs=2, metavar=("TRAIN", "TEST"), help="files of the XMC repository")
    add("--propensity", choices=metrics.PROPENSITY_CONSTANTS, help="constants of that data set")
    add("--text", type=Path, help="the text of --problem words; default: Wikipedia's introductions")
    add("--classes", type=int, default=0, help="only the first so many classes; 0: all")
    add("--validation-rows", type=int, default=5_000)
    add("--data-dir", type=Path)
    names = ", ".join(CONTENDERS)
    add(
        "--contender",
        action="append",
        help=f"{names}, or NAME=option:value,...; default: the problem's",
    )
    add("--epochs", type=float, nargs="+", default=[8.0], help="lengths of training")
    add("--batch", type=int, default=256)
    add("--seeds", type=int, default=1, help="runs of each contender, from --seed on")
    add("--lr", type=float, nargs="+", default=list(RATES), help="learning rates to choose from")
    add(
        "--decay",
        type=float,
        nargs="+",
        help="weight decays of the output layer to choose from; default: 0 and 2, of dense torch 0 and 0.1, "
        "of words 0",
    )
    add("--evaluations", type=int, default=25, help="of a run")
    add("--again", action="store_true", help="train anew what the record has")
    add("--clock", action="store_true", help="train nothing, measure what steps take")
    add("--turns", type=int, default=3, help="of each contender under --clock")
    args = parse(parser)
    for name in ("epochs", "lr", "batch", "seeds", "evaluations", "validation_rows", "turns"):
        value = getattr(args, name)
        if (min(value) if isinstance(value, list) else value) <= 0:
            parser.error(f"--{name.replace('_', '-')}: expected a positive number, got {value}")
    if args.classes < 0:
        parser.error(f"--classes: must not be negative, got {args.classes}")
    if args.clock and (args.json is None or not args.json.exists()):
        parser.error("--clock: expected --json with a record of trained contenders")
    if args.quick and args.problem is None and args.xmc is None:
        args.xmc = [TINY / "tiny_train.txt", TINY / "tiny_test.txt"]
        args.epochs, args.batch, args.evaluations, args.lr = [2.0], 8, 4, args.lr[:2]
    if args.decay is not None and min(args.decay) < 0:
        parser.error(f"--decay: must not be negative, got {min(args.decay)}")
    if args.xmc is not None and args.problem not in (None, "xmc"):
        parser.error(f"--xmc: expected no other --problem, got {args.problem}")
    args.problem = "xmc" if args.xmc is not None else args.problem or "places"
    if args.problem == "xmc" and args.xmc is None:
        parser.error("--problem xmc: give its files: --xmc TRAIN TEST")
    if args.text is not None and args.problem != "words":
        parser.error(f"--text: expected with --problem words, got --problem {args.problem}")
    for path in [*(args.xmc or []), *filter(None, [args.text])]:
        if not path.exists():
            parser.error(f"{path}: expected a file, got none")
    try:
        chosen = [parse_contender(text) for text in args.contender or PROBLEMS[args.problem]]
    except ValueError as error:
        parser.error(f"--contender: {error}")
    if importlib.util.find_spec("omikuji") is None and any(c.kind == "omikuji" for c in chosen):
        print("label trees are left out: the package omikuji is not installed")
        chosen = [contender for contender in chosen if contender.kind != "omikuji"]
    args.all, args.contender = args.contender is None, chosen
    return args


def decays_for(contender: Contender, args: argparse.Namespace) -> list[float]:
    """The weight decays that a contender chooses from."""
    if args.decay is not None or args.problem == "words":
        return args.decay or [0.0]
    return list(DENSE_DECAYS if contender.kind == "dense" else DECAYS)


def start(args: argparse.Namespace) -> Worker:
    """A process whose memory is its own, for functions of the problem."""
    spec = {
        "name": args.problem,
        "files": args.xmc and tuple(args.xmc),
        "propensity": args.propensity,
        "data_dir": args.data_dir,
        "text": args.text,
        "classes": args.classes,
        "validation_rows": args.validation_rows,
    }
    return Worker(_target, spec, args.threads)


def _target(spec: dict[str, Any], threads: int):
    torch.set_num_threads(threads)
    problem = load_problem(**spec)
    return lambda function, *arguments: function(problem, *arguments)


def on_problem(args: argparse.Namespace, function, *arguments: Any) -> Any:
    """``function(problem, *arguments)`` in such a process."""
    worker = start(args)
    try:
        return worker.run(function, *arguments)
    finally:
        worker.stop()


def describe(problem: Problem) -> dict[str, Any]:
    return problem.description()


def train_entry(
    record: dict[str, Any], contender: Contender, epochs: float | None, args: argparse.Namespace
) -> None:
    """Trains the runs that the contender's entry lacks, and keeps each at once."""
    entry = find_entry(record, contender.name, epochs)
    if entry is None or args.again:
        about = {"contender": contender.name, **asdict(contender)}
        about.pop("name")
        entry = about | {"epochs": epochs, "seed": args.seed, "machine": machine(), "runs": []}
    elif entry["options"] != contender.options:
        raise SystemExit(
            f"{contender.name}: expected options {entry['options']} as in the record, got "
            f"{contender.options}: name it anew, or give --again"
        )
    if contender.kind == "omikuji":
        if not entry["runs"]:
            run = on_problem(args, run_of_trees, contender.options["trees"])
            print(f"{contender.name}: {run['test']}", flush=True)
            entry["runs"] = [run]
            add_entry(record, entry)
            write(args.json, record)
        return
    worker = start(args)
    if not entry["runs"]:
        choose(worker, record["problem"], contender, entry, args)
        add_entry(record, entry)
        write(args.json, record)
    for seed in range(args.seed + len(entry["runs"]), args.seed + args.seeds):
        run = worker.run(train, contender, entry["settings"], seed, None)
        if run is None:
            raise SystemExit(f"{contender.name}: seed {seed} diverged at {entry['settings']}")
        entry["runs"].append(run)
        write(args.json, record)
    worker.stop()


def choose(
    worker: Worker, about: dict, contender: Contender, entry: dict, args: argparse.Namespace
) -> None:
    """Chooses the learning rate, then the decay, by whole runs, of which the best is the entry's first."""
    steps = max(1, math.ceil(entry["epochs"] * -(-about["train_rows"] // args.batch)))
    settings = {"steps": steps, "batch": args.batch, "evaluations": args.evaluations}
    sign = 1 if about["larger_is_better"] else -1
    runs: dict[tuple[float, float], dict[str, Any] | None] = {}  # by rate and decay

    def score(lr: float, decay: float) -> float:
        own = settings | {"lr": lr, "decay": decay}
        if (lr, decay) not in runs:
            states = states_of(args.json, entry, own)
            runs[lr, decay] = worker.run(train, contender, own, args.seed, states)
        found = final(lr, decay)
        return -math.inf if found is None else sign * found

    def final(lr: float, decay: float) -> float | None:
        run = runs[lr, decay]
        return None if run is None else run["curve"][-1][about["metric"]]

    beyond = not args.quick and len(args.lr) > 1
    decays = decays_for(contender, args)
    lr = choose_rate(lambda lr: score(lr, decays[0]), args.lr, beyond=beyond)
    best = lr, max(decays, key=lambda decay: score(lr, decay))
    for own in runs.keys() - {best}:
        for path in states_of(args.json, entry, dict(zip(("lr", "decay"), own, strict=True))) or ():
            path.unlink(missing_ok=True)
    entry["settings"] = settings | {"lr": best[0], "decay": best[1]}
    entry["trials"] = [
        {"lr": lr, "decay": decay, about["metric"]: final(lr, decay)} for lr, decay in sorted(runs)
    ]
    entry["runs"] = [runs[best]]
    print(f"{contender.name}: {entry['trials']}; lr {best[0]:g}, decay {best[1]:g}", flush=True)


def states_of(
    record: Path | None, entry: dict[str, Any], settings: dict[str, float]
) -> list[Path] | None:
    """Files beside the record for the first run's states in the middle of each third."""
    if record is None:
        return None
    name = f"{record.stem}-{entry['contender']}-{entry['epochs']:g}-{settings['lr']:g}"
    if decay := settings.get("decay"):
        name += f"-{decay:g}"
    return [record.with_name(f"{name}-{third}.pt") for third in range(len(THIRDS))]


def clock(record: dict[str, Any], args: argparse.Namespace) -> None:
    """Gives the record's entries of the contenders asked for their clocks."""
    names = {contender.name for contender in args.contender}
    entries = [e for e in record["contenders"] if e["contender"] in names or args.all]
    states = [
        states_of(args.json, entry, entry["settings"]) if "settings" in entry else []
        for entry in entries
    ]
    if lost := [str(path) for paths in states for path in paths or () if not path.exists()]:
        raise SystemExit(
            f"--clock: expected the states that training left beside the record, got no {', '.join(lost)}: "
            "name contenders whose states are there, or train anew with --again"
        )
    short = [{key: value for key, value in entry.items() if key != "runs"} for entry in entries]
    clocks = on_problem(args, measure, short, states, args.turns)
    for entry, found in zip(entries, clocks, strict=True):
        entry["clock"] = found


if __name__ == "__main__":
    main()
