"""Writes the tables of README.md and docs/ from the records in benchmarks/results/: no figure is typed in.

python benchmarks/update_readme.py          # rewrites them
python benchmarks/update_readme.py --check  # fails if they would change
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def markdown(columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---"] + ["---:"] * (len(columns) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def quickstart() -> str:
    record = json.loads((RESULTS / "quickstart.json").read_text())
    table = markdown(record["columns"], record["rows"])
    return (
        f"{table}\n\n{record['held_out']:,} held-out names, exact evaluation; {record['machine']}."
    )


def equal_steps() -> str:
    dense = json.loads((RESULTS / "quickstart_dense.json").read_text())
    lsh = json.loads((RESULTS / "quickstart_lsh.json").read_text())
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
    runs = [json.loads((RESULTS / f"{name}.json").read_text()) for name in names]
    table = markdown(
        ["Adam's moments", "P@1, all held-out names", "P@5"],
        [
            [moments, f"{run['test_p1']:.4f}", f"{run['test_p5']:.4f}"]
            for moments, run in zip(("float32", "bfloat16"), runs, strict=True)
        ],
    )
    return f"{table}\n\n{runs[0]['steps']:,} steps each, seed {runs[0]['seed']}, torch {runs[0]['torch']}."


def step_time(name: str = "step_time") -> str:
    record = json.loads((RESULTS / f"{name}.json").read_text())
    rows = [
        [
            f"`{c['contender']}`",
            f"{c['ms_step']:.1f}",
            f"{c['times_best_dense']:.1f}×",
            f"{c['peak_gb']:.1f}",
            f"{c['active_per_sample']:,.0f}" if "active_per_sample" in c else "",
        ]
        for c in record["contenders"]
    ]
    columns = ["contender", "ms/step", "best dense / it", "peak GB", "active neurons per sample"]
    where = ", ".join(f"{key} {value}" for key, value in record["machine"].items())
    missing = "".join(f"\n`{name}` did not run: {why}." for name, why in record["failed"].items())
    return f"{markdown(columns, rows)}\n\n{where}.{missing}"


def step_time_256() -> str:
    return step_time("step_time_256")


def scaling() -> str:
    record = json.loads((RESULTS / "scaling.json").read_text())
    rows = [
        [
            f"{c['width']:,}",
            f"{c['batch']:,}",
            f"{c['neurons']:,}" if c["neurons"] else f"over {c['largest_tried']:,}",
            f"{c['dense_ms']:.1f}" if c["neurons"] else "",
            f"{c['lsh_ms']:.1f}" if c["neurons"] else "",
        ]
        for c in record["crossovers"]
    ]
    columns = [
        "width d",
        "batch",
        "LSHLinear is faster from N =",
        "dense there, ms/step",
        "LSHLinear",
    ]
    where = ", ".join(f"{key} {value}" for key, value in record["machine"].items())
    return f"{markdown(columns, rows)}\n\n{where}."


def scaling_neurons() -> str:
    """Along N, at the width, batch and threads of the most points."""
    points = json.loads((RESULTS / "scaling.json").read_text())["points"]
    settings = [(p["width"], p["batch"], p["threads"]) for p in points]
    common = max(settings, key=settings.count)
    rows = []
    for p in (p for p, setting in zip(points, settings, strict=True) if setting == common):
        dense = [ms for name, ms in p["ms"].items() if name.startswith("dense") and ms]
        lsh = p["ms"]["lsh_shared"]
        shown = [f"{lsh:.1f}" if lsh else "does not fit", ""]
        if dense and lsh:
            shown[1] = f"{min(dense) / lsh:.1f}×"
        rows.append([f"{p['neurons']:,}", f"{min(dense):.0f}" if dense else "does not fit", *shown])
    table = markdown(["N", "dense torch, ms/step", "LSHLinear", "dense / LSHLinear"], rows)
    return f"{table}\n\nd {common[0]}, batch {common[1]}, {common[2]} threads, as above."


def prediction() -> str:
    record = json.loads((RESULTS / "prediction.json").read_text())
    # rivals find less at some settings
    shown = [c for c in record["contenders"] if c["recall"] >= 0.5]
    table = markdown(
        ["contender", "setting", "recall@10", "queries/s, batch 1", "queries/s, batch 256"],
        [
            [
                c["family"],
                c["setting"],
                f"{c['recall']:.3f}",
                f"{c['queries_per_second_1']:,.0f}",
                f"{c['queries_per_second_256']:,.0f}",
            ]
            for c in shown
        ],
    )
    scale = "; ".join(
        f"batch {r['batch']}: {r['predict_ms']:.0f} ms, `F.linear` alone {r['linear_ms']:.0f} ms, with "
        f"`torch.topk` {r['linear_topk_ms']:.0f} ms"
        for r in record["exact_at_scale"]
    )
    where = ", ".join(f"{key} {value}" for key, value in record["machine"].items())
    return f"{table}\n\nExact at N = 670,091: {scale}. {where}."


def speed_ratios() -> str:
    """From a recall of 0.94 on: that is 0.95 as it was asked for, measured on other names."""
    contenders = json.loads((RESULTS / "prediction.json").read_text())["contenders"]
    keys = [key for key in contenders[0] if key.startswith("queries_per_second_")]
    against = {"`topk(F.linear)`": contenders[0], "`predict(x, k)`": contenders[1]}
    columns = ["contender", "recall@10", "seconds to build"]
    columns += [f"times {name}, batch {key.rsplit('_', 1)[1]}" for key in keys for name in against]
    rows = [
        [
            f"{c['family']} {c['setting']}".strip(),
            f"{c['recall']:.3f}",
            f"{c['build_seconds']:.0f}",
            *(f"{c[key] / other[key]:.1f}" for key in keys for other in against.values()),
        ]
        for c in contenders[1:]
        if c["recall"] >= 0.94
    ]
    return markdown(columns, rows)


def tables_recall() -> str:
    record = json.loads((RESULTS / "prediction.json").read_text())
    rows = [[t["family"], str(t["K"]), str(t["L"]), f"{t['recall']:.3f}"] for t in record["tables"]]
    return markdown(["tables", "K", "L", "found"], rows)


def log_frequency() -> str:
    record = json.loads((RESULTS / "log_frequency.json").read_text())
    columns = ["tau", f"P@1, {record['names']:,} held-out names", "mean log-likelihood"]
    rows = [[f"{t['tau']}", f"{t['p1']:.4f}", f"{t['log_likelihood']:.3f}"] for t in record["test"]]
    return markdown(columns, rows)


def sampling() -> str:
    record = json.loads((RESULTS / "sampling.json").read_text())
    table = markdown(record["columns"], record["rows"])
    where = ", ".join(f"{key} {value}" for key, value in record["machine"].items())
    return f"{table}\n\n{where}."


def time_to_accuracy(columns: tuple[str, ...] | None = None, *, largest: bool = False) -> str:
    """A table for each problem that was recorded, or for the ``largest`` of each name; only the ``columns``
    named, by how they begin, or all."""
    records = [json.loads(p.read_text()) for p in RESULTS.glob("time_to_accuracy_*.json")]
    if not records:
        raise FileNotFoundError(2, "no such record", str(RESULTS / "time_to_accuracy_*.json"))
    from accuracy_record import table

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


def time_to_accuracy_short() -> str:
    """For the README."""
    columns = ("contender", "epochs", "P@", "perplexity", "ms/step", "seconds", "lsh", "s to")
    return time_to_accuracy(columns, largest=True)


def hidden() -> str:
    record = json.loads((RESULTS / "hidden.json").read_text())
    from hidden_record import tables

    parts = [markdown(columns, lines) for columns, lines in tables(record)]
    problem = record["problem"]
    about = (
        f"{problem['train_rows']:,} training names, {problem['outputs']} countries, {problem['test_rows']:,} "
        f"names to measure with, {problem['validation_rows']:,} others to choose learning rates with; batch "
        f"{problem['batch']}, seed {problem['seed']}."
    )
    if record["times"]:
        where = ", ".join(f"{key} {value}" for key, value in record["times"]["machine"].items())
        about += f" Step times: {where}."
    return "\n\n".join([*parts, about])


def contest(name: str) -> str:
    """The table of an example that prints its own."""
    record = json.loads((RESULTS / f"{name}.json").read_text())
    return f"{markdown(record['columns'], record['rows'])}\n\n{record['machine']}."


def language_model() -> str:
    return contest("language_model")


def recommender() -> str:
    return contest("recommender")


def images() -> str:
    return contest("images")


def images_10000() -> str:
    return f"{contest('images_10000')}\n\n{trials('images_10000')}"


def trials(name: str) -> str:
    """The learning rates that an example's contenders chose from, and what validation data said of each."""
    record = json.loads((RESULTS / f"{name}.json").read_text())
    tried = "; ".join(
        f"{who} {', '.join(f'{lr:g}: {value:.3f}' for lr, value in found)}"
        for who, found in record["trials"].items()
    )
    return f"Learning rates tried, with the accuracy on validation images: {tried}."


BLOCKS = {
    "README.md": (
        quickstart,
        equal_steps,
        time_to_accuracy_short,
        step_time,
        scaling,
        scaling_neurons,
        prediction,
        language_model,
        recommender,
        images,
        images_10000,
    ),
    "docs/benchmarks.md": (step_time_256, bf16_moments),
    "docs/hidden.md": (hidden,),
    "docs/prediction.md": (speed_ratios, tables_recall, log_frequency),
    "docs/sampling.md": (sampling, time_to_accuracy),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    missing, changed = [], {}
    for file, makers in BLOCKS.items():
        text = old = (ROOT / file).read_text()
        for make in makers:
            name = make.__name__
            pattern = rf"<!-- {name} -->.*?<!-- /{name} -->"
            try:
                block = f"<!-- {name} -->\n{make()}\n<!-- /{name} -->"
            except FileNotFoundError as error:
                missing.append(f"{name} stays as it is: no {error.filename}")
                continue
            text, count = re.subn(pattern, lambda _, block=block: block, text, flags=re.S)
            if count != 1:
                sys.exit(f"{file}: expected one {name} block, found {count}")
        if text != old:
            changed[file] = text
    for line in missing:
        print(line)
    if args.check and missing:
        sys.exit("records are missing: make bench, make figures")
    if args.check and changed:
        sys.exit(f"{', '.join(changed)}: not as the records: run benchmarks/update_readme.py")
    for file, text in changed.items():
        (ROOT / file).write_text(text)


if __name__ == "__main__":
    main()
