"""Hidden layers over active sets: accuracy against the share of neurons that are active, and step time.

    python benchmarks/hidden.py --json benchmarks/results/hidden.json

The task is real: a place's country from one spelling of its name (3-grams and words; the quickstart's data
with the country taken out of the features). A bag of features of width 64 goes through hidden neurons to one
logit a country. Everything but the hidden layers is the same: data, batches, learning rate (one for all: the
quickstart's, not tuned for this task), steps, seed.

Contenders, each with the same share of hidden neurons active in training:
  per_sample  LSHFeedForward, a set for each sample from the tables
  shared      LSHFeedForward, one set for the batch from the tables
  top         the truly largest pre-activations of each sample, by a dense product: tables that never err
  dropout     as many at random for each sample (nn.Dropout, which scales them up): what the tables must beat
and dense, with every neuron. ``stacked`` has three hidden layers one after the other, LSHLinear with
output="dense". Accuracy on held-out names is given with every neuron active in eval, and, where there is a
choice, within the budget.

Step time: LSHFeedForward at 5% with row-sparse gradients and slide_torch.optim.Adam, against two nn.Linear
with torch's fused Adam; random inputs of the task's shape and of a transformer block's; forward, backward and
update of the block alone; LSH steps bear the tables' upkeep, measured, spread over the first period.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from common import (
    Worker,
    argument_parser,
    finish,
    median,
    milliseconds,
    parse,
    print_table,
    random_rows,
)
from torch import Tensor, nn

from slide_torch import LSHFeedForward, LSHLinear, LSHOptions
from slide_torch.data import SparseRows, batches
from slide_torch.optim import Adam

WIDTH = 64
LSH = ("per_sample", "shared")


def task_of(rows: SparseRows, countries: np.ndarray) -> SparseRows:
    """Rows whose label is their country; ``countries`` gives each feature's, -1 for other features."""
    of_feature = countries[rows.feature_indices]
    row_of = np.repeat(np.arange(len(rows)), np.diff(rows.feature_indptr))
    label = np.full(len(rows), -1, dtype=np.int32)
    label[row_of[of_feature >= 0]] = of_feature[of_feature >= 0]
    kept = of_feature < 0
    counts = np.bincount(row_of[kept], minlength=len(rows))
    return SparseRows(
        np.concatenate([[0], counts.cumsum()]),
        rows.feature_indices[kept],
        rows.feature_values[kept],
        np.arange(len(rows) + 1),
        label,
    )


def load(quick: bool) -> tuple[dict[str, SparseRows], int, int]:
    """Training and held-out rows, how many features, how many countries."""
    if quick:  # two features say it all
        random = np.random.default_rng(0)
        labels = random.integers(0, 4, 400).astype(np.int32)
        features = np.stack([labels * 2, labels * 2 + 1], 1).ravel().astype(np.int32)
        values = np.ones(800, np.float32)
        rows = SparseRows(np.arange(0, 801, 2), features, values, np.arange(401), labels)
        return {"train": rows, "test": rows}, 8, 4
    import places

    data = places.load_places()
    names = [name for name in data.feature_names if name.startswith("country:")]
    countries = np.full(data.num_features, -1, dtype=np.int32)
    countries[[data.feature_names[name] for name in names]] = np.arange(len(names))
    # Any 10,000 of the held-out names, and in random order: they are ordered by place, and a batch of
    # neighbours would tell a shared active set which country it is.
    some = np.random.default_rng(0).permutation(len(data.test))[:10_000]
    splits = {"train": data.train, "test": data.test.select(some)}
    made = {key: task_of(rows, countries) for key, rows in splits.items()}
    return made, data.num_features, len(names)


class Top(nn.Module):
    """Keeps the ``budget`` largest of each row, in training and eval."""

    def __init__(self, budget: int) -> None:
        super().__init__()
        self.budget = budget

    def forward(self, values: Tensor) -> Tensor:
        kept = values.topk(self.budget, dim=-1)
        return torch.zeros_like(values).scatter(-1, kept.indices, kept.values)


def hidden_layers(kind: str, hidden: int, share: float, depth: int, outputs: int) -> nn.Module:
    """``depth`` hidden layers and the output layer."""
    budget = max(1, round(share * hidden))
    if kind in LSH:
        options = LSHOptions(pattern=kind, budget=budget)
        if depth == 1:
            return LSHFeedForward(WIDTH, hidden, outputs, options=options, sparse=True)
    layers: list[nn.Module] = []
    for i in range(depth):
        width = hidden if i else WIDTH
        if kind in LSH:
            first = LSHLinear(width, hidden, options=options, sparse=True, output="dense")
        else:
            first = nn.Linear(width, hidden)
        layers += [first, *([Top(budget)] if kind == "top" else []), nn.ReLU()]
        layers += [nn.Dropout(1 - share)] if kind == "dropout" else []
    return nn.Sequential(*layers, nn.Linear(hidden, outputs))


class Model(nn.Module):
    """Bag of features -> hidden layers -> logits."""

    def __init__(self, num_features: int, layers: nn.Module) -> None:
        super().__init__()
        self.embedding = nn.EmbeddingBag(
            num_features, WIDTH, mode="sum", include_last_offset=True, sparse=True
        )
        nn.init.normal_(self.embedding.weight, std=0.3)
        self.layers = layers

    def forward(self, indices: Tensor, offsets: Tensor, values: Tensor) -> Tensor:
        return self.layers(self.embedding(indices, offsets, per_sample_weights=values))


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


def train(args, data, kind: str, hidden: int, share: float, depth: int) -> dict:
    """Trains one contender and measures it."""
    rows, num_features, outputs = data
    torch.manual_seed(args.seed)
    model = Model(
        num_features, nn.Identity()
    )  # its embedding has the same numbers whatever follows
    model.layers = hidden_layers(kind, hidden, share, depth, outputs)
    optimizer = Adam(model.parameters(), lr=args.lr)
    ms: list[float] = []
    epoch = 0
    while len(ms) < args.steps:
        for *features, labels in batches(rows["train"], args.batch, seed=args.seed + epoch):
            started = time.perf_counter()
            loss = F.cross_entropy(model(*features), labels[:, 0])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            ms.append((time.perf_counter() - started) * 1e3)
            if len(ms) == args.steps:
                break
        epoch += 1
    layers = [m for m in model.modules() if isinstance(m, LSHLinear)]
    result = {"contender": kind, "hidden": hidden, "depth": depth, "share": share}
    if layers:
        active = [layer.stats()["active_per_sample"] / hidden for layer in layers]
        result["active_share"] = sum(active) / len(active)
        result["accuracy_budget"] = accuracy(model, rows["test"], "budget")
    if kind == "top":
        result["accuracy_budget"] = accuracy(model, rows["test"], "budget")
    else:
        result["accuracy"] = accuracy(model, rows["test"], "all")
    result["loss"], result["ms_step"] = loss.item(), median(ms)
    shown = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in result.items()}
    print(", ".join(f"{k} {v}" for k, v in shown.items()), flush=True)
    return result


# --- step time -------------------------------------------------------------------------------------


def block(kind: str, width: int, hidden: int, outputs: int, batch: int, threads: int, seed: int):
    """Answers ``run(count)``: milliseconds of as many steps; ``run(0)``: those of upkeep, a step."""
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    if kind == "dense":
        layers = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, outputs))
        optimizer = torch.optim.Adam(layers.parameters(), lr=1e-3, fused=True)
    else:
        options = LSHOptions(pattern=kind)
        layers = LSHFeedForward(width, hidden, outputs, options=options, sparse=True)
        optimizer = Adam(layers.parameters(), lr=1e-3)
    x, gradient = torch.randn(batch, width, requires_grad=True), torch.randn(batch, outputs)

    def step() -> None:
        optimizer.zero_grad()
        layers(x).backward(gradient)
        optimizer.step()

    def upkeep() -> float:
        if kind == "dense":
            return 0.0
        first = layers.first
        every = first.tables.options.rehash_every
        share = first.stats()["union"] / hidden
        rows = random_rows(hidden, round(hidden * (1 - (1 - share) ** every)))
        rehash = median(
            milliseconds(lambda: first.tables.rehash(first.weight, first.bias, rows=rows))
            for _ in range(3)
        )
        rare = 1 / first.tables.options.rebuild_every
        return ((1 - rare) * rehash + rare * milliseconds(first.rebuild)) / every

    step()  # makes states and tables
    return lambda count: [milliseconds(step) for _ in range(count)] if count else [upkeep()]


def step_times(args, widths: list[int], shapes: list[tuple[int, int]]) -> list[dict]:
    found = []
    for inputs, outputs in shapes:
        for hidden in widths:
            sizes = (inputs, hidden, outputs, args.batch, args.threads, args.seed)
            workers = {kind: Worker(block, kind, *sizes) for kind in ("dense", *LSH)}
            ms: dict[str, list[float]] = {kind: [] for kind in workers}
            for _ in range(args.rounds):
                for kind, worker in workers.items():
                    ms[kind] += worker.run(3)
            point = {"inputs": inputs, "outputs": outputs, "hidden": hidden}
            point["ms"] = {
                kind: median(times) + workers[kind].run(0)[0] for kind, times in ms.items()
            }
            for worker in workers.values():
                worker.stop()
            found.append(point)
            print(
                f"{inputs} -> {hidden:,} -> {outputs}: "
                + ", ".join(f"{kind} {value:.1f} ms" for kind, value in point["ms"].items()),
                flush=True,
            )
    return found


def crossovers(times: list[dict]) -> list[dict]:
    """For each shape and pattern the smallest width from which on it is faster than dense."""
    found = []
    for shape in dict.fromkeys((t["inputs"], t["outputs"]) for t in times):
        along = [t for t in times if (t["inputs"], t["outputs"]) == shape]
        for kind in LSH:
            faster: int | None = None
            for t in reversed(along):
                if t["ms"][kind] >= t["ms"]["dense"]:
                    break
                faster = t["hidden"]
            found.append(
                {"inputs": shape[0], "outputs": shape[1], "contender": kind, "hidden": faster}
            )
    return found


def main() -> None:
    parser = argument_parser(__doc__, "a tiny problem, a few steps")
    parser.add_argument("--steps", type=int, default=200, help="0 leaves out all training")
    parser.add_argument("--widths", type=int, nargs="+", default=[1024, 4096, 16_384])
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3, help="of the step times")
    parser.add_argument("--times", type=Path, help="a record whose step times to take over")
    parser.add_argument(
        "--note", default="", help="kept in the record, such as who shared the machine"
    )
    args = parse(parser)
    widths, shares, stacked = args.widths, [0.01, 0.05, 0.25], args.widths[0]
    time_widths = [1024, 2048, 4096, 16_384, 65_536]
    shapes = [(WIDTH, 256), (512, 512)]
    if args.quick:
        args.steps, args.batch, args.rounds = 12, 16, 1
        widths, shares, stacked, time_widths, shapes = [64], [0.25], 64, [64, 128], [(8, 4)]
    if args.times is None:
        times = step_times(args, time_widths, shapes)
    else:
        times = json.loads(args.times.read_text())["times"]
    middle = widths[-1]
    runs = train_all(args, widths, shares, middle, stacked) if args.steps else []
    report(runs, times)

    def paint(axes) -> None:
        own = [r for r in runs if r["hidden"] == middle and r["depth"] == 1]
        for kind in (*LSH, "top", "dropout"):
            points = [(r["share"], best_accuracy(r)) for r in own if r["contender"] == kind]
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=kind)
        axes.axhline(own[0]["accuracy"], color="black", label="dense")
        axes.set_xscale("log")
        axes.set_xlabel("share of hidden neurons active in training")
        axes.set_ylabel("accuracy on held-out names")
        axes.set_title(f"country of a place's name, {middle:,} hidden neurons, {args.steps} steps")
        axes.legend()

    def paint_times(axes) -> None:
        for kind in ("dense", *LSH):
            points = [(t["hidden"], t["ms"][kind]) for t in times if t["inputs"] == shapes[-1][0]]
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=kind)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("hidden neurons")
        axes.set_ylabel("ms a step")
        axes.legend()

    setting = {"batch": args.batch, "lr": args.lr, "steps": args.steps}
    content = {"note": args.note, "runs": runs, "times": times}
    content["crossovers"] = crossovers(times)
    finish(args, setting, content, paint if runs else paint_times)


def train_all(
    args, widths: list[int], shares: list[float], middle: int, stacked: int
) -> list[dict]:
    """Every contender at one share, and at every share for the width ``middle``; then three layers."""
    data = load(args.quick)
    runs = []
    for hidden in widths:
        runs.append(train(args, data, "dense", hidden, 1.0, 1))
        for share in shares if hidden == middle else [shares[len(shares) // 2]]:
            for kind in (*LSH, "dropout", *(["top"] if hidden == middle else [])):
                runs.append(train(args, data, kind, hidden, share, 1))
    runs.append(train(args, data, "dense", stacked, 1.0, 3))
    for kind in ("per_sample", "dropout"):
        runs.append(train(args, data, kind, stacked, shares[len(shares) // 2], 3))
    return runs


def best_accuracy(run: dict) -> float:
    """The better of the two evaluations."""
    return max(run.get("accuracy", 0.0), run.get("accuracy_budget", 0.0))


def report(runs: list[dict], times: list[dict]) -> None:
    rows = [
        [
            r["contender"],
            f"{r['depth']} x {r['hidden']:,}",
            f"{r.get('active_share', r['share']):.1%}",
            f"{r['accuracy']:.3f}" if "accuracy" in r else "",
            f"{r['accuracy_budget']:.3f}" if "accuracy_budget" in r else "",
            f"{r['ms_step']:.1f}",
        ]
        for r in runs
    ]
    print()
    print_table(
        ["contender", "hidden", "active", "accuracy, all", "accuracy, budget", "ms/step"], rows
    )
    print()
    print_table(
        ["shape", "dense, ms", "per sample, ms", "shared, ms"],
        [
            [
                f"{t['inputs']} -> {t['hidden']:,} -> {t['outputs']}",
                *(f"{t['ms'][kind]:.1f}" for kind in ("dense", *LSH)),
            ]
            for t in times
        ],
    )
    print()
    print_table(
        ["in", "out", "pattern", "faster than dense from hidden ="],
        [
            [
                str(c["inputs"]),
                str(c["outputs"]),
                c["contender"],
                f"{c['hidden']:,}" if c["hidden"] else f"none up to {times[-1]['hidden']:,}",
            ]
            for c in crossovers(times)
        ],
    )


if __name__ == "__main__":
    main()
