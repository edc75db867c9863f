"""Tables of what is learnt: at equal steps, against seconds, with hidden layers, by samplers."""

from __future__ import annotations

import json

from benchmarks.accuracy.record import table
from benchmarks.hidden.record import tables

from .records import RESULTS, machine_of, markdown, read

__all__ = [
    "bf16_moments",
    "equal_steps",
    "hidden",
    "sampling",
    "time_to_accuracy",
    "time_to_accuracy_short",
]


def equal_steps() -> str:
    dense = read("quickstart_dense")
    lsh = read("quickstart_lsh")
    rows = [
        [name, f"{run['test_p1']:.4f}", f"{run['test_p5']:.4f}"]
        for name, run in (("dense torch", dense), ("LSHLinear", lsh))
    ]
    behind = [
        f"{theirs['step']:,}"
        for theirs, ours in zip(dense["curve"], lsh["curve"], strict=True)
        if theirs["validation_p1"] > ours["validation_p1"]
    ]
    on_the_way = f" On the way dense was ahead at step {', '.join(behind)}." if behind else ""
    table = markdown(["head", "P@1, all held-out names", "P@5"], rows)
    return (
        f"{table}\n\n{dense['steps']:,} steps each at learning rate {dense['lr']}, seed {dense['seed']}, "
        f"batch {dense['batch']}, torch {dense['torch']}.{on_the_way}"
    )


def bf16_moments() -> str:
    names = ("quickstart_epoch", "quickstart_epoch_bf16_moments")
    runs = [read(name) for name in names]
    table = markdown(
        ["Adam's moments", "P@1, all held-out names", "P@5"],
        [
            [moments, f"{run['test_p1']:.4f}", f"{run['test_p5']:.4f}"]
            for moments, run in zip(("float32", "bfloat16"), runs, strict=True)
        ],
    )
    return f"{table}\n\n{runs[0]['steps']:,} steps each, seed {runs[0]['seed']}, torch {runs[0]['torch']}."


def sampling() -> str:
    record = read("sampling")
    table = markdown(record["columns"], record["rows"])
    where = machine_of(record)
    return f"{table}\n\n{where}."


def time_to_accuracy(columns: tuple[str, ...] | None = None, *, largest: bool = False) -> str:
    """A table for each problem that was recorded, or for the ``largest`` of each name; only the ``columns``
    named, by how they begin, or all."""
    records = [json.loads(p.read_text()) for p in RESULTS.glob("time_to_accuracy_*.json")]
    if not records:
        raise FileNotFoundError(2, "no such record", str(RESULTS / "time_to_accuracy_*.json"))

    order = {"places": 0, "lemmas": 1, "words": 2}  # others last
    records.sort(key=lambda r: (order.get(r["problem"]["name"], 3), -r["problem"]["num_labels"]))
    parts: list[str] = []
    shown: set[str] = set()
    for record in records:
        problem = record["problem"]
        if largest and problem["name"] in shown:
            continue
        shown.add(problem["name"])
        names, lines = table(record)
        kept = [i for i, name in enumerate(names) if columns is None or name.startswith(columns)]
        rows = [[f"`{line[0]}`", *(line[i] for i in kept if i > 0)] for line in lines]
        machines = {
            f"{m['cpu']}, {m['threads']} of {m['cores']} cores, {m['instruction_set']}, torch "
            f"{m['torch']}, slide_torch {m['slide_torch']}, {m['date']}"
            for m in (e["clock"]["machine"] for e in record["contenders"] if "clock" in e)
        }
        parts.append(
            f"{problem['name']}, {problem['num_labels']:,} classes, {problem['train_rows']:,} training "
            f"rows:\n\n{markdown([names[i] for i in kept], rows)}\n\n"
            f"{runs_of(record)} Clocked on {'; '.join(sorted(machines))}."
        )
    return "\n\n".join(parts)


def time_to_accuracy_short() -> str:
    """For the README."""
    columns = ("contender", "epochs", "P@", "perplexity", "ms/step", "seconds", "lsh", "s to")
    return time_to_accuracy(columns, largest=True)


def runs_of(record: dict) -> str:
    """How many seeds stand behind each line; label trees take none."""
    names: dict[int, list[str]] = {}
    for entry in record["contenders"]:
        if entry["kind"] != "omikuji":
            own = names.setdefault(len(entry["runs"]), [])
            own += [f"`{entry['contender']}`"] if f"`{entry['contender']}`" not in own else []
    most = max(names, key=lambda count: len(names[count]))
    others = "".join(
        f", {count} of {' and '.join(names[count])}" for count in names if count != most
    )
    return f"Runs of each: {most}{others}."


def hidden() -> str:
    record = read("hidden")

    parts = [markdown(columns, lines) for columns, lines in tables(record)]
    problem = record["problem"]
    about = (
        f"{problem['train_rows']:,} training names, {problem['outputs']} countries, {problem['test_rows']:,} "
        f"names to measure with, {problem['validation_rows']:,} others to choose learning rates with; batch "
        f"{problem['batch']}, seed {problem['seed']}."
    )
    if record["times"]:
        where = machine_of(record["times"])
        about += f" Step times: {where}."
    return "\n\n".join([*parts, about])
