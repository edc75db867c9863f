"""Programs in this process, which has imported torch already."""

import importlib
import json
import sys

import pytest
from helpers import ROOT

MACHINE = {"cpu", "cores", "threads", "instruction_set", "python", "torch", "slide_torch", "seed"}


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs a module's main() with arguments; returns what it printed."""

    def run_main(module, *arguments):
        monkeypatch.setattr(sys, "argv", [module, *map(str, arguments)])
        importlib.import_module(module).main()
        return capsys.readouterr().out

    return run_main


@pytest.fixture
def refusal(run, capsys):
    """Runs a module's main() with arguments that it refuses; returns what it said."""

    def run_main(module, *arguments):
        with pytest.raises(SystemExit) as end:
            run(module, *arguments)
        assert end.value.code
        return f"{end.value.code} {capsys.readouterr().err}"

    return run_main


@pytest.fixture
def record_of(run, tmp_path):
    """Runs a benchmark on a tiny size; returns its record, of which a further call may make more, and what it
    printed."""

    def run_quickly(name, *arguments):
        target = tmp_path / f"{name.split('.')[1]}.json"
        quick = ("--quick", "--seed", 3, "--threads", 2, "--json", target)
        printed = run(f"benchmarks.{name}", *quick, *arguments)
        record = json.loads(target.read_text())
        assert set(record["machine"]) >= MACHINE
        assert (record["machine"]["seed"], record["machine"]["threads"]) == (3, 2)
        drawn = "picture: " if target.with_suffix(".png").exists() else "matplotlib is missing"
        assert drawn in printed
        return record, printed

    return run_quickly


@pytest.fixture
def example(monkeypatch, tmp_path):
    """Runs an example's main() in this process, its files in tmp_path; returns what it printed."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))  # as Python does for a program
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)

    def run_main(name, capsys, *arguments):
        module = importlib.import_module(name)
        monkeypatch.setattr(sys, "argv", [name, "--threads", "1", *map(str, arguments)])
        module.main()
        return capsys.readouterr().out

    return run_main
