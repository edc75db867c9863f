"""The benchmarks of speed as commands, on tiny sizes: they run, and write the record that they print."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch

from benchmarks.speed import prediction, prediction_sweep
from benchmarks.speed.step_contenders import PHASES, Contender
from benchmarks.speed.step_turns import summary
from examples.data import places
from slide_torch import LSHLinear


def test_step_time(record_of):
    names = ["dense_fp32", "lsh_per_sample", "lsh_per_sample_bf16_moments", "lsh_shared"]
    names.append("lsh_shared_bf16_parameters")
    record, _ = record_of("speed.step_time", "--only", *names)
    assert [c["contender"] for c in record["contenders"]] == names and not record["failed"]
    for found in record["contenders"]:
        has_tables = found["contender"].startswith("lsh")
        assert set(found["phases"]) == {*PHASES, "upkeep"} if has_tables else {*PHASES}
        assert min(found["phases"].values()) > 0
    assert all(rate["gb_s"] > 0 for rate in record["memory"].values())
    dense, per_sample, narrow, _, narrowest = (c["memory_gb"] for c in record["contenders"])
    head = 4_000 * 129 * 4 / 2**30
    assert dense["tables"] == 0 < per_sample["tables"]
    assert dense["weights"] == per_sample["weights"] > head
    saved = per_sample["optimizer_state"] - narrow["optimizer_state"]
    assert saved == pytest.approx(head)  # half of two moments
    assert dense["weights"] - narrowest["weights"] == pytest.approx(head / 2)
    assert narrowest["optimizer_state"] == pytest.approx(narrow["optimizer_state"])
    forward = [b for b in record["byte_bounds"] if b["part"] == "forward"]
    union = [c["union"] for c in record["contenders"] if "union" in c]
    bytes_each = [4, 4, 4, 2]
    assert [b["traffic"] for b in forward] == [
        {"row_read": size * 128 * u} for size, u in zip(bytes_each, union, strict=True)
    ]


def test_sharded(record_of):
    record, _ = record_of("speed.sharded", "--ranks", 2)
    found = {point["contender"]: point for point in record["points"]}
    assert found.keys() == {"sharded", "replicas", "dense"}
    batch, width = 16, 128
    # two ranks: an all-reduce sends each its tensor once; the header is three int64
    assert found["sharded"]["bytes_sent"] == 4 * batch * (width + 3) + 24
    assert found["replicas"]["bytes_sent"] > found["sharded"]["bytes_sent"]


@pytest.mark.parametrize("name", ["dense_fp32", "lsh_shared"])
def test_the_parts_of_a_step_are_the_step(name):
    """Nothing between the first part's begin and the last one's end is left out or counted twice."""
    answer = Contender(name, batch=8, threads=1, seed=0, labels=4_000).run(3)
    assert set(answer["phases"]) == set(PHASES)
    parts = [sum(times) for times in zip(*answer["phases"].values(), strict=True)]
    assert answer["ms"] == pytest.approx(parts) and min(parts) > 0


def test_a_step_bears_its_share_of_upkeep():
    turn = {"peak_gb": 3.0, "features": 7, "memory_gb": {"weights": 1.0, "tables": 0.5}}
    turn |= {"active_per_sample": 9, "union": 40, "ids_read": 50}
    turn["schedule"] = {"rehash_every": 25, "rehash_growth": 1.0, "rebuild_every": 10}
    times = [4.0, 8.0, 5.0]
    turn |= {"ms": [6 * ms for ms in times], "phases": dict.fromkeys(PHASES, times)}
    found = summary("lsh_shared", [turn, turn], {"lsh_shared": (10.0, 100.0)})
    # before step 1,000: 39 rehashes, 3 of which are rebuilds
    assert found["phases"] == dict.fromkeys(PHASES, 5.0) | {"upkeep": (36 * 10 + 3 * 100) / 1000}
    assert found["ms_step"] == pytest.approx(sum(found["phases"].values()))
    assert found["memory_gb"]["other_at_peak"] == 1.5
    dense = summary("dense_fp32", [turn], {})
    assert dense["ms_step"] == 30.0 == sum(dense["phases"].values())


def test_kernels_at_the_level_asked_for(record_of):
    record, printed = record_of("speed.kernels", "--levels", "baseline")
    assert {r["level"] for r in record["operators"]} == {"baseline"}
    names = {r["operator"] for r in record["operators"]}
    assert {"build_tables", "retrieve", "sample_cross_entropy", "adam_rows_"} <= names
    for found in record["operators"]:
        assert found["operator"] in printed and found["bound_ms"] > 0
        assert found["ms"].keys() == {"1", "2"} and min(found["ms"].values()) > 0


def test_predictor_loading(run, tmp_path):
    target = tmp_path / "loading.json"
    quick = ("--quick", "--seed", 3, "--threads", 2, "--json", target)
    printed = run("benchmarks.speed.predictor_loading", *quick)
    record = json.loads(target.read_text())
    assert record["machine"]["seed"] == 3 and record["neurons"] == 2_000
    assert record["megabytes"] > 2_000 * 128 * (4 + 1) / 1e6
    for way in record["ways"].values():
        assert min(way.values()) > 0 and f"{way['seconds']:.3f}" in printed


def test_scaling(record_of):
    record, _ = record_of("speed.scaling")
    assert {p["neurons"] for p in record["points"]} == {3_000, 10_000}
    assert {p["threads"] for p in record["points"]} == {1, 2}
    for point in record["points"]:
        assert len(point["ms"]) == 4 and min(point["ms"].values()) > 0
    for found in record["crossovers"]:
        assert [t["neurons"] for t in found["tried"]] == [1_000, 2_000]
        faster = [
            min(ms for name, ms in t["ms"].items() if name.startswith("lsh"))
            < min(ms for name, ms in t["ms"].items() if name.startswith("dense"))
            for t in found["tried"]
        ]
        # from which N on LSH is faster, and stays so
        assert found["neurons"] == (None if not faster[1] else 1_000 if faster[0] else 2_000)


@pytest.fixture
def random_layer(monkeypatch):
    """In place of the trained layer of the prediction benchmarks: 9,000 random rows, queries near them."""
    layer = LSHLinear(128, 9_000)
    queries = layer.weight.detach()[::15] + 0.02 * torch.randn(600, 128)

    def run_main(module, path, *arguments):
        monkeypatch.setattr(places, "load_places", lambda: SimpleNamespace(test=0, validation=1))
        monkeypatch.setattr(module, "kept_model", lambda *_: SimpleNamespace(head=layer))
        monkeypatch.setattr(module, "draw_rows", lambda rows, count, seed: (rows, count))
        monkeypatch.setattr(module, "hidden_of", lambda _, drawn: (queries[drawn[0] :: 2], None))
        arguments = ["--quick", "--threads", 1, "--json", path, *arguments]
        monkeypatch.setattr(sys, "argv", ["benchmark", *map(str, arguments)])
        module.main()
        return json.loads(path.read_text())

    return run_main


def test_prediction(random_layer, tmp_path):
    record = random_layer(prediction, tmp_path / "record.json", "--batches", 4)
    torch_line, exact, *others = record["contenders"]
    assert torch_line["recall"] == exact["recall"] == 1
    ours = [r for r in others if r["family"] == "slide_torch, exact=False"]
    assert len(ours) == len(prediction.RECALLS)
    assert all(0 < r["recall"] <= 1 for r in ours) and ours[-1]["recall"] > 0.9
    for r in record["contenders"]:
        speeds = r["queries_per_second_4"] / exact["queries_per_second_4"]
        assert r["times_exact_4"] == pytest.approx(speeds)
    assert [t["K"] for t in record["tables"]] == [6, 11, 3, 4] and record["partition_mb"] > 0


def test_prediction_sweep(random_layer, tmp_path):
    home_of = prediction_sweep.home_of
    before = {name: getattr(home_of(name), name) for name in prediction_sweep.SWEPT}
    record = random_layer(prediction_sweep, tmp_path / "record.json", "--batches", 16)
    tried = {(r["constant"], str(r["value"])) for r in record["settings"] if not r["default"]}
    others = {
        (name, str(json.loads(json.dumps(value))))
        for name, values in prediction_sweep.SWEPT.items()
        for value in values
        if value != before[name]
    }
    assert tried == others and sum(r["default"] for r in record["settings"]) == 1
    assert min(r["queries_per_second_16"] for r in record["settings"]) > 0
    assert before == {name: getattr(home_of(name), name) for name in prediction_sweep.SWEPT}
