"""Reads records, writes Markdown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

__all__ = ["RESULTS", "ROOT", "machine_of", "markdown", "read", "without_columns"]

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"


def read(name: str) -> dict[str, Any]:
    """The record ``name`` of ``results``."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def machine_of(record: dict[str, Any]) -> str:
    """The machine and the setting of a record or of a part of one."""
    return ", ".join(f"{key} {value}" for key, value in record["machine"].items())


def without_columns(
    record: dict[str, Any], names: tuple[str, ...]
) -> tuple[list[str], list[list[str]]]:
    """A record's columns and rows, but for the columns of these ``names``."""
    columns = record["columns"]
    kept = [place for place, name in enumerate(columns) if name not in names]
    return [columns[i] for i in kept], [[row[i] for i in kept] for row in record["rows"]]


def markdown(columns: list[str], rows: list[list[str]]) -> str:
    """A table whose first column is text, the others numbers."""
    lines = [columns, ["---"] + ["---:"] * (len(columns) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
