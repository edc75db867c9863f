"""What the hash tables find: recall and softmax mass against ids read and time, for every family and setting.

    python -m benchmarks.accuracy.retrieval --json benchmarks/results/retrieval.json

The weights are those of the place names model (examples/data/places.py: 234,908 neurons of width 128) after
some thousand steps, trained twice: without tables (``in-batch``: the batch's labels and a uniform tail,
budget=0), and with the layer's defaults. They are kept in the user's cache folder, so only the first run
trains. Queries are hidden vectors of held-out names.

A line is one setting; those that ``"auto"`` stands for are marked. ``recall`` is the share of the exact
ten largest logits among the candidates within the budget, ``mass`` the softmax probability of these
candidates. Ids read count every table; a neuron read twice counts twice. Rows are those of the weight that
a query reads: those scored exactly for re-ranking, else the candidates. Times are those of the machine as
it is; compare lines with each other.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from benchmarks.common.arguments import argument_parser, parse
from benchmarks.common.generated import HIDDEN
from benchmarks.common.places_model import cached_file, hidden_of, train_places
from benchmarks.common.record import finish
from examples.common.checkpoint import save_checkpoint
from examples.common.output import print_table
from examples.data import places
from slide_torch import LSHOptions
from slide_torch.options import FAMILIES
from slide_torch.sampling.recall import Exact
from slide_torch.tuning.measure import build, measure

TOP = 10
CODE_BITS = (9, 12, 15)
TRAINED = {"in-batch": LSHOptions(budget=0), "defaults": LSHOptions()}


def train(options: LSHOptions, args: argparse.Namespace) -> dict[str, Tensor]:
    """Weight, bias and hidden vectors of held-out names, after the quickstart's training."""
    data = places.load_places()
    model = train_places(data, args.steps, args.seed, options)
    chosen = np.random.default_rng(args.seed).permutation(len(data.test))[: args.queries]
    queries, _ = hidden_of(model, data.test.select(np.sort(chosen)))
    return {"w": model.head.weight.detach(), "b": model.head.bias.detach(), "q": queries}


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
    for how, options in TRAINED.items():
        path = cached_file(f"retrieval-{how}-{args.steps}-{args.queries}-{args.seed}.pt")
        if not path.exists():
            save_checkpoint(path, train(options, args))
        yield how, torch.load(path, weights_only=True)


def settings(args: argparse.Namespace, neurons: int) -> Iterator[LSHOptions]:
    """What is measured of every family: code lengths; at one of them projections, no centering, augmented
    norms, probes and re-ranking. For k-means: numbers of centroids and of probes."""
    budget = min(args.budget, neurons // 4)
    for family in FAMILIES:
        common: dict = {"pattern": "per_sample", "budget": budget, "tail": 0}
        auto = LSHOptions(family=family, **common).resolve(neurons, HIDDEN)
        yield auto
        if args.quick:
            continue
        if family == "kmeans":
            for K in (auto.K - 1, auto.K, auto.K + 1):
                for probes in (16, 32, 64, 128):
                    if (K, probes) != (auto.K, auto.probes):
                        yield LSHOptions(family=family, K=K, probes=probes, **common)
            yield LSHOptions(family=family, augment_norms=True, **common)
            yield LSHOptions(family=family, center=False, **common)
            continue
        common["L"] = args.tables
        lengths = sorted({max(1, bits // auto.bits_per_hash) for bits in CODE_BITS})
        yield from (LSHOptions(family=family, K=K, **common) for K in lengths if K != auto.K)
        variants: list[dict] = [
            {"center": False},
            {"rerank": 4 * budget},
            {"augment_norms": True},
            {"probes": 4},
            {"probes": 4, "rerank": 4 * budget},
        ]
        if family == "simhash":
            variants += [{"projection": "gaussian"}]
        yield from (LSHOptions(family=family, **variant, **common) for variant in variants)


def measured(options: LSHOptions, w: Tensor, b: Tensor, q: Tensor, exact: Exact) -> dict:
    """One setting's line."""
    tables, built, rehashed = build(options, w, b, torch.Generator().manual_seed(0))
    found = measure(tables, w, b, q, exact)
    resolved = tables.options
    defaults = LSHOptions(
        family=options.family, pattern=resolved.pattern, budget=resolved.budget, tail=0
    )
    return {
        "family": options.family,
        "projection": resolved.projection if options.family == "simhash" else "",
        "center": resolved.center,
        "augment_norms": resolved.augment_norms,
        "K": resolved.K,
        "L": resolved.L,
        "code_bits": resolved.code_bits,
        "probes": resolved.probes,
        "rerank": resolved.rerank,
        "is_auto": resolved == defaults.resolve(*w.shape),
        **found,
        "share_touched": found["rows_touched"] / len(w),
        "build_seconds": built,
        "rehash_seconds": rehashed,
        "bucket_max": int(tables.offsets.diff(dim=1).max()),
    }


def main() -> None:
    parser = argument_parser(__doc__, "2,000 random rows, one setting of each family")
    parser.add_argument("--steps", type=int, default=1_000, help="of training")
    parser.add_argument("--queries", type=int, default=512)
    parser.add_argument("--budget", type=int, default=1_024, help="most candidates of a query")
    parser.add_argument("--tables", type=int, default=50, help="L")
    parser.add_argument("--weights", type=Path, help="a .pt of w (N, d), b (N), q (n, d) instead")
    args = parse(parser)
    results = []
    for how, held in weights(args):
        w, b, q = held["w"], held["b"], held["q"]
        exact = Exact.of(w, b, q, TOP)
        count = min(args.budget, len(w))
        best = [F.linear(some, w, b).topk(count, dim=1).values.logsumexp(1) for some in q.split(16)]
        mass = (torch.cat(best) - exact.log_normalizer).exp().mean().item()
        print(
            f"{how}: {len(w):,} neurons, {len(q)} queries; the exact {count:,} largest logits "
            f"hold {mass:.3f} of the softmax mass; as many drawn at random, {count / len(w):.4f} "
            "of the exact top 10",
            flush=True,
        )
        chosen = list(settings(args, len(w)))
        for options in tqdm(chosen, desc=how, leave=False, disable=not sys.stderr.isatty()):
            results.append({"weights": how} | measured(options, w, b, q, exact))
    report(results)

    setting = {"steps": args.steps, "budget": args.budget}
    record = {"settings": results}
    finish(args, setting, record, lambda axes: paint(axes, results, args.budget))


def report(results: list[dict]) -> None:
    print()
    print_table(
        ["weights", "family", "auto", "centred", "augm.", "K", "L", "probes", "rerank", "ids read", "rows, %",
         "recall", "mass", "us/query", "largest bucket", "build, s", "rehash, s"],
        [
            [
                r["weights"],
                f"{r['family']} {r['projection']}".strip(),
                "yes" if r["is_auto"] else "",
                "yes" if r["center"] else "no",
                "yes" if r["augment_norms"] else "no",
                str(r["K"]),
                str(r["L"]),
                str(r["probes"]),
                f"{r['rerank']:,}",
                f"{r['ids_read']:,.0f}",
                f"{100 * r['share_touched']:.2f}",
                f"{r['recall']:.3f}",
                f"{r['softmax_mass']:.3f}",
                f"{r['us_query']:.0f}",
                f"{r['bucket_max']:,}",
                f"{r['build_seconds']:.2f}",
                f"{r['rehash_seconds']:.2f}",
            ]
            for r in results
        ],
    )  # fmt: skip


def paint(axes: Any, results: list[dict], budget: int) -> None:
    """Recall against the rows that a query touches."""
    names = list(dict.fromkeys((r["family"], r["projection"]) for r in results))
    for marker, how in zip("o^sv", dict.fromkeys(r["weights"] for r in results), strict=False):
        for i, (family, projection) in enumerate(names):
            own = [r for r in results if (r["weights"], r["family"], r["projection"])
                   == (how, family, projection)]  # fmt: skip
            label = f"{family} {projection}, {how}".replace(" ,", ",")
            x = [100 * max(1e-6, r["share_touched"]) for r in own]
            y = [r["recall"] for r in own]
            axes.scatter(x, y, s=18, marker=marker, color=f"C{i}", label=label)
    axes.set_xscale("log")
    axes.set_xlabel("rows of the weight touched by a query, %")
    axes.set_ylabel(f"recall of the exact top {TOP} within {budget:,} candidates")
    axes.legend(fontsize=7)


if __name__ == "__main__":
    main()
