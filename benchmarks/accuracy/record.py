"""The record of time_to_accuracy.py: an entry for each contender and length of training; its table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common.record import read_record, write_record
from examples.common.machine import machine

from .contenders import CONTENDERS

__all__ = [
    "add_entry",
    "best_of",
    "chosen_lengths",
    "find_entry",
    "mean_curve",
    "paint",
    "read",
    "seconds_at",
    "table",
    "write",
]

Entry = dict[str, Any]
Record = dict[str, Any]


def read(path: Path | None, problem: dict[str, Any]) -> Record:
    """The record at ``path``, which must be of ``problem``; an empty one if there is none."""
    return read_record(path, problem, {"contenders": []})


def write(path: Path | None, record: Record) -> None:
    """Keeps what is known so far."""
    write_record(path, {"machine": machine(), **record})


def find_entry(record: Record, name: str, epochs: float | None) -> Entry | None:
    """The entry of the contender ``name`` trained for so many epochs."""
    found = (e for e in record["contenders"] if (e["contender"], e["epochs"]) == (name, epochs))
    return next(found, None)


def add_entry(record: Record, entry: Entry) -> None:
    """In place of any of the same contender and length; in CONTENDERS' order, then others."""
    old = find_entry(record, entry["contender"], entry["epochs"])
    entries = [e for e in record["contenders"] if e is not old] + [entry]
    order = {name: place for place, name in enumerate(CONTENDERS)}
    record["contenders"] = sorted(
        entries, key=lambda e: (order.get(e["contender"], len(order)), e["epochs"] or 0)
    )


def mean_curve(entry: Entry, metric: str) -> list[tuple[int, float]]:
    """(step, mean over the runs of the validation measure)."""
    curves = [run["curve"] for run in entry["runs"]]
    return [
        (points[0]["step"], float(np.mean([point[metric] for point in points])))
        for points in zip(*curves, strict=True)
    ]


def best_of(entry: Entry, problem: dict[str, Any]) -> tuple[int, float]:
    """Where the mean curve is best, and how good."""
    sign = 1 if problem["larger_is_better"] else -1
    return max(mean_curve(entry, problem["metric"]), key=lambda point: sign * point[1])


def chosen_lengths(record: Record) -> list[Entry]:
    """For each contender the length of training that validation rows like best."""
    sign = 1 if record["problem"]["larger_is_better"] else -1
    best: dict[str, Entry] = {}
    for entry in record["contenders"]:
        old = best.get(entry["contender"])
        value = best_of(entry, record["problem"])[1]
        if old is None or sign * (value - best_of(old, record["problem"])[1]) > 0:
            best[entry["contender"]] = entry
    return list(best.values())


def seconds_at(entry: Entry, step: int) -> float:
    """Seconds of training until the end of ``step``, by the entry's clock."""
    clock = entry["clock"]
    if "seconds" in clock:
        return clock["seconds"]
    third = entry["settings"]["steps"] / len(clock["ms_step"])
    steps = [min(max(step - i * third, 0), third) for i in range(len(clock["ms_step"]))]
    ms = sum(n * each for n, each in zip(steps, clock["ms_step"], strict=True))
    return (clock["start_ms"] + ms) / 1e3


def seconds_to(record: Record, name: str, value: float) -> float | None:
    """Seconds of training until ``name``'s mean validation measure is as good as ``value``, by the length of
    training that is there first; None if none is."""
    problem = record["problem"]
    sign = 1 if problem["larger_is_better"] else -1
    reached = [
        seconds_at(entry, step)
        for entry in record["contenders"]
        if entry["contender"] == name and "clock" in entry
        for step, found in mean_curve(entry, problem["metric"])
        if sign * (found - value) >= 0
    ]
    return min(reached, default=None)


def table(record: Record) -> tuple[list[str], list[list[str]]]:
    """The record as columns and lines: of each contender the length that validation rows like best."""
    problem = record["problem"]
    entries = chosen_lengths(record)
    metric, larger = problem["metric"], problem["larger_is_better"]
    digits = 4 if larger else 1
    bests = {entry["contender"]: best_of(entry, problem)[1] for entry in entries}
    goals: dict[str, tuple[str | None, dict[str, float]]] = {}
    if "lsh" in bests:
        goals[f"lsh, s to that {metric}"] = ("lsh", bests)
    if dense := [bests[entry["contender"]] for entry in entries if entry["kind"] == "dense"]:
        goal, name = (max(dense), "") if larger else (1.02 * min(dense), "within 2% of ")
        goals[f"s to {name}dense's best, {goal:.{digits}f}"] = (None, dict.fromkeys(bests, goal))
    measures = list(entries[0]["runs"][0]["test"])
    columns = ["contender", "epochs", "learning rate", *measures, "classes a step", "peak GB"]
    columns += ["ms/step", "seconds", f"best {metric} on the way", "s to it", *goals]
    decays = any("decay" in entry.get("settings", ()) for entry in entries)
    if decays:
        columns.insert(3, "decay")
    lines = []
    for entry in entries:
        name, runs, settings = entry["contender"], entry["runs"], entry.get("settings")
        line = [name, f"{entry['epochs']:g}" if settings else ""]
        line.append(f"{settings['lr']:g}" if settings else "")
        if decays:
            line.append(f"{settings['decay']:g}" if settings else "")
        for measure in measures:
            values = [run["test"][measure] for run in runs]
            spread = f" ± {(max(values) - min(values)) / 2:.{digits}f}" if len(values) > 1 else ""
            line.append(f"{np.mean(values):.{digits}f}{spread}")
        for key, form in (("classes_a_step", ",.0f"), ("peak_gb", ".1f")):
            known = key in runs[0]
            line.append(format(np.mean([run[key] for run in runs]), form) if known else "")
        clock = entry.get("clock", {})
        line.append(f"{np.mean(clock['ms_step']):.1f}" if "ms_step" in clock else "")
        last = runs[0]["curve"][-1]["step"]
        line.append(f"{seconds_at(entry, last):,.1f}" if clock else "")
        step, best = best_of(entry, problem)
        line += [f"{best:.{digits}f}", f"{seconds_at(entry, step):,.1f}" if clock else ""]
        for who, values in goals.values():
            seconds = seconds_to(record, who or name, values[name])
            line.append("not reached" if seconds is None else f"{seconds:,.1f}")
        lines.append(line)
    return columns, lines


def paint(axes: Any, record: Record) -> None:
    """Mean curves over seconds, of the contenders that the clock has met."""
    problem = record["problem"]
    clocked = [entry for entry in record["contenders"] if "clock" in entry]
    names = list(dict.fromkeys(entry["contender"] for entry in clocked))
    labelled = set()
    for entry in clocked:
        name = entry["contender"]
        curve = mean_curve(entry, problem["metric"])
        single = len(curve) == 1
        axes.plot(
            [seconds_at(entry, step) for step, _ in curve],
            [value for _, value in curve],
            color=f"C{names.index(name) % 10}",
            linestyle=":" if entry["reference"] else "-",
            marker="*" if single else ".",
            markersize=9 if single else 3,
            linewidth=1,
            label=None if name in labelled else name,
        )
        labelled.add(name)
    axes.set_xscale("log")
    axes.set_xlabel("seconds of training, logarithmic; a line for each length of training")
    axes.set_ylabel(f"{problem['metric']}, validation rows")
    axes.set_title(f"{problem['name']}, {problem['num_labels']:,} classes")
    if clocked:
        axes.legend(fontsize=8)
