"""A whole training step on Amazon-670K's shape (128 -> 670,091), beside all that a user could pick instead.

    python benchmarks/step_time.py --batch 128 --json benchmarks/results/step_time.json

Every contender lives in a process of its own; they take turns, a few steps each, for several rounds, so
that a noisy neighbour meets all of them. Medians. The same generated batches for all (see common.py);
losses that take one label a row get the first. LSH steps include the tables' upkeep: the rehashes and
rebuilds of the first 1,000 steps (periods grow from 25), each as long as one measured after a whole first
period, spread over those steps. Row-sparse LSH contenders update inside backward (fuse_backward), so the
head's Adam is in their backward time. Random data: speed only, no accuracy.

Those named ``_bf16_moments`` keep Adam's moments of the head in bfloat16, those named ``_bf16_parameters``
its parameters too, whose Adam is a step of its own.

One more contender measures the memory's bandwidth in the same rounds; a second table holds each part of
the LSH steps against the bytes that it must move, a third says what each contender's memory holds.
"""

from __future__ import annotations

import gc
import math
import time

import torch
import torch.nn.functional as F
from common import (
    FEATURES,
    HIDDEN,
    LABELS,
    Memory,
    Worker,
    argument_parser,
    best_rates,
    bound_ms,
    finish,
    generate_batches,
    loss_of,
    median,
    parse,
    print_rates,
    print_table,
    resident_gb,
)
from torch import nn

TOO_SLOW_MS = 10_000  # bf16 without hardware for it, say
PHASES = (
    "embedding",
    "forward",
    "backward",
    "embedding_backward",
    "embedding_optimizer",
    "head_optimizer",
)
UPKEEP_STEPS = 1000
NARROW = "_bf16_moments"  # of the head's Adam
NARROW_PARAMETERS = "_bf16_parameters"
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

    if name in ("dense_fp32", "dense_bf16", "dense_compile"):
        head = nn.Linear(HIDDEN, labels)

        def head_loss(hidden, target):
            return loss_of(head(hidden), target)

        if name == "dense_compile":
            head_loss = torch.compile(head_loss, dynamic=True)
        if name == "dense_bf16":
            inner = head_loss

            def head_loss(hidden, target):
                with torch.autocast("cpu", torch.bfloat16):
                    return inner(hidden, target)

    elif name == "dense_linear_cross_entropy":
        head = nn.Linear(HIDDEN, labels)

        def head_loss(hidden, target):
            return F.linear_cross_entropy(
                hidden, head.weight, target[:, 0].contiguous(), linear_bias=head.bias
            )

    elif name == "adaptive_log_softmax":
        cut = [labels * 3 // 100, labels * 18 // 100, labels * 48 // 100]
        head = nn.AdaptiveLogSoftmaxWithLoss(HIDDEN, labels, cut)

        def head_loss(hidden, target):
            return head(hidden, target[:, 0].contiguous()).loss

    elif name.startswith("sampled"):
        weight = nn.Embedding(labels, HIDDEN, sparse=True)
        bias = nn.Embedding(labels, 1, sparse=True)
        nn.init.uniform_(weight.weight, -(HIDDEN**-0.5), HIDDEN**-0.5)
        head = nn.ModuleList([weight, bias])
        drawn = 8192 if name == "sampled_uniform_8192" else 0

        def head_loss(hidden, target):
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
            "lsh_shared_simhash": LSHOptions(family="simhash"),
            "lsh_per_sample": LSHOptions(pattern="per_sample", budget=3840, tail=0),
            "lsh_dense_grad": LSHOptions(),
        }[name.removesuffix(NARROW).removesuffix(NARROW_PARAMETERS)]
        sparse = name != "lsh_dense_grad"
        dtype = torch.bfloat16 if name.endswith(NARROW_PARAMETERS) else torch.float32
        head = LSHLinear(HIDDEN, labels, options=options, sparse=sparse, dtype=dtype)

        def head_loss(hidden, target):
            return F.cross_entropy(head(hidden.to(dtype)), target)

    fuse = name.startswith(("lsh_per_sample", "lsh_shared")) and not name.endswith(
        NARROW_PARAMETERS
    )
    narrow = torch.bfloat16 if name.endswith(NARROW) else None
    optimizers = [
        adam(embedding.parameters(), lr=1e-3),
        adam(head.parameters(), lr=1e-3, fuse_backward=fuse, moments_dtype=narrow),
    ]
    step_number = 0

    def run(steps: int) -> dict:
        # head and embedding are differentiated and updated one after the other, so that each is timed
        nonlocal step_number
        ms, phases = [], {phase: [] for phase in PHASES}
        features = []
        for _ in range(steps):
            indices, offsets, values, target = data[step_number % len(data)]
            step_number += 1
            times = [time.perf_counter()]
            hidden = torch.relu(embedding(indices, offsets, per_sample_weights=values))
            leaf = hidden.detach().requires_grad_()
            times.append(time.perf_counter())
            loss = head_loss(leaf, target)
            times.append(time.perf_counter())
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss.backward()
            times.append(time.perf_counter())
            hidden.backward(leaf.grad)
            times.append(time.perf_counter())
            for optimizer in optimizers:
                optimizer.step()
                times.append(time.perf_counter())
            ms.append((times[-1] - times[0]) * 1e3)
            for phase, start, end in zip(PHASES, times[:-1], times[1:], strict=True):
                phases[phase].append((end - start) * 1e3)
            features.append(indices.unique().numel())
        answer = {"ms": ms, "phases": phases, "peak_gb": resident_gb("VmHWM") - base}
        answer["features"] = median(features)
        answer["memory_gb"] = memory_held()
        if name.startswith("lsh"):
            answer |= head.stats()
            settled = head.tables.options
            answer["schedule"] = {
                name: getattr(settled, name)
                for name in ("rehash_every", "rehash_growth", "rebuild_every")
            }
        return answer

    def memory_held() -> dict[str, float]:
        """Gigabytes that stay from step to step."""
        weights = [*embedding.parameters(), *head.parameters()]
        states = [
            value
            for optimizer in optimizers
            for state in optimizer.state.values()
            for value in state.values()
        ]
        tables = head.tables.memory_bytes() if name.startswith("lsh") else 0
        held = {
            "weights": sum(weight.nbytes for weight in weights),
            "optimizer_state": sum(state.nbytes for state in states),
            "tables": tables,
        }
        return {what: count / 2**30 for what, count in held.items()}

    def upkeep() -> tuple[float, float]:
        """Milliseconds of a rehash after one whole period of steps, and of a rebuild."""
        head.rehash()
        run(head.tables.options.rehash_every)
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
    "lsh_per_sample_bf16_moments",
    "lsh_shared",
    "lsh_shared_simhash",
    "lsh_shared_bf16_moments",
    "lsh_shared_bf16_parameters",
    "lsh_dense_grad",
)


def memory(threads: int, labels: int):
    """The contender that measures the memory itself."""
    torch.set_num_threads(threads)
    return Memory(labels).turn


def byte_bounds(result: dict, labels: int) -> list[dict]:
    """Bytes that each part of a step must move, by kind (see common.Memory), and the part's time.

    With U active rows of width d: forward reads them, 4 d U bytes; their gradient and Adam read and write
    weight and two moments, 24 d U (16 d U with moments in bfloat16; of parameters in bfloat16 half as many,
    and the gradient is written and read between). A dense gradient touches all N rows, and is written and
    read between.
    Hashing, retrieval, arithmetic and the batch's logits are in the times, not in the bounds.
    """
    phases, row = result["phases"], 4 * HIDDEN
    active, features = result["union"] * row, result["features"] * row
    update = {"row_update": (4 if result["contender"].endswith(NARROW) else 6) * active}
    reading = {"row_read": active}
    if result["contender"].endswith(NARROW_PARAMETERS):
        reading = {"row_read": active / 2}
        update = {"row_update": 3 * active, "write": active / 2, "read": active / 2}
    if result["contender"] == "lsh_dense_grad":  # the gradient is written and read between
        whole = labels * row
        update = {"update": 6 * whole, "write": whole, "read": whole}
    of_embedding = {"row_update": 6 * features, "read": features}
    head = phases["backward"] + phases["head_optimizer"]
    return [
        {"part": "forward", "traffic": reading, "ms": phases["forward"]},
        {"part": "gradient + Adam", "traffic": update, "ms": head},
        {"part": "embedding's Adam", "traffic": of_embedding, "ms": phases["embedding_optimizer"]},
    ]


def main() -> None:
    parser = argument_parser(__doc__, "4,000 labels, one round, without bf16 and compile")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--labels", type=int, default=LABELS)
    parser.add_argument("--only", nargs="*", default=CONTENDERS, choices=CONTENDERS)
    args = parse(parser)
    if args.quick:
        args.labels, args.rounds = 4_000, 1
        args.only = [name for name in args.only if name not in ("dense_bf16", "dense_compile")]
    workers, failed, answers = {}, {}, {}
    for name in args.only:
        try:
            workers[name] = Worker(
                contender, name, args.batch, args.threads, args.seed, args.labels
            )
            first = workers[name].run(1)  # warms up: first touches, compilation, table build
            if name == "dense_bf16" and first["ms"][0] > TOO_SLOW_MS:
                answers[name] = [first]
                print(f"{name}: {first['ms'][0]:.0f} ms a step, measured once", flush=True)
                workers.pop(name).stop()
        except RuntimeError as error:
            failed[name] = str(error).strip().splitlines()[-1]
            workers.pop(name, None)
            print(f"{name}: {failed[name]}", flush=True)
    answers |= {name: [] for name in workers}
    meter, turns = Worker(memory, args.threads, args.labels), []
    for _ in range(args.rounds):
        turns.append(meter.run())
        for name, worker in workers.items():
            answers[name].append(worker.run(STEPS_A_TURN[name.split("_")[0]]))
    upkeep = {name: workers[name].run(-1) for name in workers if name.startswith("lsh")}
    for worker in (meter, *workers.values()):
        worker.stop()
    rates = best_rates(turns)
    results = [summary(name, answers[name], upkeep) for name in args.only if name in answers]
    dense = [r["ms_step"] for r in results if r["contender"].startswith("dense")]
    best = min(dense) if dense else None
    for result in results:
        result["times_best_dense"] = best / result["ms_step"] if best else None
    print()
    report(results)
    print()
    print_rates(rates)
    bounds = [
        {"contender": r["contender"], **part, "bound_ms": bound_ms(part["traffic"], rates)}
        for r in results
        if r["contender"].startswith("lsh")
        for part in byte_bounds(r, args.labels)
    ]
    print()
    print_table(
        ["contender", "part of the step", "MB", "ms", "byte bound, ms", "ms / bound"],
        [
            [
                b["contender"],
                b["part"],
                f"{sum(b['traffic'].values()) / 1e6:.1f}",
                f"{b['ms']:.2f}",
                f"{b['bound_ms']:.2f}",
                f"{b['ms'] / b['bound_ms']:.1f}",
            ]
            for b in bounds
        ],
    )

    print()
    kinds = ("weights", "optimizer_state", "tables", "other_at_peak")
    print_table(
        ["contender", *(f"{kind.replace('_', ' ')}, GB" for kind in kinds), "peak, GB"],
        [
            [
                r["contender"],
                *(f"{r['memory_gb'][kind]:.2f}" for kind in kinds),
                f"{r['peak_gb']:.2f}",
            ]
            for r in results
        ],
    )

    def paint(axes) -> None:
        names = [r["contender"] for r in results][::-1]
        bars = axes.barh(names, [r["ms_step"] for r in results][::-1])
        axes.bar_label(bars, [f"{r['ms_step']:,.1f}" for r in results][::-1], padding=3)
        axes.set_xscale("log")
        axes.margins(x=0.15)
        axes.set_xlabel("ms a step, logarithmic")
        axes.set_title(f"a training step, {HIDDEN} -> {args.labels:,}, batch {args.batch}")

    finish(
        args,
        {"batch": args.batch, "labels": args.labels},
        {"contenders": results, "failed": failed, "memory": rates, "byte_bounds": bounds},
        paint,
    )


def summary(name: str, turns: list[dict], upkeep: dict[str, tuple[float, float]]) -> dict:
    """Medians of a contender's turns; the tables' upkeep added to LSH steps."""
    ms = median([m for turn in turns for m in turn["ms"]])
    phases = {
        phase: median([m for turn in turns for m in turn["phases"][phase]]) for phase in PHASES
    }
    result = {"contender": name, "peak_gb": turns[-1]["peak_gb"], "phases": phases}
    result["features"] = turns[-1]["features"]
    held = turns[-1]["memory_gb"]
    result["memory_gb"] = held | {"other_at_peak": result["peak_gb"] - sum(held.values())}
    if name in upkeep:
        schedule = turns[-1]["schedule"]
        result["rehash_ms"], result["rebuild_ms"] = upkeep[name]
        rehashes = rehashes_within(UPKEEP_STEPS, schedule)
        rebuilds = rehashes // schedule["rebuild_every"]
        spent = (rehashes - rebuilds) * result["rehash_ms"] + rebuilds * result["rebuild_ms"]
        phases["upkeep"] = spent / UPKEEP_STEPS
        result["upkeep_first_period"] = result["rehash_ms"] / schedule["rehash_every"]
        ms += phases["upkeep"]
        for key in ("active_per_sample", "union", "ids_read"):
            result[key] = median([turn[key] for turn in turns])
    result["ms_step"] = ms
    return result


def rehashes_within(steps: int, schedule: dict[str, float]) -> int:
    """Rehashes that the schedule does in the first ``steps`` training steps."""
    count, period, at = 0, float(schedule["rehash_every"]), 0.0
    while (at := at + math.ceil(period)) < steps:
        count, period = count + 1, period * schedule["rehash_growth"]
    return count


def report(results: list[dict]) -> None:
    print_table(
        ["contender", "ms/step", "best dense / it", "peak GB", "active/sample", "phases, ms"],
        [
            [
                r["contender"],
                f"{r['ms_step']:.1f}",
                f"{r['times_best_dense']:.1f}x" if r["times_best_dense"] else "",
                f"{r['peak_gb']:.2f}",
                f"{r['active_per_sample']:,.0f}" if "active_per_sample" in r else "",
                ", ".join(f"{phase} {ms:.1f}" for phase, ms in r["phases"].items()),
            ]
            for r in results
        ],
    )


if __name__ == "__main__":
    main()
