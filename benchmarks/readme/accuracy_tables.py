"""Tables of what is learnt: at equal steps, against seconds, with hidden layers, by samplers."""

from __future__ import annotations

import json
import statistics

from benchmarks.accuracy.record import best_of, chosen_lengths, seconds_at, table
from benchmarks.hidden.record import tables

from .records import RESULTS, machine_of, markdown, read, without_columns

__all__ = [
    "bf16_moments",
    "equal_steps",
    "hidden",
    "problems",
    "recipe",
    "sampling",
    "time_to_accuracy",
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


def recipe() -> str:
    """The examples' recipe and label trees, by problem."""
    files = sorted(RESULTS.glob("recipe_*.json"))
    if not files:
        raise FileNotFoundError(2, "no such record", str(RESULTS / "recipe_*.json"))
    rows, about = [], []
    for file in files:
        record = json.loads(file.read_text())
        problem, how = record["problem"], record["recipe"]
        where = f"{problem['name']}, {problem['num_labels']:,} classes"
        settings = {"width": record["width"], "epochs": f"{how['epochs']:g}"}
        settings |= record.get("options", {})  # older records have none
        of_recipe = ", ".join(f"{name} {value}" for name, value in settings.items())
        for name, runs in record["runs"].items():
            of = {key: [run[key] for run in runs] for key in ("P@1", "P@5", "seconds")}
            p1, p5, seconds = map(statistics.median, of.values())
            spread = max(max(of[key]) - min(of[key]) for key in ("P@1", "P@5"))
            who = f"recipe: {of_recipe}" if name == "recipe" else f"`{name}`"
            shown = f"{spread:.4f}" if len(runs) > 1 else ""
            cells = [str(len(runs)), f"{p1:.4f}", f"{p5:.4f}", shown, f"{seconds:.1f}"]
            rows.append([where, who, *cells])
        about.append(
            f"{problem['name']}, {of_recipe}: rate {how['lr']:g}, decay {how['decay']:g}; "
            f"{machine_of(record)}."
        )
    columns = ["problem", "contender", "runs", "P@1", "P@5", "spread", "seconds"]
    return "\n\n".join([markdown(columns, rows), *about])


def sampling() -> str:
    """Bias and variance; times are those of step_time.py."""
    record = read("sampling")
    table = markdown(*without_columns(record, ("ms/step", "upkeep")))
    return f"{table}\n\n{machine_of(record)}."


def records_of_accuracy() -> list[dict]:
    """Every record of time_to_accuracy.py: by problem, the largest first."""
    records = [json.loads(p.read_text()) for p in RESULTS.glob("time_to_accuracy_*.json")]
    if not records:
        raise FileNotFoundError(2, "no such record", str(RESULTS / "time_to_accuracy_*.json"))
    order = {"places": 0, "lemmas": 1, "taxa": 2, "words": 3}  # others last
    return sorted(
        records, key=lambda r: (order.get(r["problem"]["name"], 4), -r["problem"]["num_labels"])
    )


def problems() -> str:
    """The best contender of each kind, by validation rows, on the largest record of each problem."""
    largest: dict[str, dict] = {}
    for record in records_of_accuracy():
        largest.setdefault(record["problem"]["name"], record)
    lines = []
    for record in largest.values():
        problem = record["problem"]
        name = f"{problem['name']}, {problem['num_labels']:,} classes: {problem['metric']}"
        lines.append(
            [name, *(best_of_kind(record, kind) for kind in ("lsh", "dense", "sampled", "omikuji"))]
        )
    columns = ["problem", "LSHLinear", "dense torch", "sampled softmax, plain torch", "label trees"]
    return markdown(columns, lines)


def best_of_kind(record: dict, kind: str) -> str:
    """Held-out measure, seconds and name of the best contender of a ``kind``; empty if there is none."""
    problem = record["problem"]
    metric, larger = problem["metric"], problem["larger_is_better"]
    rivals = [e for e in chosen_lengths(record) if e["kind"] == kind and not e["reference"]]
    if not rivals:
        return ""
    sign = 1 if larger else -1
    # of equals the later one, which is the larger
    entry = max(reversed(rivals), key=lambda entry: sign * best_of(entry, problem)[1])
    value = sum(run["test"][metric] for run in entry["runs"]) / len(entry["runs"])
    after = "time not measured"
    if "clock" in entry:
        after = f"{seconds_at(entry, entry['runs'][0]['curve'][-1]['step']):,.0f} s"
    return f"{value:.{3 if larger else 1}f} ({after}; `{entry['contender']}`)"


def time_to_accuracy() -> str:
    """A table for each problem that was recorded."""
    parts = []
    for record in records_of_accuracy():
        problem = record["problem"]
        columns, lines = table(record)
        if not problem["larger_is_better"]:
            # validation text is harder than test text: no perplexity of the one beside the other
            kept = [
                i for i, name in enumerate(columns) if not name.startswith(("best ", "s to it"))
            ]
            columns = [columns[i].partition("best, ")[0] for i in kept]
            columns = [c + "best" if c.endswith("dense's ") else c for c in columns]
            lines = [[line[i] for i in kept] for line in lines]
        rows = [[f"`{line[0]}`", *line[1:]] for line in lines]
        machines = {
            f"{m['cpu']}, {m['threads']} of {m['cores']} cores, {m['instruction_set']}, torch "
            f"{m['torch']}, slide_torch {m['slide_torch']}, {m['date']}"
            for m in (e["clock"]["machine"] for e in record["contenders"] if "clock" in e)
        }
        parts.append(
            f"{problem['name']}, {problem['num_labels']:,} classes, {problem['train_rows']:,} training "
            f"rows:\n\n{markdown(columns, rows)}\n\n"
            f"{start_of(problem)}{runs_of(record)} Clocked on {'; '.join(sorted(machines))}."
        )
    return "\n\n".join(parts)


def start_of(problem: dict) -> str:
    """Of problems of sparse rows; a record that names no start is older than the warm one."""
    if "num_features" not in problem:
        return ""
    if "start" not in problem:
        return "Random start, ReLU, softmax over all labels of a row. "
    return f"Start: {problem['start']}. "


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
