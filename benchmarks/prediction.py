"""The best k of a trained layer: recall against queries per second, beside torch, faiss and hnswlib.

    python benchmarks/prediction.py --json benchmarks/results/prediction.json
    python benchmarks/prediction.py --sweep --json benchmarks/results/prediction_sweep.json

The layer is the quickstart's (234,908 places), trained for --steps steps and kept under
~/.cache/slide_torch; queries are hidden vectors of held-out test names, in random order. What has a
recall to set is calibrated on validation names, and its recall reported on the test names, against
the exact top 10. Contenders take turns in one process on the same threads; medians. faiss and
hnswlib are optional (pip install faiss-cpu hnswlib), both over inner products with the bias as one
more coordinate. Exact prediction is also timed on random weights of Amazon-670K's shape.

--sweep tries the constants of slide_torch/predict.py instead, one at a time: calibrated on one half of the
validation names, recall and speed on the other half. Test names take no part in it.
"""

from __future__ import annotations

import itertools
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from common import HIDDEN, LABELS, argument_parser, finish, median, parse, print_table

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import classifier
import places

from slide_torch import LSHLinear, LSHOptions
from slide_torch.optim import Adam
from slide_torch.prediction import partition

RECALLS = (0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99)
SWEPT = {
    "LISTS_PER_ROOT": (1, 2, 4, 8),
    "RADIUS_WEIGHTS": ((0.1,), (0.2,), (0.3,), (0.4,)),
    "ITERATIONS": (5, 10, 20),
    "SAMPLE_PER_LIST": (64, 256),
    "RESCORED_PER_K": (1, 2, 4),
}


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "slide_torch"


def train_places(data, steps: int, seed: int, lr: float = 1e-2) -> classifier.Classifier:
    """The quickstart's model after `steps` steps with batches of 256, from the cache if it is there."""
    torch.manual_seed(seed)
    head = LSHLinear(HIDDEN, data.num_labels, sparse=True)
    model = classifier.Classifier(data.num_features, HIDDEN, head)
    file = cache_folder() / f"prediction-{steps}-{seed}.pt"
    if file.exists():
        model.load_state_dict(torch.load(file, weights_only=True))
        return model
    optimizer = Adam(model.parameters(), lr=lr)
    step = epoch = 0
    while step < steps:
        for indices, offsets, values, labels in places.batches(data.train, 256, seed=seed + epoch):
            loss = classifier.loss_of(model(indices, offsets, values), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            if step % 500 == 0:
                print(f"training: step {step} of {steps}", flush=True)
            if step == steps:
                break
        epoch += 1
    file.parent.mkdir(parents=True, exist_ok=True)
    classifier.save_checkpoint(file, model.state_dict())
    return model


@torch.no_grad()
def hidden_of(model: classifier.Classifier, split, count: int, seed: int):
    """Hidden vectors and labels (padded) of `count` rows in random order."""
    chosen = np.random.default_rng(seed).permutation(len(split))[:count]
    rows = split.select(chosen)
    parts = [model.hidden(*batch[:3]) for batch in places.batches(rows, 256)]
    return torch.cat(parts), classifier.labels_of(rows)


def alternate(contenders: dict, rounds: int) -> dict[str, float]:
    """Median milliseconds of each."""
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    for run in contenders.values():
        run()
    for _ in range(rounds):
        for name, run in contenders.items():
            started = time.perf_counter()
            run()
            taken[name].append((time.perf_counter() - started) * 1e3)
    return {name: median(times) for name, times in taken.items()}


def recall_of(found: torch.Tensor, best: torch.Tensor) -> float:
    return (found.unsqueeze(2) == best.unsqueeze(1)).any(2).float().mean().item()


def others(points: np.ndarray, threads: int, seed: int):
    """(family, setting, seconds to build, search(queries with a 1 appended, k) -> ids) of what is
    installed; and what is not."""
    found, missing = [], {}
    try:
        import faiss

        faiss.omp_set_num_threads(threads)
        lists = round(2 * len(points) ** 0.5)
        started = time.perf_counter()
        ivf = faiss.IndexIVFFlat(
            faiss.IndexFlatIP(points.shape[1]), points.shape[1], lists, faiss.METRIC_INNER_PRODUCT
        )
        ivf.cp.seed = seed
        ivf.train(points)
        ivf.add(points)
        seconds = time.perf_counter() - started

        def ivf_search(nprobe):
            def search(x, k):
                ivf.nprobe = nprobe
                return ivf.search(x, k)[1]

            return search

        for nprobe in (4, 16, 64, 128, 256):
            found.append(("faiss IVF-Flat", nprobe, seconds, ivf_search(nprobe)))
        started = time.perf_counter()
        hnsw = faiss.IndexHNSWFlat(points.shape[1], 32, faiss.METRIC_INNER_PRODUCT)
        hnsw.add(points)
        seconds = time.perf_counter() - started

        def hnsw_search(ef):
            def search(x, k):
                hnsw.hnsw.efSearch = ef
                return hnsw.search(x, k)[1]

            return search

        for ef in (16, 64, 256, 1024):
            found.append(("faiss HNSW", ef, seconds, hnsw_search(ef)))
    except ImportError as error:
        missing["faiss"] = str(error)
    try:
        import hnswlib

        started = time.perf_counter()
        graph = hnswlib.Index("ip", points.shape[1])
        graph.init_index(len(points), ef_construction=200, M=16, random_seed=seed)
        graph.add_items(points, num_threads=threads)
        seconds = time.perf_counter() - started

        def graph_search(ef):
            def search(x, k):
                graph.set_ef(ef)
                return graph.knn_query(x, k, num_threads=threads)[0].astype(np.int64)

            return search

        for ef in (16, 64, 256, 1024):
            found.append(("hnswlib", ef, seconds, graph_search(ef)))
    except ImportError as error:
        missing["hnswlib"] = str(error)
    return found, missing


def trained(args) -> tuple[list[dict], dict]:
    data = places.load_places()
    model = train_places(data, args.steps, args.seed)
    head = model.head
    queries, _ = hidden_of(model, data.test, args.queries, args.seed)
    validation, _ = hidden_of(model, data.validation, args.queries, args.seed)
    weight, bias = head.weight.detach(), head.bias.detach()
    best = head.predict(queries, args.k)[1]
    started = time.perf_counter()
    head.calibrate(validation, args.k, 0.5, generator=torch.Generator().manual_seed(args.seed))
    built = time.perf_counter() - started

    def approximate(calibration):
        def search(x):
            head.calibration = calibration
            return head.predict(x, args.k, exact=False)[1]

        return search

    entries = [
        ("torch.topk(F.linear)", "", 0.0, lambda x: F.linear(x, weight, bias).topk(args.k)[1]),
        ("slide_torch, exact", "", 0.0, lambda x: head.predict(x, args.k)[1]),
    ]
    for recall in RECALLS:
        head.calibrate(validation, args.k, recall)
        found = head.calibration
        name = f"recall {recall}, {found.probes} of {found.partition.lists} lists"
        entries.append(("slide_torch, exact=False", name, built, approximate(head.calibration)))
    partition_mb = head.calibration.partition.memory_bytes() / 2**20
    points = torch.cat([weight, bias.unsqueeze(1)], 1).numpy()
    found, missing = others(points, args.threads, args.seed)

    def foreign(search):
        def run(x):
            with_one = torch.cat([x, torch.ones(len(x), 1)], 1)
            return torch.from_numpy(search(with_one.numpy(), args.k))

        return run

    for family, setting, seconds, search in found:
        entries.append((family, str(setting), seconds, foreign(search)))
    results = []
    with torch.no_grad():
        for family, setting, seconds, search in entries:
            ids = torch.cat([search(x) for x in queries.split(256)])
            results.append(
                {"family": family, "setting": setting, "build_seconds": seconds}
                | {"recall": recall_of(ids, best)}
            )
        for batch in args.batches:
            blocks = queries.split(batch)[: len(queries) // batch]
            turns = {}
            for number, (*_, search) in enumerate(entries):

                def turn(search=search, blocks=itertools.cycle(blocks)):  # noqa: B008
                    search(next(blocks))

                turns[str(number)] = turn
            times = alternate(turns, args.rounds * (5 if batch < 16 else 1))
            for number, result in enumerate(results):
                result[f"queries_per_second_{batch}"] = batch / times[str(number)] * 1e3
                result[f"times_exact_{batch}"] = times["1"] / times[str(number)]
                result[f"times_torch_{batch}"] = times["0"] / times[str(number)]
    more = {
        "not_installed": missing,
        "partition_mb": partition_mb,
        "tables": tables_recall(head, queries, args.k),
    }
    return results, more


def tables_recall(head: LSHLinear, queries: torch.Tensor, k: int) -> list[dict]:
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


def sweep(args) -> list[dict]:
    """Each constant at its other values, the rest as they are: build, recall and speed at --recall."""
    data = places.load_places()
    model = train_places(data, args.steps, args.seed)
    head = model.head
    names, _ = hidden_of(model, data.validation, args.queries, args.seed)
    ours, queries = names.chunk(2)
    best = head.predict(queries, args.k)[1]
    settings, results = [], []
    for name, values in SWEPT.items():
        default = getattr(constants, name)
        for value in values:
            if value == default and any(r["default"] for r in results):
                continue  # the defaults once
            setattr(partition, name, value)
            head.calibration = None
            started = time.perf_counter()
            head.calibrate(
                ours, args.k, args.recall, generator=torch.Generator().manual_seed(args.seed)
            )
            seconds = time.perf_counter() - started
            setattr(partition, name, default)
            found = head.predict(queries, args.k, exact=False)[1]
            settings.append(head.calibration)
            results.append(
                {"constant": name, "value": value, "default": value == default}
                | {"lists": head.calibration.partition.lists, "probes": head.calibration.probes}
                | {"rescored": head.calibration.rescored, "build_seconds": seconds}
                | {"recall": recall_of(found, best)}
            )
    for batch in args.batches:
        blocks = itertools.cycle(queries.split(batch)[: len(queries) // batch])

        def run(calibration, blocks=blocks):
            head.calibration = calibration
            head.predict(next(blocks), args.k, exact=False)

        turns = {str(i): (lambda c=c: run(c)) for i, c in enumerate(settings)}
        times = alternate(turns, args.rounds * (20 if batch < 16 else 3))
        for i, result in enumerate(results):
            result[f"queries_per_second_{batch}"] = batch / times[str(i)] * 1e3
    return results


def run_sweep(args) -> None:
    results = sweep(args)
    columns = ["constant", "value", "lists", "probes", "rescored", "recall", "build s"]
    columns += [f"queries/s, batch {batch}" for batch in args.batches]
    rows = [
        [
            r["constant"] + (" (default)" if r["default"] else ""),
            str(r["value"]),
            *(str(r[key]) for key in ("lists", "probes", "rescored")),
            f"{r['recall']:.3f}",
            f"{r['build_seconds']:.0f}",
            *(f"{r[f'queries_per_second_{batch}']:,.0f}" for batch in args.batches),
        ]
        for r in results
    ]
    print_table(columns, rows)

    def paint(axes) -> None:
        batch = args.batches[-1]
        for name in SWEPT:
            own = [r for r in results if r["constant"] == name or r["default"]]
            own.sort(
                key=lambda r: r["value"] if r["constant"] == name else getattr(constants, name)
            )
            speed = [r[f"queries_per_second_{batch}"] for r in own]
            axes.plot(range(len(own)), speed, marker="o", label=name)
        axes.set_ylabel(f"queries per second, batch {batch}")
        axes.set_xlabel("its values, increasing")
        axes.legend(fontsize=6)

    setting = {"steps": args.steps, "k": args.k, "asked for": args.recall}
    finish(args, setting, {"settings": results}, paint)


@torch.no_grad()
def exact_at_scale(args) -> list[dict]:
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


def main() -> None:
    parser = argument_parser(__doc__, "50 steps, 256 queries, one round, nothing at 670,091 rows")
    parser.add_argument("--steps", type=int, default=3000, help="training steps of the layer")
    parser.add_argument("--queries", type=int, default=2048)
    parser.add_argument("--k", type=int, default=10)
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 256])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--sweep", action="store_true", help="try the constants of predict.py")
    parser.add_argument("--recall", type=float, default=0.95, help="asked for in the sweep")
    args = parse(parser)
    if args.quick:
        args.steps, args.queries, args.rounds = 50, 256, 1
    if args.sweep:
        run_sweep(args)
        return
    scale = [] if args.quick else exact_at_scale(args)
    results, more = trained(args)
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
    rows = [[t["family"], str(t["K"]), str(t["L"]), f"{t['recall']:.3f}"] for t in more["tables"]]
    print_table(columns, rows)

    def paint(axes) -> None:
        for family in dict.fromkeys(r["family"] for r in results):
            own = sorted((r for r in results if r["family"] == family), key=lambda r: r["recall"])
            recall, color = [r["recall"] for r in own], None
            for batch, style in zip(args.batches, ("--", "-", ":", "-."), strict=False):
                speed = [r[f"queries_per_second_{batch}"] for r in own]
                (line,) = axes.plot(
                    recall,
                    speed,
                    style,
                    marker="o",
                    markersize=4,
                    color=color,
                    label=f"{family}, batch {batch}",
                )
                color = line.get_color()
        axes.set_yscale("log")
        axes.set_xlabel(f"recall of the exact top {args.k}, held-out names")
        axes.set_ylabel("queries per second")
        axes.legend(fontsize=6)

    finish(
        args,
        {"steps": args.steps, "k": args.k},
        {"contenders": results, "exact_at_scale": scale, **more},
        paint,
    )


if __name__ == "__main__":
    main()
