"""Writes the tables of README.md, docs/ and examples/ from benchmarks/results/: no figure is typed in.

python -m benchmarks.readme.update          # rewrites them
python -m benchmarks.readme.update --check  # fails if they would change
"""

from __future__ import annotations

import argparse
import re
import sys

from .accuracy_tables import (
    bf16_moments,
    equal_steps,
    hidden,
    problems,
    recipe,
    sampling,
    time_to_accuracy,
)
from .example_tables import images_10000, quickstart, recommender
from .records import ROOT
from .sharded_tables import sharded, sharded_projection, sharded_runs
from .speed_tables import (
    prediction,
    scaling,
    scaling_neurons,
    speed_ratios,
    step_time,
    step_time_256,
    step_time_amx,
    tables_recall,
)

BLOCKS = {
    "README.md": (problems,),
    "docs/benchmarks.md": (
        equal_steps,
        step_time,
        step_time_256,
        step_time_amx,
        scaling,
        scaling_neurons,
        prediction,
        bf16_moments,
        recipe,
    ),
    "docs/distributed.md": (sharded, sharded_runs, sharded_projection),
    "docs/hidden.md": (hidden,),
    "docs/prediction.md": (speed_ratios, tables_recall),
    "docs/quickstart.md": (quickstart,),
    "docs/sampling.md": (sampling, time_to_accuracy),
    "examples/README.md": (recommender, images_10000),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
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
        sys.exit(
            f"{', '.join(changed)}: not as the records: run python -m benchmarks.readme.update"
        )
    for file, text in changed.items():
        (ROOT / file).write_text(text)


if __name__ == "__main__":
    main()
