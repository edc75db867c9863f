"""The best k of a trained layer: recall against queries per second, beside torch, faiss and hnswlib.

    python -m benchmarks.speed.prediction --json benchmarks/results/prediction.json

The layer is the quickstart's (234,908 places), trained for --steps steps and kept under
~/.cache/slide_torch; queries are hidden vectors of held-out test names, in random order. What has a
recall to set is calibrated on validation names, and its recall reported on the test names, against
the exact top 10. Contenders take turns in one process on the same threads, of one batch, or of 16
single queries in a row, as they come to a server; medians. faiss and hnswlib are optional (pip
install faiss-cpu hnswlib), both over inner products with the bias as one more coordinate. Exact
prediction is also timed on random weights of Amazon-670K's shape.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common.arguments import argument_parser, parse
from benchmarks.common.generated import HIDDEN, LABELS
from benchmarks.common.places_model import draw_rows, hidden_of, kept_model
from benchmarks.common.record import finish
from benchmarks.common.timing import alternate
from examples.common.output import print_table
from examples.data import places
from slide_torch import LSHLinear, LSHOptions

from .prediction_rivals import find_rivals

RECALLS = (0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99)

Search = Callable[[Tensor], Tensor]  # queries (n, d) -> ids (n, k)


def main() -> None:
    parser = argument_parser(__doc__, "50 steps, 256 queries, one round, nothing at 670,091 rows")
    parser.add_argument("--steps", type=int, default=3000, help="training steps of the layer")
    parser.add_argument("--queries", type=int, default=2048)
    parser.add_argument("--k", type=int, default=10)
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 256])
    parser.add_argument("--rounds", type=int, default=7)
    args = parse(parser)
    if args.quick:
        args.steps, args.queries, args.rounds = 50, 256, 1
    scale = [] if args.quick else exact_at_scale(args)
    results, more = measure(args)
    report(args, scale, results, more["tables"])
    finish(
        args,
        {"steps": args.steps, "k": args.k},
        {"contenders": results, "exact_at_scale": scale, **more},
        lambda axes: paint(axes, args, results),
    )


@torch.no_grad()
def exact_at_scale(args: argparse.Namespace) -> list[dict]:
    """Milliseconds on random weights of Amazon-670K's shape."""
    layer = LSHLinear(HIDDEN, LABELS)
    results = []
    for batch in args.batches:
        x = torch.randn(batch, HIDDEN)
        times = alternate(
            {
                "predict_ms": lambda x=x: layer.predict(x, args.k),
                "linear_ms": lambda x=x: F.linear(x, layer.weight, layer.bias),
                "linear_topk_ms": lambda x=x: F.linear(x, layer.weight, layer.bias).topk(args.k),
            },
            args.rounds,
        )
        results.append({"batch": batch, "labels": LABELS, **times})
    return results


def measure(args: argparse.Namespace) -> tuple[list[dict], dict[str, Any]]:
    """Every contender's recall and speed on the trained layer; what else the record holds."""
    data = places.load_places()
    head = (model := kept_model(data, args.steps, args.seed)).head
    queries, _ = hidden_of(model, draw_rows(data.test, args.queries, args.seed))
    validation, _ = hidden_of(model, draw_rows(data.validation, args.queries, args.seed))
    contenders, missing = find_contenders(args, head, validation)
    best = head.predict(queries, args.k)[1]
    results = []
    for result, search in contenders:
        ids = torch.cat([search(x) for x in queries.split(256)])
        results.append(result | {"recall": recall_of(ids, best)})
    searches = [search for _, search in contenders]
    for batch in args.batches:
        times = time_searches(searches, queries, batch, args.rounds)
        for result, ms in zip(results, times, strict=True):
            result[f"queries_per_second_{batch}"] = batch / ms * 1e3
            result[f"times_exact_{batch}"] = times[1] / ms
            result[f"times_torch_{batch}"] = times[0] / ms
    more = {
        "not_installed": missing,
        "partition_mb": head.calibration.partition.memory_bytes() / 2**20,
        "tables": tables_recall(head, queries, args.k),
    }
    return results, more


@torch.no_grad()
def find_contenders(
    args: argparse.Namespace, head: LSHLinear, validation: Tensor
) -> tuple[list[tuple[dict, Search]], dict[str, str]]:
    """A line of the record and a search for each contender, torch and exact prediction first; and which
    libraries are missing. What has a recall to set is calibrated on the ``validation`` vectors."""
    weight, bias = head.weight.detach(), head.bias.detach()
    started = time.perf_counter()
    generator = torch.Generator().manual_seed(args.seed)
    head.calibrate(validation, args.k, 0.5, generator=generator)
    built = time.perf_counter() - started

    def approximate(calibration: Any) -> Search:
        def search(x: Tensor) -> Tensor:
            head.calibration = calibration
            return head.predict(x, args.k, exact=False)[1]

        return search

    def foreign(search: Callable) -> Search:
        def run(x: Tensor) -> Tensor:
            with_one = torch.cat([x, torch.ones(len(x), 1)], 1)
            return torch.from_numpy(search(with_one.numpy(), args.k))

        return run

    entries: list[tuple[str, str, float, Search]] = [
        ("torch.topk(F.linear)", "", 0.0, lambda x: F.linear(x, weight, bias).topk(args.k)[1]),
        ("slide_torch, exact", "", 0.0, lambda x: head.predict(x, args.k)[1]),
    ]
    for recall in RECALLS:
        head.calibrate(validation, args.k, recall)
        found = head.calibration
        name = f"recall {recall}, {found.probes} of {found.partition.lists} lists"
        entries.append(("slide_torch, exact=False", name, built, approximate(found)))
    points = torch.cat([weight, bias.unsqueeze(1)], 1).numpy()
    rivals, missing = find_rivals(points, args.threads, args.seed)
    for r in rivals:
        entries.append((r.family, str(r.setting), r.build_seconds, foreign(r.search)))
    names = ("family", "setting", "build_seconds")
    return [(dict(zip(names, about, strict=True)), run) for *about, run in entries], missing


@torch.no_grad()
def time_searches(searches: list[Search], queries: Tensor, batch: int, rounds: int) -> list[float]:
    """Median milliseconds of each on ``batch`` queries, others at every turn. Small batches follow one
    another in a turn: the contender before may have left nothing in the caches."""
    blocks = queries.split(batch)[: len(queries) // batch]
    in_a_row = max(1, 16 // batch)

    def turn_of(search: Search) -> Callable[[], object]:
        own = itertools.cycle(blocks)

        def turn() -> None:
            for block in itertools.islice(own, in_a_row):
                search(block)

        return turn

    times = alternate({str(i): turn_of(search) for i, search in enumerate(searches)}, rounds)
    return [ms / in_a_row for ms in times.values()]


def recall_of(found: Tensor, best: Tensor) -> float:
    """Share of the ``best`` ids (n, k) that were ``found`` (n, k)."""
    return (found.unsqueeze(2) == best.unsqueeze(1)).any(2).float().mean().item()


def tables_recall(head: LSHLinear, queries: Tensor, k: int) -> list[dict]:
    """Share of the exact top k that hash tables over the same rows return: why they do not predict."""
    results = []
    for family, K, L in (
        ("simhash", 6, 64),
        ("simhash", 11, 64),
        ("dwta", 3, 50),
        ("dwta", 4, 100),
    ):
        options = LSHOptions(
            pattern="per_sample", budget=8192, tail=0, family=family, K=K, L=L, bucket_cap=2**20
        )
        layer = LSHLinear.from_linear(head.to_linear(), options=options)
        recall = layer.recall(queries[:256], k)
        results.append({"family": family, "K": K, "L": L, "budget": 8192, "recall": recall})
    return results


def report(
    args: argparse.Namespace, scale: list[dict], results: list[dict], tables: list[dict]
) -> None:
    columns = ["exact, N = 670,091: batch", "predict ms", "F.linear ms", "F.linear + topk ms"]
    keys = ("predict_ms", "linear_ms", "linear_topk_ms")
    print_table(columns, [[str(r["batch"]), *(f"{r[key]:.1f}" for key in keys)] for r in scale])
    print()
    columns = ["contender", "setting", "recall", "build s"]
    for batch in args.batches:
        columns += [f"queries/s, batch {batch}", "times exact", "times torch"]
    rows = []
    for r in results:
        row = [r["family"], r["setting"], f"{r['recall']:.3f}", f"{r['build_seconds']:.0f}"]
        for batch in args.batches:
            row += [f"{r[f'queries_per_second_{batch}']:,.0f}", f"{r[f'times_exact_{batch}']:.1f}"]
            row.append(f"{r[f'times_torch_{batch}']:.1f}")
        rows.append(row)
    print_table(columns, rows)
    print()
    columns = ["tables, 8,192 rows kept", "K", "L", "recall"]
    rows = [[t["family"], str(t["K"]), str(t["L"]), f"{t['recall']:.3f}"] for t in tables]
    print_table(columns, rows)


def paint(axes: Any, args: argparse.Namespace, results: list[dict]) -> None:
    """Queries per second against recall, a color for each family, a line style for each batch."""
    for family in dict.fromkeys(r["family"] for r in results):
        own = sorted((r for r in results if r["family"] == family), key=lambda r: r["recall"])
        recall, color = [r["recall"] for r in own], None
        for batch, style in zip(args.batches, ("--", "-", ":", "-."), strict=False):
            speed = [r[f"queries_per_second_{batch}"] for r in own]
            label = f"{family}, batch {batch}"
            look = {"marker": "o", "markersize": 4, "color": color, "label": label}
            (line,) = axes.plot(recall, speed, style, **look)
            color = line.get_color()
    axes.set_yscale("log")
    axes.set_xlabel(f"recall of the exact top {args.k}, held-out names")
    axes.set_ylabel("queries per second")
    axes.legend(fontsize=6)


if __name__ == "__main__":
    main()
