"""What the hash tables find: recall and softmax mass against ids read and time, for every family and setting.

    python benchmarks/retrieval.py --json benchmarks/results/retrieval.json

The weights are those of the place names model (examples/places.py: 234,908 neurons of width 128) after
some thousand steps, trained twice: without tables (``in-batch``: the batch's labels and a uniform tail,
budget=0), and with the layer's defaults. They are kept in the user's cache folder, so only the first run
trains. Queries are hidden vectors of held-out names.

A line is one setting. ``recall`` is the share of the exact ten largest logits among the candidates within
the budget, ``mass`` the softmax probability of these candidates; ``recall of all read`` counts every id
of the query's buckets, whatever the budget. Ids read count every table; a neuron read twice counts twice.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from common import (
    HIDDEN,
    Classifier,
    argument_parser,
    finish,
    loss_of,
    median,
    milliseconds,
    parse,
    print_table,
    save_checkpoint,
)
from torch import Tensor
from tqdm import tqdm

from slide_torch import LSHLinear, LSHOptions
from slide_torch.optim import Adam
from slide_torch.options import FAMILIES
from slide_torch.sampling import candidates
from slide_torch.tables import HashTables

TOP, BLOCK = 10, 256
CODE_BITS = (6, 9, 12, 15)
TRAINED = {"in-batch": LSHOptions(budget=0), "defaults": LSHOptions()}


def train(options: LSHOptions, args: argparse.Namespace) -> dict[str, Tensor]:
    """Weight, bias and hidden vectors of held-out names, from the quickstart's training loop."""
    import places

    torch.manual_seed(args.seed)
    data = places.load_places()
    head = LSHLinear(HIDDEN, data.num_labels, options=options, sparse=True)
    model = Classifier(data.num_features, HIDDEN, head)
    optimizer = Adam(model.parameters(), lr=1e-2)
    with tqdm(total=args.steps, desc=f"training, budget {options.budget}", unit=" steps") as bar:
        epoch = 0
        while bar.n < args.steps:
            for *features, labels in places.batches(data.train, 256, seed=args.seed + epoch):
                loss = loss_of(model(*features), labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                bar.update()
                if bar.n >= args.steps:
                    break
            epoch += 1
    chosen = np.random.default_rng(args.seed).permutation(len(data.test))[: args.queries]
    with torch.no_grad():
        held_out = places.batches(data.test.select(np.sort(chosen)), 256)
        queries = torch.cat([model.hidden(*features) for *features, _ in held_out])
    return {"w": head.weight.detach(), "b": head.bias.detach(), "q": queries}


def weights(args: argparse.Namespace) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """(how it was trained, {"w" (N, d), "b" (N), "q" (queries, d)}), trained now or before."""
    if args.quick:
        w = torch.randn(40, 1, 32) + 0.5 * torch.randn(40, 50, 32)
        yield (
            "random clusters",
            {"w": w.view(2000, 32), "b": torch.zeros(2000), "q": w[::2, 0] * 1.1},
        )
        return
    if args.weights is not None:
        yield args.weights.name, torch.load(args.weights, weights_only=True)
        return
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "slide_torch"
    folder.mkdir(parents=True, exist_ok=True)
    for how, options in TRAINED.items():
        path = folder / f"retrieval-{how}-{args.steps}-{args.queries}-{args.seed}.pt"
        if not path.exists():
            save_checkpoint(path, train(options, args))
        yield how, torch.load(path, weights_only=True)


def settings(args: argparse.Namespace, neurons: int) -> Iterator[LSHOptions]:
    """Every family that LSHOptions knows, at several code lengths, centred and not."""
    budget = min(args.budget, neurons // 4)
    common = {"pattern": "per_sample", "budget": budget, "tail": 0, "L": args.tables}
    for family in FAMILIES:
        projections = ("hadamard", "gaussian", "sparse") if family == "simhash" else ("auto",)
        per_hash = LSHOptions(family=family).bits_per_hash
        lengths = sorted({max(1, bits // per_hash) for bits in CODE_BITS})
        for projection in projections:
            for center in (True, False):
                for K in lengths[:1] if args.quick else lengths:
                    try:
                        yield LSHOptions(
                            family=family, projection=projection, center=center, K=K, **common
                        )
                    except ValueError as error:
                        print(f"left out: {error}")


class Exact:
    """The exact answers: logits of all queries, their largest, their softmax."""

    def __init__(self, w: Tensor, b: Tensor, q: Tensor) -> None:
        self.logits = F.linear(q, w, b)
        self.top = self.logits.topk(TOP, dim=1).indices
        self.log_normalizer = self.logits.logsumexp(1)

    def score(self, offsets: Tensor, ids: Tensor, first: int) -> tuple[float, float]:
        """Summed recall and softmax mass of candidates (CSR over queries from ``first`` on)."""
        count, neurons = len(offsets) - 1, self.logits.shape[1]
        query = torch.arange(count).repeat_interleave(offsets.diff())
        found = torch.zeros(count * neurons, dtype=torch.bool)
        found[query * neurons + ids] = True
        top = torch.arange(count).unsqueeze(1) * neurons + self.top[first : first + count]
        mass = (self.logits[first + query, ids] - self.log_normalizer[first + query]).exp()
        return found[top].float().mean(1).sum().item(), mass.sum().item()


def measure(options: LSHOptions, w: Tensor, b: Tensor, q: Tensor, exact: Exact) -> dict:
    """One setting's line."""
    started = time.perf_counter()
    tables = HashTables(options, *w.shape, has_bias=True)
    tables.rebuild(w, b)
    built = time.perf_counter() - started
    within, whole = tables.options, dataclasses.replace(tables.options, budget=len(w) - 1)
    blocks = range(0, len(q), BLOCK)
    ms = [milliseconds(lambda: [candidates(tables, w, b, q[i : i + BLOCK]) for i in blocks])
          for _ in range(3)]  # fmt: skip
    sums = dict.fromkeys(("recall", "mass", "recall_of_all_read", "candidates", "ids_read"), 0.0)
    for i in blocks:
        tables.options = within
        offsets, ids = candidates(tables, w, b, q[i : i + BLOCK])
        recall, mass = exact.score(offsets, ids, i)
        sums["recall"] += recall
        sums["mass"] += mass
        sums["candidates"] += len(ids)
        tables.options = whole
        offsets, ids = candidates(tables, w, b, q[i : i + BLOCK])
        sums["recall_of_all_read"] += exact.score(offsets, ids, i)[0]
        sums["ids_read"] += ids_read(tables, q[i : i + BLOCK])
    load = tables.offsets.diff(dim=1)
    return {
        "family": options.family,
        "projection": tables.options.projection if options.family == "simhash" else "",
        "center": options.center,
        "K": options.K,
        "L": tables.options.L,
        "code_bits": tables.family.bits,
        **{key: value / len(q) for key, value in sums.items()},
        "us_query": median(ms) * 1e3 / len(q),
        "build_seconds": built,
        "bucket_max": int(load.max()),
    }


def ids_read(tables: HashTables, q: Tensor) -> int:
    """Lengths of all the queries' buckets, each up to the cap."""
    codes = tables.family.query_codes(q).long()
    lengths = tables.offsets.diff(dim=1).long().gather(1, codes)
    return int(lengths.clamp(max=tables.options.bucket_cap).sum())


def main() -> None:
    parser = argument_parser(__doc__, "2,000 random rows, the shortest codes only")
    parser.add_argument("--steps", type=int, default=3_000, help="of training")
    parser.add_argument("--queries", type=int, default=512)
    parser.add_argument("--budget", type=int, default=1_024, help="most candidates of a query")
    parser.add_argument("--tables", type=int, default=50, help="L")
    parser.add_argument("--weights", type=Path, help="a .pt of w (N, d), b (N), q (n, d) instead")
    args = parse(parser)
    results = []
    for how, held in weights(args):
        w, b, q = held["w"], held["b"], held["q"]
        exact = Exact(w, b, q)
        best = exact.logits.topk(min(args.budget, len(w)), dim=1).values
        mass = (best.logsumexp(1) - exact.log_normalizer).exp().mean().item()
        print(
            f"{how}: {len(w):,} neurons, {len(q)} queries; the exact {best.shape[1]:,} largest logits "
            f"hold {mass:.3f} of the softmax mass; as many drawn at random, {best.shape[1] / len(w):.4f} "
            "of the exact top 10",
            flush=True,
        )
        chosen = list(settings(args, len(w)))
        for options in tqdm(chosen, desc=how, leave=False, disable=not sys.stderr.isatty()):
            results.append({"weights": how} | measure(options, w, b, q, exact))
    report(results)

    def paint(axes) -> None:
        names = list(dict.fromkeys((r["family"], r["projection"]) for r in results))
        for marker, how in zip("o^sv", dict.fromkeys(r["weights"] for r in results), strict=False):
            for i, (family, projection) in enumerate(names):
                own = [r for r in results if (r["weights"], r["family"], r["projection"])
                       == (how, family, projection)]  # fmt: skip
                label = f"{family} {projection}, {how}".replace(" ,", ",")
                x, y = [max(1, r["ids_read"]) for r in own], [r["recall"] for r in own]
                axes.scatter(x, y, s=18, marker=marker, color=f"C{i}", label=label)
        axes.set_xscale("log")
        axes.set_xlabel("ids read a query")
        axes.set_ylabel(f"recall of the exact top {TOP} within {args.budget:,} candidates")
        axes.legend(fontsize=7)

    setting = {"steps": args.steps, "budget": args.budget}
    finish(args, setting, {"settings": results}, paint)


def report(results: list[dict]) -> None:
    print()
    print_table(
        ["weights", "family", "centred", "K", "L", "bits", "ids read", "candidates", "recall",
         "recall of all read", "mass", "us/query", "largest bucket", "build, s"],
        [
            [
                r["weights"],
                f"{r['family']} {r['projection']}".strip(),
                "yes" if r["center"] else "no",
                str(r["K"]),
                str(r["L"]),
                str(r["code_bits"]),
                f"{r['ids_read']:,.0f}",
                f"{r['candidates']:,.0f}",
                f"{r['recall']:.3f}",
                f"{r['recall_of_all_read']:.3f}",
                f"{r['mass']:.3f}",
                f"{r['us_query']:.0f}",
                f"{r['bucket_max']:,}",
                f"{r['build_seconds']:.2f}",
            ]
            for r in results
        ],
    )  # fmt: skip


if __name__ == "__main__":
    main()
