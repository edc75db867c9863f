"""The record: JSON with the machine, and a picture beside it."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from examples.common.machine import machine
from examples.common.output import draw

__all__ = ["finish", "read_record", "write_record"]


def finish(
    args: argparse.Namespace,
    setting: dict[str, Any],
    content: dict[str, Any],
    paint: Callable[[Any], None],
    size: tuple[float, float] = (7, 4.2),
) -> None:
    """Prints the machine and the setting; with --json writes the record and draws the picture."""
    where = machine() | {"threads": args.threads} | setting | {"seed": args.seed}
    print("\n" + ", ".join(f"{key} {value}" for key, value in where.items()))
    if args.json is not None:
        write_record(args.json, {"machine": where, **content})
        draw(args.json.with_suffix(".png"), paint, size)


def read_record(
    path: Path | None, problem: dict[str, Any], empty: dict[str, Any]
) -> dict[str, Any]:
    """The record at ``path`` that grows over several calls: ``problem``, and what ``empty`` names.

    Raises:
        SystemExit: it is of another problem.
    """
    if path is None or not path.exists():
        return {"problem": problem, **empty}
    record = json.loads(path.read_text())
    if record.get("problem") != problem:
        raise SystemExit(
            f"{path}: expected a record of {problem}, got {record.get('problem')}: give it another name"
        )
    return {key: record[key] for key in ("problem", *empty)}


def write_record(path: Path | None, record: dict[str, Any]) -> None:
    """In one piece: a call that is killed leaves the old one."""
    if path is not None:
        part = path.with_name(path.name + ".part")
        part.write_text(json.dumps(record, indent=1) + "\n")
        os.replace(part, path)
