"""A whole training step on Amazon-670K's shape (128 -> 670,091), beside all that a user could pick instead.

    python benchmarks/step_time.py --batch 128 --json benchmarks/results/step_time.json

Every contender lives in a process of its own; they take turns, a few steps each, for several rounds, so
that a noisy neighbour meets all of them. Medians. The same generated batches for all (see common.py);
losses that take one label a row get the first. LSH steps include the tables' upkeep: a rehash after a
whole period of steps and now and then a rebuild, measured, divided by the steps of that period (the
first, 50; periods grow later). Random data: speed only, no accuracy.
"""

from __future__ import annotations

import argparse
import gc
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from common import (
    FEATURES,
    HIDDEN,
    LABELS,
    Worker,
    generate_batches,
    machine,
    median,
    print_table,
    resident_gb,
    write_json,
)
from torch import nn

TOO_SLOW_MS = 10_000  # bf16 without hardware for it, say
STEPS_A_TURN = {"dense": 1, "adaptive": 3, "sampled": 10, "lsh": 10}


def contender(name: str, batch: int, threads: int, seed: int, labels: int):
    """Builds the model and returns run(steps) -> {"ms": [...], "phases": {...}, ...}."""
    import slide_torch
    from slide_torch import LSHLinear, LSHOptions

    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    data = generate_batches(64, batch, seed=seed, labels=labels)
    gc.collect()
    base = resident_gb()
    embedding = nn.EmbeddingBag(FEATURES, HIDDEN, mode="sum", include_last_offset=True, sparse=True)
    adam = slide_torch.optim.Adam

    def linear():
        layer = nn.Linear(HIDDEN, labels)
        return layer, adam([*embedding.parameters(), *layer.parameters()], lr=1e-3)

    def dense_loss(logits, target):
        kept = target >= 0
        own = F.log_softmax(logits, 1).gather(1, target.clamp(min=0)) * kept
        return -(own.sum(1) / kept.sum(1).clamp(min=1)).mean()

    if name in ("dense_fp32", "dense_bf16", "dense_compile"):
        head, optimizer = linear()

        def loss_of(hidden, target):
            return dense_loss(head(hidden), target)

        if name == "dense_compile":
            loss_of = torch.compile(loss_of, dynamic=True)
        if name == "dense_bf16":
            inner = loss_of

            def loss_of(hidden, target):
                with torch.autocast("cpu", torch.bfloat16):
                    return inner(hidden, target)

    elif name == "dense_linear_cross_entropy":
        head, optimizer = linear()

        def loss_of(hidden, target):
            return F.linear_cross_entropy(
                hidden, head.weight, target[:, 0].contiguous(), linear_bias=head.bias
            )

    elif name == "adaptive_log_softmax":
        cut = [labels * 3 // 100, labels * 18 // 100, labels * 48 // 100]
        head = nn.AdaptiveLogSoftmaxWithLoss(HIDDEN, labels, cut)
        optimizer = adam([*embedding.parameters(), *head.parameters()], lr=1e-3)

        def loss_of(hidden, target):
            return head(hidden, target[:, 0].contiguous()).loss

    elif name.startswith("sampled"):
        weight = nn.Embedding(labels, HIDDEN, sparse=True)
        bias = nn.Embedding(labels, 1, sparse=True)
        nn.init.uniform_(weight.weight, -(HIDDEN**-0.5), HIDDEN**-0.5)
        params = [*embedding.parameters(), *weight.parameters(), *bias.parameters()]
        optimizer = adam(params, lr=1e-3)
        drawn = 8192 if name == "sampled_uniform_8192" else 0

        def loss_of(hidden, target):
            kept = target >= 0
            own = target[kept]
            classes = torch.cat([own, torch.randint(labels, (drawn,))]).unique()
            place = torch.searchsorted(classes, target.clamp(min=0)) * kept
            scores = hidden @ weight(classes).T + bias(classes).T
            log_p = F.log_softmax(scores, 1).gather(1, place) * kept
            return -(log_p.sum(1) / kept.sum(1)).mean()

    else:
        options = {
            "lsh_shared": LSHOptions(),
            "lsh_per_sample": LSHOptions(pattern="per_sample", budget=3840, tail=0),
            "lsh_dense_grad": LSHOptions(),
        }[name]
        sparse = name != "lsh_dense_grad"
        head = LSHLinear(HIDDEN, labels, options=options, sparse=sparse)
        params = [*embedding.parameters(), *head.parameters()]
        optimizer = adam(params, lr=1e-3)

        def loss_of(hidden, target):
            return F.cross_entropy(head(hidden), target)

    step_number = 0

    def run(steps: int) -> dict:
        nonlocal step_number
        ms, phases = [], {"forward": [], "backward": [], "optimizer": []}
        active = []
        for _ in range(steps):
            indices, offsets, values, target = data[step_number % len(data)]
            step_number += 1
            t0 = time.perf_counter()
            hidden = torch.relu(embedding(indices, offsets, per_sample_weights=values))
            loss = loss_of(hidden, target)
            t1 = time.perf_counter()
            optimizer.zero_grad()
            loss.backward()
            t2 = time.perf_counter()
            optimizer.step()
            t3 = time.perf_counter()
            ms.append((t3 - t0) * 1e3)
            for phase, seconds in zip(phases, (t1 - t0, t2 - t1, t3 - t2), strict=True):
                phases[phase].append(seconds * 1e3)
            if name.startswith("lsh"):
                active.append(head.stats()["active_per_sample"])
        answer = {
            "ms": ms,
            "phases": phases,
            "peak_gb": resident_gb("VmHWM") - base,
            "active": active,
        }
        if name.startswith("lsh"):
            stats = head.stats()
            answer["ids_read"] = stats["ids_read"]
            answer["union"] = stats["union"]
            answer["tables_gb"] = head.tables.memory_bytes() / 2**30
        return answer

    def upkeep() -> tuple[float, float]:
        """Milliseconds of a rehash after one whole period of steps, and of a rebuild."""
        head.rehash()
        run(head.options.rehash_every)
        t0 = time.perf_counter()
        rows = head.tables.dirty.nonzero().flatten() if sparse else None
        head.tables.rehash(head.weight, head.bias, rows=rows)
        t1 = time.perf_counter()
        head.rebuild()
        return (t1 - t0) * 1e3, (time.perf_counter() - t1) * 1e3

    def command(steps: int):
        return upkeep() if steps < 0 else run(steps)

    return command


CONTENDERS = (
    "dense_fp32",
    "dense_bf16",
    "dense_compile",
    "dense_linear_cross_entropy",
    "adaptive_log_softmax",
    "sampled_inbatch",
    "sampled_uniform_8192",
    "lsh_per_sample",
    "lsh_shared",
    "lsh_dense_grad",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--labels", type=int, default=LABELS)
    parser.add_argument("--only", nargs="*", default=CONTENDERS, choices=CONTENDERS)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    workers, failed, answers = {}, {}, {}
    for name in args.only:
        try:
            workers[name] = Worker(
                contender, name, args.batch, args.threads, args.seed, args.labels
            )
            workers[name].run(1)  # warm up: first touches, compilation, table build
            second = workers[name].run(1)
            if second["ms"][0] > TOO_SLOW_MS:  # no need to measure that often
                answers[name] = [second]
                print(f"{name}: {second['ms'][0]:.0f} ms a step, measured once", flush=True)
        except RuntimeError as error:
            failed[name] = str(error).strip().splitlines()[-1]
            workers.pop(name, None)
            print(f"{name}: {failed[name]}", flush=True)
    takes_turns = [name for name in workers if name not in answers]
    answers = {name: answers.get(name, []) for name in workers}
    for _ in range(args.rounds):
        for name in takes_turns:
            worker = workers[name]
            answers[name].append(worker.run(STEPS_A_TURN[name.split("_")[0]]))
    upkeep = {name: workers[name].run(-1) for name in takes_turns if name.startswith("lsh")}
    from slide_torch import LSHOptions

    options = LSHOptions()
    results = []
    for name, turns in answers.items():
        ms = median([m for turn in turns for m in turn["ms"]])
        phases = {
            phase: median([m for turn in turns for m in turn["phases"][phase]])
            for phase in turns[0]["phases"]
        }
        result = {"contender": name, "peak_gb": turns[-1]["peak_gb"], "phases": phases}
        if name.startswith("lsh"):
            result["rehash_ms"], result["rebuild_ms"] = upkeep[name]
            share = 1 / options.rebuild_every  # of rehashes that are rebuilds
            each = (1 - share) * result["rehash_ms"] + share * result["rebuild_ms"]
            phases["upkeep"] = each / options.rehash_every
            ms += phases["upkeep"]
            result["active_per_sample"] = median([a for turn in turns for a in turn["active"]])
            result["union"] = turns[-1]["union"]
            result["ids_read_per_sample"] = turns[-1]["ids_read"] / args.batch
            result["tables_gb"] = turns[-1]["tables_gb"]
        result["ms_step"] = ms
        results.append(result)
    for worker in workers.values():
        worker.stop()
    dense = [r["ms_step"] for r in results if r["contender"].startswith("dense")]
    best = min(dense) if dense else None
    for result in results:
        result["times_best_dense"] = best / result["ms_step"] if best else None
    where = machine() | {"batch": args.batch, "labels": args.labels, "seed": args.seed}
    write_json(args.json, {"machine": where, "contenders": results, "failed": failed})
    print(", ".join(f"{k} {v}" for k, v in where.items()) + "\n")
    rows = [
        [
            r["contender"],
            f"{r['ms_step']:.1f}",
            f"{r['times_best_dense']:.1f}x" if best else "",
            f"{r['peak_gb']:.2f}",
            f"{r['active_per_sample']:,.0f}" if "active_per_sample" in r else "",
            ", ".join(f"{phase} {ms:.1f}" for phase, ms in r["phases"].items()),
        ]
        for r in results
    ]
    print_table(
        ["contender", "ms/step", "best dense / it", "peak GB", "active/sample", "phases, ms"], rows
    )


if __name__ == "__main__":
    main()
