"""Hidden layers over active sets: accuracy against the share of neurons that are active, and step time.

    python -m benchmarks.hidden.run --json FILE                        # trains all that FILE lacks
    python -m benchmarks.hidden.run --json FILE --hidden 4096 --contender shared   # a part of it
    python -m benchmarks.hidden.run --json FILE --times                # on a machine at rest

The task is real: a place's country from one spelling of its name (3-grams and words; the quickstart's data
with the country taken out of the features). A bag of features of width 64 goes through hidden neurons to one
logit a country. Everything but the hidden layers is the same: data, batches, steps, seed. The learning rate
falls linearly to 0; where it begins is chosen by whole runs on validation rows, for each contender by itself.

Contenders, each with the same share of hidden neurons active in training:
  shared         LSHFeedForward, one set for the batch from the tables
  per_sample     LSHFeedForward, a set for each sample from the tables
  top            the truly largest pre-activations of each sample, by a dense product: tables that never err
  batch_dropout  as many at random for the batch, scaled up as in dropout: what shared must beat
  dropout        as many at random for each sample (nn.Dropout): what per_sample must beat
and dense, with every neuron. Stacks have three hidden layers one after the other, LSHLinear with
output="dense". Accuracy on held-out names is given with every neuron active in eval, and, where there is a
choice, within the budget. Training knows steps, no seconds.

Step time: LSHFeedForward (stacks: LSHLinear) at 5% with row-sparse gradients and slide_torch.optim.Adam,
against nn.Linear with torch's fused Adam; random inputs of the task's shape and of a transformer block's;
forward, backward and update of the block alone; LSH steps bear the tables' upkeep, measured, spread over the
first period.

The record keeps every contender trained so far and trains only what is missing, so that it grows over several
calls; --again replaces.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.accuracy.training import choose_rate
from benchmarks.common.arguments import argument_parser, parse
from benchmarks.common.record import finish
from examples.common.machine import machine
from examples.common.output import print_table
from slide_torch import LSHLinear
from slide_torch.data import SparseRows, batches
from slide_torch.optim import Adam

from .record import ORDER, Run, add_run, find_run, paint, read, tables
from .task import LSH, WIDTH, Model, hidden_layers, load
from .times import crossovers, step_times

RATES = [0.01, 0.02]  # and beyond, while the best is at the edge
TIME_WIDTHS = [1024, 2048, 4096, 16_384, 65_536]
BLOCKS = [(i, n, o, 1) for i, o in ((WIDTH, 256), (512, 512)) for n in TIME_WIDTHS]
BLOCKS += [(WIDTH, n, 256, 3) for n in (1024, 2048, 4096)]

Contender = dict[str, Any]
Data = tuple[dict[str, SparseRows], int, int]


def plan(quick: bool) -> Iterator[Contender]:
    """Every contender of the record. What is left out takes dense arithmetic and more, without being a
    contender for speed: a look at it at small widths is enough."""
    if quick:
        for kind in ORDER:
            yield contender(kind, 64, 1.0 if kind == "dense" else 0.25)
        yield contender("shared", 64, 0.25, depth=3)
        return
    for hidden in (1024, 4096, 16_384, 65_536):
        yield contender("dense", hidden, 1.0)
        yield contender("shared", hidden, 0.01)
        yield contender("shared", hidden, 0.05)
        if hidden <= 4096:
            yield contender("per_sample", hidden, 0.05)
            yield contender("batch_dropout", hidden, 0.05)
    for share in (0.01, 0.05):
        yield contender("top", 1024, share)
    yield contender("per_sample", 1024, 0.01)
    yield contender("dropout", 1024, 0.05)
    yield contender("shared", 1024, 0.25)
    yield contender("per_sample", 1024, 0.25)
    yield contender("dense", 1024, 1.0, depth=3)
    for kind in LSH:
        yield contender(kind, 1024, 0.05, depth=3)


def contender(kind: str, hidden: int, share: float, depth: int = 1) -> Contender:
    """Fewer steps where dense ones take long."""
    steps = 800 if hidden < 65_536 else 400
    return {"contender": kind, "hidden": hidden, "share": share, "depth": depth, "steps": steps}


# --- training --------------------------------------------------------------------------------------


@torch.no_grad()
def accuracy(model: Model, rows: SparseRows, eval_active: str) -> float:
    for module in model.modules():
        if isinstance(module, LSHLinear):
            module.eval_active = eval_active
    model.eval()
    right = 0
    for *features, labels in batches(rows, 256):
        right += int((model(*features).argmax(1) == labels[:, 0]).sum())
    model.train()
    return right / len(rows)


def train(args: argparse.Namespace, data: Data, who: Contender, lr: float) -> tuple[Model, float]:
    """A whole run: its model and last loss."""
    rows, num_features, outputs = data
    torch.manual_seed(args.seed)
    # its embedding has the same numbers whatever follows
    model = Model(num_features, nn.Identity())
    kind, hidden, share, depth = who["contender"], who["hidden"], who["share"], who["depth"]
    model.layers = hidden_layers(kind, WIDTH, hidden, share, depth, outputs)
    optimizer = Adam(model.parameters(), lr=lr)
    step, epoch = 0, 0
    while True:
        for *features, labels in batches(rows["train"], args.batch, seed=args.seed + epoch):
            for group in optimizer.param_groups:
                group["lr"] = lr * (1 - step / who["steps"])
            loss = F.cross_entropy(model(*features), labels[:, 0])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            if step == who["steps"]:
                return model, loss.item()
        epoch += 1


def train_run(args: argparse.Namespace, data: Data, who: Contender) -> Run:
    """The entry of a contender: trained at every rate, judged at the one that validation rows like best."""
    rows = data[0]
    kind = who["contender"]
    ways = ("all", "budget") if kind in LSH else ("budget",) if kind == "top" else ("all",)
    trials: list[dict[str, float]] = []
    best: tuple[float, Model, dict[str, Any]] | None = None

    def score(lr: float) -> float:
        nonlocal best
        try:
            model, loss = train(args, data, who, lr)
        except ValueError as error:  # hashing refuses such rows
            if "NaN or Inf" not in str(error):
                raise
            loss = math.nan
        value = -math.inf
        if math.isfinite(loss):
            found = {way: accuracy(model, rows["validation"], way) for way in ways}
            value = max(found.values())
            if best is None or value > best[0]:
                best = value, model, {"lr": lr, "loss": loss, "validation": found}
        trials.append({"lr": lr, "validation": value})
        print(f"{who}, lr {lr:g}: loss {loss:.3f}, validation {value:.4f}", flush=True)
        return value

    choose_rate(score, args.lr, beyond=not args.quick and len(args.lr) > 1)
    assert best is not None  # choose_rate refuses when all diverged
    _, model, run = best
    run |= {"trials": sorted(trials, key=lambda trial: trial["lr"])}
    if layers := [m for m in model.modules() if isinstance(m, LSHLinear)]:
        active = [layer.stats()["active_per_sample"] / layer.out_features for layer in layers]
        run["active_share"] = sum(active) / len(active)
    run["test"] = {way: accuracy(model, rows["test"], way) for way in ways}
    print(f"{who}, lr {run['lr']:g}: {run['test']}", flush=True)
    return who | run


def main() -> None:
    parser = argument_parser(__doc__, "a tiny problem, a few steps")
    add = parser.add_argument
    add("--times", action="store_true", help="train nothing, measure what steps take")
    add("--steps", type=int, help="other than planned: 800, or 400 with 65,536 neurons")
    add("--lr", type=float, nargs="+", default=RATES, help="learning rates to choose from")
    add("--batch", type=int, default=128)
    add("--hidden", type=int, nargs="+", help="only these widths")
    add("--depth", type=int, nargs="+", help="only so many hidden layers")
    add("--share", type=float, nargs="+", help="only these shares of active neurons")
    add("--contender", nargs="+", choices=ORDER, help="only these")
    add("--again", action="store_true", help="train anew what the record has")
    add("--rounds", type=int, default=3, help="of the step times")
    args = parse(parser)
    blocks = BLOCKS
    if args.quick:
        args.steps, args.batch, args.rounds, args.lr = 12, 16, 1, args.lr[:2]
        blocks = [(8, 64, 4, 1), (8, 128, 4, 1), (8, 64, 4, 3)]
    data = load(args.quick)
    problem = {"batch": args.batch, "seed": args.seed, "outputs": data[2]}
    problem |= {f"{part}_rows": len(rows) for part, rows in data[0].items()}
    record = read(args.json, problem)
    for who in plan(args.quick) if args.quick or not args.times else ():
        chosen = all(
            getattr(args, key) is None or who[key] in getattr(args, key)
            for key in ("hidden", "depth", "share", "contender")
        )
        who["steps"] = args.steps or who["steps"]
        if chosen and (args.again or find_run(record, **who) is None):
            record = add_run(args.json, record, train_run(args, data, who))
    if args.times or args.quick:
        points = step_times(args, blocks)
        where = machine() | {"batch": args.batch}
        record["times"] = {"machine": where, "points": points, "crossovers": crossovers(points)}
    if not record["runs"]:
        raise SystemExit("nothing to report: no contender was trained")
    for columns, lines in tables(record):
        print()
        print_table(columns, lines)
    if args.json is not None and args.json.exists() and not args.times:
        record["runs"] = read(args.json, problem)["runs"]  # of other calls, too
    finish(args, {"batch": args.batch}, record, lambda axes: paint(axes, record))


if __name__ == "__main__":
    main()
