"""Tables of the examples."""

from __future__ import annotations

from .records import markdown, read, without_columns

__all__ = ["images_10000", "quickstart", "recommender"]


def quickstart() -> str:
    """What a step costs, and what an epoch of such steps costs. Accuracies after different numbers of steps
    do not stand beside each other."""
    record = read("quickstart")
    rows = [dict(zip(record["columns"], row, strict=True)) for row in record["rows"]]
    trees = [
        f"{row['head']}, trained on the same rows in {row['seconds']} s: P@1 {row['P@1']}, P@5 {row['P@5']}."
        for row in rows
        if not row["ms/step"]
    ]
    rows = [row for row in rows if row["ms/step"]]
    steps = int(rows[0]["steps"].replace(",", ""))  # LSHLinear's: an epoch
    shown = ("ms/step", "peak GB", "active neurons per sample")
    lines = [
        [
            row["head"],
            *(row[name] for name in shown),
            f"{float(row['ms/step']) * steps / 60e3:.1f}",
            row["P@1"] if row is rows[0] else "not run",
        ]
        for row in rows
    ]
    columns = ["head", *shown, f"minutes for {steps:,} steps", "P@1 after these"]
    about = (
        f"{record['held_out']:,} held-out names, exact evaluation; {record['machine']}. P@5 of LSHLinear: "
        f"{rows[0]['P@5']}."
    )
    return "\n\n".join([markdown(columns, lines), *trees, about])


def images_10000() -> str:
    """At equal steps: accuracies only."""
    record = read("images_10000")
    table = markdown(*without_columns(record, ("ms/step", "seconds")))
    about = "; ".join(p for p in record["machine"].split("; ") if not p.startswith("seconds are"))
    return f"{table}\n\n{about}.\n\n{trials(record)}"


def recommender() -> str:
    """A run of each seed, all at equal seconds."""
    records = [read(f"recommender_{seed}") for seed in range(3)]
    runs = [[dict(zip(r["columns"], row, strict=True)) for row in r["rows"]] for r in records]
    columns = [
        "head",
        *(f"recall@10, seed {seed}" for seed in range(3)),
        "mean",
        "steps",
        "ms/step",
    ]
    lines = []
    for of_seeds in zip(*runs, strict=True):
        recalls = [row["recall@10"] for row in of_seeds]
        mean = sum(map(float, recalls)) / len(recalls)
        first = of_seeds[0]
        lines.append([first["head"], *recalls, f"{mean:.4f}", first["steps"], first["ms/step"]])
    seconds = runs[0][0]["seconds"]
    machine = records[0]["machine"].removesuffix(", seed 0")
    about = f"{seconds} s of training each; steps and ms/step are those of seed 0; {machine}."
    return f"{markdown(columns, lines)}\n\n{about}"


def trials(record: dict) -> str:
    """The learning rates that an example's contenders chose from, and what validation data said of each."""
    tried = "; ".join(
        f"{who} {', '.join(f'{lr:g}: {value:.3f}' for lr, value in found)}"
        for who, found in record["trials"].items()
    )
    return f"Learning rates tried, with the accuracy on validation images: {tried}."
