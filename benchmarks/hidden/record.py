"""The record of run.py: an entry for each contender trained, the step times; their tables and picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.common.record import read_record, write_record

__all__ = ["add_run", "find_run", "measured", "paint", "read", "tables"]

KEYS = ("depth", "hidden", "steps", "contender", "share")
ORDER = ("dense", "shared", "per_sample", "top", "batch_dropout", "dropout")

Record = dict[str, Any]
Run = dict[str, Any]


def read(path: Path | None, problem: dict[str, Any]) -> Record:
    """The record at ``path``, which must be of ``problem``; an empty one if there is none."""
    return read_record(path, problem, {"runs": [], "times": {}})


def find_run(record: Record, **keys: Any) -> Run | None:
    """The run with all of these KEYS."""
    return next((r for r in record["runs"] if all(r[key] == keys[key] for key in KEYS)), None)


def add_run(path: Path | None, record: Record, run: Run) -> Record:
    """The record with ``run`` in place of any older one, kept at once; other calls may have added runs."""
    if path is not None and path.exists():
        record = read(path, record["problem"])
    old = find_run(record, **{key: run[key] for key in KEYS})
    runs = [r for r in record["runs"] if r is not old] + [run]
    runs.sort(
        key=lambda r: (r["depth"], r["hidden"], r["steps"], ORDER.index(r["contender"]), r["share"])
    )
    record = record | {"runs": runs}
    write_record(path, record)
    return record


def measured(run: Run, part: str = "test") -> float:
    """Accuracy by the evaluation, every neuron or the budget, that validation rows like better."""
    return run[part][max(run["validation"], key=run["validation"].__getitem__)]


def dense_of(record: Record, run: Run) -> Run | None:
    """The dense run with as many neurons and steps."""
    keys = {key: run[key] for key in KEYS}
    return find_run(record, **(keys | {"contender": "dense", "share": 1.0}))


def tables(record: Record) -> list[tuple[list[str], list[list[str]]]]:
    """Accuracy, and, where they were measured, step times and crossovers: columns and lines."""
    lines = []
    for run in record["runs"]:
        dense = dense_of(record, run)
        behind = None if dense is None or dense is run else measured(run) - measured(dense)
        lines.append(
            [
                run["contender"].replace("_", " "),
                f"{run['depth']} × {run['hidden']:,}",
                f"{run['steps']:,}",
                f"{run.get('active_share', run['share']):.0%}",
                f"{run['lr']:g}",
                *(f"{run['test'][e]:.3f}" if e in run["test"] else "" for e in ("all", "budget")),
                "" if behind is None else f"{100 * behind:+.1f}",
            ]
        )
    columns = ["in training", "hidden layers", "steps", "active", "learning rate"]
    columns += ["accuracy, all active in eval", "within the budget", "points over dense"]
    found = [(columns, lines)]
    if record["times"]:
        points = record["times"]["points"]
        kinds = list(points[0]["ms"])
        lines = [[shape(p), *(f"{p['ms'][kind]:.1f}" for kind in kinds)] for p in points]
        names = ["dense, ms/step", *(f"{kind.replace('_', ' ')}, 5%" for kind in kinds[1:])]
        found.append((["block", *names], lines))
        largest = {shape(p, "N"): p["hidden"] for p in points}
        lines = []
        for c in record["times"]["crossovers"]:
            none = f"none up to {largest[shape(c, 'N')]:,}"
            width = f"{c['hidden']:,}" if c["hidden"] else none
            lines.append([shape(c, "N"), c["contender"].replace("_", " "), width])
        found.append((["block", "pattern", "faster than dense from N ="], lines))
    return found


def shape(point: dict[str, Any], hidden: str | None = None) -> str:
    """A block as text; ``hidden`` in place of its neurons."""
    many = f"{point['depth']} × " if point["depth"] > 1 else ""
    return (
        f"{point['inputs']} → {many}{hidden or format(point['hidden'], ',')} → {point['outputs']}"
    )


def paint(axes: Any, record: Record) -> None:
    """Accuracy over the width of one hidden layer, a line for each contender, share and length."""
    lines: dict[tuple[str, float, int], list[Run]] = {}
    for run in record["runs"]:
        if run["depth"] == 1:
            lines.setdefault((run["contender"], run["share"], run["steps"]), []).append(run)
    longest = max(run["steps"] for run in record["runs"])
    for (kind, share, steps), runs in lines.items():
        name = "dense" if kind == "dense" else f"{kind.replace('_', ' ')}, {share:.0%}"
        axes.plot(
            [run["hidden"] for run in runs],
            [measured(run) for run in runs],
            marker="o",
            markersize=3,
            color="black" if kind == "dense" else f"C{ORDER.index(kind)}",
            linestyle={1.0: "-", 0.05: "--", 0.01: ":"}.get(share, "-."),
            alpha=1 if steps == longest else 0.5,
            label=name if steps == longest else f"{name}, {steps:,} steps",
        )
    axes.set_xscale("log", base=2)
    axes.set_xlabel("hidden neurons")
    axes.set_ylabel("accuracy on held-out names")
    axes.set_title(f"country of a place's name, one hidden layer, {longest:,} steps")
    axes.legend(fontsize=8)
