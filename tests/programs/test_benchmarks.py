"""All benchmarks as commands: what they say and refuse. Those of hidden layers and of reading files run."""

import copy
import importlib
import json
import os
import pkgutil
import runpy
import subprocess
import sys

import pytest
from helpers import ROOT

import benchmarks
from benchmarks.common.worker import Worker

PROGRAMS = [
    name
    for _, name, is_package in pkgutil.walk_packages(benchmarks.__path__, "benchmarks.")
    if not is_package and hasattr(importlib.import_module(name), "main")
]


@pytest.mark.parametrize("name", PROGRAMS)
def test_help_shows_the_command(name, monkeypatch, capsys):
    """Of a module that Python runs as a program."""
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    monkeypatch.delitem(sys.modules, name)  # runpy warns of a second copy
    with pytest.raises(SystemExit) as end:
        runpy.run_module(name, run_name="__main__")
    assert end.value.code == 0 and f"python -m {name} " in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments,message",
    [(["--threads", 0], "at least 1"), (["--json", "no/such/a.json"], "an existing folder")],
)
def test_refuses_before_any_work(refusal, arguments, message):
    assert message in refusal("benchmarks.speed.xmc_read", *arguments)


def test_worker_that_dies():
    worker = Worker(copy.copy, os._exit)
    with pytest.raises(RuntimeError, match="process died"):
        worker.run(3)
    worker.stop()


def test_hidden(record_of, refusal, tmp_path):
    record, printed = record_of("hidden.run")
    for entry in record["runs"]:
        assert entry.get("active_share", entry["share"]) <= entry["share"]
        # dense and the tables' evaluations stand where they exist
        lsh = entry["contender"] in ("per_sample", "shared")
        for part in ("validation", "test"):
            assert ("budget" in entry[part]) == (lsh or entry["contender"] == "top")
            assert ("all" in entry[part]) == (entry["contender"] != "top")
        # the rate that validation rows like best
        tried = {trial["lr"]: trial["validation"] for trial in entry["trials"]}
        assert len(tried) == 2 and tried[entry["lr"]] == max(tried.values())
        assert max(entry["validation"].values()) == tried[entry["lr"]]
    assert {r["contender"] for r in record["runs"]} == {
        *("dense", "per_sample", "shared", "dropout", "batch_dropout", "top")
    }
    assert {r["depth"] for r in record["runs"]} == {1, 3}
    for point in record["times"]["points"]:
        assert min(point["ms"].values()) > 0
    assert len(record["times"]["crossovers"]) == 4
    assert "lr 0.01: loss" in printed

    again, printed = record_of("hidden.run", "--hidden", 64)
    assert again["runs"] == record["runs"] and "loss" not in printed  # nothing was missing
    other_seed = ("--quick", "--seed", 4, "--json", tmp_path / "run.json")
    assert "expected a record of" in refusal("benchmarks.hidden.run", *other_seed)


def test_xmc_read(tmp_path):
    """In a process of its own, as a user starts it."""
    target = tmp_path / "record.json"
    command = [sys.executable, "-m", "benchmarks.speed.xmc_read", "--quick", "--threads", "2"]
    subprocess.run([*command, "--json", str(target)], cwd=ROOT, check=True, timeout=600)
    assert [line["threads"] for line in json.loads(target.read_text())["threads"]] == [1, 2]
