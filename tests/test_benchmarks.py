"""The benchmarks as commands, on tiny sizes: they run, and write the record that they print."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
MACHINE = {"cpu", "cores", "threads", "instruction_set", "python", "torch", "slide_torch", "seed"}


def run(script, *arguments):
    command = [sys.executable, str(BENCHMARKS / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


def record_of(path, script, *arguments):
    target = path / f"{script}.json"
    answer = run(
        f"{script}.py", "--quick", "--seed", 3, "--threads", 2, "--json", target, *arguments
    )
    assert answer.returncode == 0, answer.stderr
    record = json.loads(target.read_text())
    assert set(record["machine"]) >= MACHINE
    assert (record["machine"]["seed"], record["machine"]["threads"]) == (3, 2)
    drawn = "picture: " if target.with_suffix(".png").exists() else "matplotlib is missing"
    assert drawn in answer.stdout
    return record, answer.stdout


def test_step_time(tmp_path):
    names = ["dense_fp32", "lsh_per_sample", "lsh_per_sample_bf16_moments", "lsh_shared"]
    record, _ = record_of(tmp_path, "step_time", "--only", *names)
    assert [c["contender"] for c in record["contenders"]] == names and not record["failed"]
    for found in record["contenders"]:
        # the parts make the step: nothing is left out (medians of single parts may differ a little)
        assert 0.3 < sum(found["phases"].values()) / found["ms_step"] < 1.7
    assert all(rate["gb_s"] > 0 for rate in record["memory"].values())
    dense, per_sample, narrow, _ = (c["memory_gb"] for c in record["contenders"])
    head = 4_000 * 129 * 4 / 2**30
    assert dense["tables"] == 0 < per_sample["tables"]
    assert dense["weights"] == per_sample["weights"] > head
    saved = per_sample["optimizer_state"] - narrow["optimizer_state"]
    assert saved == pytest.approx(head)  # half of two moments
    forward = [b for b in record["byte_bounds"] if b["part"] == "forward"]
    union = [c["union"] for c in record["contenders"] if "union" in c]
    assert [b["traffic"] for b in forward] == [{"row_read": 4 * 128 * u} for u in union]


def test_kernels_at_the_level_asked_for(tmp_path):
    record, printed = record_of(tmp_path, "kernels", "--levels", "baseline")
    assert {r["level"] for r in record["operators"]} == {"baseline"}
    names = {r["operator"] for r in record["operators"]}
    assert {"build_tables", "retrieve", "sample_cross_entropy", "adam_rows_"} <= names
    for found in record["operators"]:
        assert found["operator"] in printed and found["bound_ms"] > 0
        assert found["ms"].keys() == {"1", "2"} and min(found["ms"].values()) > 0


def test_scaling(tmp_path):
    record, _ = record_of(tmp_path, "scaling")
    assert {p["neurons"] for p in record["points"]} == {3_000, 10_000}
    assert {p["threads"] for p in record["points"]} == {1, 2}
    for point in record["points"]:
        assert len(point["ms"]) == 4 and min(point["ms"].values()) > 0
    for found in record["crossovers"]:
        tried = [t["neurons"] for t in found["tried"]]
        assert tried == [1_000, 2_000] and found["neurons"] in (None, *tried)


def test_retrieval_measures_every_family(tmp_path):
    from typing import get_args, get_type_hints

    from slide_torch import LSHOptions

    record, _ = record_of(tmp_path, "retrieval")
    families = get_args(get_type_hints(LSHOptions)["family"])
    assert {r["family"] for r in record["settings"]} == set(families)
    for found in record["settings"]:
        assert 0 <= found["recall"] <= found["recall_of_all_read"] <= 1
        assert found["candidates"] <= found["ids_read"]
    # rows around a query's own centre share its buckets: far above the half that chance gives
    simhash = [r["recall"] for r in record["settings"] if r["family"] == "simhash"]
    assert min(simhash) > 0.9


def test_hidden(tmp_path):
    record, _ = record_of(tmp_path, "hidden")
    for run in record["runs"]:
        shares = run.get("active_share", run["share"])
        assert shares <= run["share"] and run["ms_step"] > 0
        # dense and the tables' evaluations stand where they exist
        lsh = run["contender"] in ("per_sample", "shared")
        assert ("accuracy_budget" in run) == (lsh or run["contender"] == "top")
        assert ("accuracy" in run) == (run["contender"] != "top")
    assert {r["contender"] for r in record["runs"]} == {
        *("dense", "per_sample", "shared", "dropout", "top")
    }
    for point in record["times"]:
        assert min(point["ms"].values()) > 0
    assert len(record["crossovers"]) == 2


def test_xmc_read(tmp_path):
    record, _ = record_of(tmp_path, "xmc_read")
    assert [line["threads"] for line in record["threads"]] == [1, 2]


def test_equal_steps(tmp_path):
    record_of(tmp_path, "equal_steps", "--head", "dense")
    dense = tmp_path / "dense.json"
    (tmp_path / "equal_steps.json").rename(dense)
    record, printed = record_of(tmp_path, "equal_steps", "--head", "lsh", "--against", dense)
    assert record["contender"] == "LSHLinear" and "dense torch" in printed
    # twelve labels are fewer than the tail: every neuron is active, and the heads are the same model
    other = json.loads(dense.read_text())
    assert [p["validation_p1"] for p in record["curve"]] == [
        p["validation_p1"] for p in other["curve"]
    ]


@pytest.mark.parametrize(
    "arguments,message",
    [(["--threads", 0], "at least 1"), (["--json", "no/such/a.json"], "an existing folder")],
)
def test_refuses_before_any_work(arguments, message):
    answer = run("xmc_read.py", *arguments)
    assert answer.returncode == 2 and message in answer.stderr
