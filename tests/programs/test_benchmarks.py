"""The benchmarks as commands, on tiny sizes: they run, and write the record that they print."""

import importlib
import json
import math
import pkgutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from helpers import ROOT
from torch import nn

import benchmarks
from benchmarks.accuracy import contenders, step_timing
from benchmarks.accuracy.contenders import CONTENDERS, make_output_layer, parse_contender
from benchmarks.accuracy.output_layers import SampledLayer
from benchmarks.accuracy.record import seconds_at
from benchmarks.accuracy.training import choose_rate
from benchmarks.common import places_model
from benchmarks.speed import prediction, prediction_sweep
from benchmarks.speed.step_contenders import PHASES, Contender
from benchmarks.speed.step_time import summary
from examples.data import places
from slide_torch import LSHLinear
from slide_torch.data import read_xmc
from slide_torch.options import FAMILIES

MACHINE = {"cpu", "cores", "threads", "instruction_set", "python", "torch", "slide_torch", "seed"}


def run(name, *arguments):
    command = [sys.executable, "-m", f"benchmarks.{name}", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)


def record_of(path, name, *arguments):
    target = path / f"{name.split('.')[1]}.json"
    answer = run(name, "--quick", "--seed", 3, "--threads", 2, "--json", target, *arguments)
    assert answer.returncode == 0, answer.stderr
    record = json.loads(target.read_text())
    assert set(record["machine"]) >= MACHINE
    assert (record["machine"]["seed"], record["machine"]["threads"]) == (3, 2)
    drawn = "picture: " if target.with_suffix(".png").exists() else "matplotlib is missing"
    assert drawn in answer.stdout
    return record, answer.stdout


def test_step_time(tmp_path):
    names = ["dense_fp32", "lsh_per_sample", "lsh_per_sample_bf16_moments", "lsh_shared"]
    names.append("lsh_shared_bf16_parameters")
    record, _ = record_of(tmp_path, "speed.step_time", "--only", *names)
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


def test_sharded(tmp_path):
    record, _ = record_of(tmp_path, "speed.sharded", "--ranks", 2)
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


def test_kernels_at_the_level_asked_for(tmp_path):
    record, printed = record_of(tmp_path, "speed.kernels", "--levels", "baseline")
    assert {r["level"] for r in record["operators"]} == {"baseline"}
    names = {r["operator"] for r in record["operators"]}
    assert {"build_tables", "retrieve", "sample_cross_entropy", "adam_rows_"} <= names
    for found in record["operators"]:
        assert found["operator"] in printed and found["bound_ms"] > 0
        assert found["ms"].keys() == {"1", "2"} and min(found["ms"].values()) > 0


def test_scaling(tmp_path):
    record, _ = record_of(tmp_path, "speed.scaling")
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


def test_retrieval_measures_every_family(tmp_path):
    record, _ = record_of(tmp_path, "accuracy.retrieval")
    assert {r["family"] for r in record["settings"]} == set(FAMILIES)
    for found in record["settings"]:
        assert 0 <= found["recall"] <= 1 and 0 < found["softmax_mass"] <= 1 + 1e-4
        assert found["rows_touched"] <= found["ids_read"] and found["is_auto"]
    # rows around a query's own centre share its buckets: far above the half that chance gives
    recall = {r["family"]: r["recall"] for r in record["settings"]}
    assert recall["simhash"] > 0.9 and recall["kmeans"] > 0.9


def test_a_kept_model_is_the_trained_one(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    rows = read_xmc(ROOT / "examples" / "data" / "tiny_train.txt")
    data = SimpleNamespace(train=rows, num_features=rows.num_features, num_labels=rows.num_labels)
    trained = places_model.kept_model(data, 2, 5)
    monkeypatch.setattr(places_model, "train_places", None)  # not again
    kept = places_model.kept_model(data, 2, 5)
    assert [path.name for path in (tmp_path / "slide_torch").iterdir()] == ["prediction-2-5.pt"]
    some = places_model.draw_rows(rows, 7, seed=0)
    (hidden, labels), (other, _) = (places_model.hidden_of(m, some) for m in (trained, kept))
    assert torch.equal(hidden, other) and hidden.shape == (7, 128) and len(labels) == 7
    assert torch.equal(trained.head.weight, kept.head.weight)


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


PROGRAMS = [
    name
    for _, name, is_package in pkgutil.walk_packages(benchmarks.__path__, "benchmarks.")
    if not is_package and hasattr(importlib.import_module(name), "main")
]


@pytest.mark.parametrize("name", PROGRAMS)
def test_help_shows_the_command(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as end:
        importlib.import_module(name).main()
    assert end.value.code == 0 and f"python -m {name} " in capsys.readouterr().out


def test_sampling(tmp_path):
    record, printed = record_of(tmp_path, "accuracy.sampling")
    found = {(r["sampler"], r["correction"]): r for r in record["samplers"]}
    assert len(found) == len(record["samplers"]) >= 12
    for (sampler, correction), r in found.items():
        assert sampler in printed and r["ms_step"] > 0 and 0 < r["active_rows"] <= 2000
        assert r["z_deviation"] >= 0 and r["input_gradient_of_mean"] >= 0
        # the root mean square of distances is no less than the distance of the mean
        for kind in ("input", "weight"):
            assert r[f"{kind}_gradient_of_mean"] <= r[f"{kind}_gradient_rms"] * 1.001
        if correction == "importance":
            assert 0.5 < r["z_mean"] < 2
    # the batch's labels alone are a part of the sum
    assert found["in-batch alone", "none"]["z_mean"] < 0.9


def test_hidden(tmp_path):
    record, printed = record_of(tmp_path, "hidden.run")
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

    again, printed = record_of(tmp_path, "hidden.run", "--hidden", 64)
    assert again["runs"] == record["runs"] and "loss" not in printed  # nothing was missing
    answer = run("hidden.run", "--quick", "--seed", 4, "--json", tmp_path / "run.json")
    assert "expected a record of" in answer.stderr


def test_xmc_read(tmp_path):
    record, _ = record_of(tmp_path, "speed.xmc_read")
    assert [line["threads"] for line in record["threads"]] == [1, 2]


def test_equal_steps(tmp_path):
    record_of(tmp_path, "accuracy.equal_steps", "--head", "dense")
    dense = tmp_path / "dense.json"
    (tmp_path / "equal_steps.json").rename(dense)
    record, printed = record_of(
        tmp_path, "accuracy.equal_steps", "--head", "lsh", "--against", dense
    )
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
    answer = run("speed.xmc_read", *arguments)
    assert answer.returncode == 2 and message in answer.stderr


def test_time_to_accuracy(tmp_path):
    names = ["dense", "uniform_1024", "lsh", "mine=budget:2,tail:2,family:dwta"]
    arguments = [word for name in names[:3] for word in ("--contender", name)]
    record, printed = record_of(tmp_path, "accuracy.time_to_accuracy", *arguments)
    assert [e["contender"] for e in record["contenders"]] == names[:3]
    for entry in record["contenders"]:
        tried = {t["lr"]: t["P@1"] for t in entry["trials"]}
        assert tried[entry["settings"]["lr"]] == max(tried.values()) and len(tried) == 2
        (run,) = entry["runs"]
        # the trial that was best is the run
        assert run["curve"][-1]["step"] == entry["settings"]["steps"]
        assert run["curve"][-1]["P@1"] == max(tried.values())
        assert entry["contender"] in printed and 0 <= run["test"]["P@1"] <= 1
        assert "clock" not in entry
    # with all twelve classes active, every head is the same model
    dense, _, lsh = (e["runs"][0]["classes_a_step"] for e in record["contenders"])
    assert dense == lsh == 12
    # another call adds its contender and the seed that is missing, and trains nothing else
    trained = record["contenders"]
    record, _ = record_of(
        *(tmp_path, "accuracy.time_to_accuracy", "--seeds", 2),
        *("--contender", names[3], "--contender", "lsh"),
    )
    assert [e["contender"] for e in record["contenders"]] == [*names[:3], "mine"]
    assert record["contenders"][3]["options"] == {"budget": 2, "tail": 2, "family": "dwta"}
    assert record["contenders"][0] == trained[0]
    first, second = record["contenders"][2]["runs"]
    assert first == trained[2]["runs"][0] and second["seed"] == 4

    record, printed = record_of(
        *(tmp_path, "accuracy.time_to_accuracy", "--clock", "--turns", 2),
        *("--contender", "dense", "--contender", names[3]),
    )
    dense, uniform, _, mine = record["contenders"]
    assert "clock" not in uniform
    assert set(dense["clock"]["variants_ms"]) == {"eager", "compile", "linear_cross_entropy"}
    assert len(mine["clock"]["ms_step"]) == 3 and min(mine["clock"]["ms_step"]) > 0
    assert mine["clock"]["start_ms"] > 0 == dense["clock"]["start_ms"]  # the tables
    assert "s to dense's best" in printed


def test_seconds_at_a_step():
    entry = {"settings": {"steps": 300}, "clock": {"ms_step": [1, 2, 4], "start_ms": 50}}
    assert [seconds_at(entry, step) for step in (50, 150, 300)] == [0.1, 0.25, 0.75]
    assert seconds_at({"clock": {"seconds": 3.5}}, 1) == 3.5


def test_clock_takes_whole_periods(monkeypatch):
    """What a rehash costs is spread over the steps from one to the next, and a rebuild is not met."""
    now = [0.0]

    class Training:
        def __init__(self, *_):
            self.output = SimpleNamespace(linear=SimpleNamespace(tables=tables))

        def load(self, _):
            pass

        def batches(self):
            while True:
                yield (None, None)

        def step(self, *_):
            now[0] += 1.0
            schedule.steps += 1
            if schedule.steps % 30 == 0:
                schedule.rehashes += 1
                schedule.rebuilds += schedule.rehashes % 3 == 0
                now[0] += 3000.0 if schedule.rehashes % 3 == 0 else 15.0

    schedule = SimpleNamespace(steps=0, rehashes=0, rebuilds=0)
    tables = SimpleNamespace(uses_tables=True, schedule=schedule)
    monkeypatch.setattr(step_timing, "Training", Training)
    monkeypatch.setattr(step_timing.time, "perf_counter", lambda: now[0])
    entry = {"contender": "lsh", "kind": "lsh", "options": {}, "settings": {}, "seed": 0}
    clocked = step_timing.Clocked(None, entry, None, None)
    assert [clocked.turn() for _ in range(4)] == [1_500.0] * 4 and schedule.steps == 7 * 30
    tables.uses_tables = False  # no tables, no periods
    assert (
        step_timing.Clocked(None, entry, None, None).turn() > 0
        and schedule.steps == 7 * 30 + 2 * 20
    )


@pytest.mark.parametrize("best,tried", [(0.1, {0.005, 0.01, 0.02, 0.05, 0.1, 0.2}), (1e-3, None)])
def test_learning_rates_beyond_those_given(best, tried):
    """Where the best is the first or the last, the next of 1, 2, 5, 10 on that side; a rate that diverges is
    never the best."""
    asked = []

    def score(lr):
        asked.append(lr)
        return -math.inf if lr > 10 * best else -abs(math.log(lr / best))

    assert choose_rate(score, [0.01, 0.005], beyond=True) == best
    assert set(asked) == (tried or {0.01, 0.005, 0.002, 0.001, 0.0005})
    assert len(asked) == len(set(asked))
    asked.clear()
    choose_rate(score, [0.01, 0.005], beyond=False)
    assert len(asked) == 2
    with pytest.raises(SystemExit, match="every trial diverged"):
        choose_rate(lambda lr: -math.inf, [0.01, 0.02], beyond=True)


def test_time_to_perplexity(tmp_path):
    text = tmp_path / "text.txt"
    lines = [" ".join(f"w{(start + i) % 13}" for i in range(70)) for start in range(60)]
    text.write_text("\n".join(lines))
    names = ["dense", "log_uniform_1024", "tail_1024"]
    arguments = [word for name in names for word in ("--contender", name)]
    arguments += ["--problem", "words", "--text", text, "--batch", 64, "--epochs", 1, "--lr", 0.02]
    record, printed = record_of(tmp_path, "accuracy.time_to_accuracy", *arguments)
    assert record["problem"]["num_labels"] == 15  # with the unknown word and the end of a document
    dense, sampled, tail = (e["runs"][0]["test"]["perplexity"] for e in record["contenders"])
    assert 1 < dense < 8  # counting modulo 13 begins to be learnt: guessing gives over 13
    # with every word in the softmax, all heads are the same model
    assert sampled == pytest.approx(dense, rel=1e-3) == tail
    assert "s to within 2% of dense's best" in printed
    for state in tmp_path.glob("*-tail_1024-*.pt"):
        state.unlink()
    clock = ("--problem", "words", "--text", text, "--batch", 64, "--clock")
    clock += ("--contender", "tail_1024", "--json", tmp_path / "time_to_accuracy.json")
    answer = run("accuracy.time_to_accuracy", *clock)
    assert answer.returncode == 1 and "--clock: expected the states" in answer.stderr


def test_time_to_accuracy_of_label_trees(tmp_path):
    pytest.importorskip("omikuji")
    record, _ = record_of(tmp_path, "accuracy.time_to_accuracy", "--contender", "omikuji_1")
    (run,) = record["contenders"][0]["runs"]
    assert run["test"]["P@1"] > 0.15  # guessing gives about so much
    record, _ = record_of(
        tmp_path, "accuracy.time_to_accuracy", "--clock", "--contender", "omikuji_1"
    )
    assert record["contenders"][0]["clock"]["seconds"] > 0


def test_time_to_accuracy_refuses(tmp_path):
    answer = run("accuracy.time_to_accuracy", "--clock", "--contender", "dense")
    assert answer.returncode == 2 and "--clock: expected --json" in answer.stderr


@pytest.mark.parametrize(
    "text,message",
    [
        ("nobody", "expected one of dense"),
        ("dense=budget:3", "dense is taken"),
        ("mine=buckets:3", "expected option:value"),
        ("mine=budget:-3", "LSHOptions: budget"),
    ],
)
def test_contender_by_name_or_options(text, message):
    with pytest.raises(ValueError, match=message):
        parse_contender(text)
    assert parse_contender("lsh") is CONTENDERS["lsh"]
    found = parse_contender("mine=family:dwta,budget:64,center:False,rehash_growth:1.5").options
    assert found == {"family": "dwta", "budget": 64, "center": False, "rehash_growth": 1.5}


def test_output_layers_compute_the_same_loss():
    """Where every class is active, and for both dense variants: rows of one and of several labels."""
    torch.manual_seed(0)
    hidden = torch.randn(5, 8)
    labels = torch.tensor([[3, -100], [1, 7], [-100, -100], [11, 0], [4, -100]])
    losses, gradients = [], []
    for contender, variant in (
        (contenders.Contender("a", "dense"), "eager"),
        (contenders.Contender("b", "dense"), "linear_cross_entropy"),
        (contenders.Contender("c", "sampled", {"exact": 12}), None),
        (contenders.Contender("d", "sampled", {"exact": 12, "drawn": 4, "corrected": True}), None),
        (contenders.Contender("e", "lsh", {"budget": 12}), None),
    ):
        torch.manual_seed(1)
        layer = make_output_layer(contender, torch.nn.Linear(8, 12), variant)
        loss = layer.loss(hidden, labels)
        loss.backward()
        losses.append(loss.detach())
        gradients.append(layer.linear.weight.grad.to_dense())
    for loss, gradient in zip(losses[1:], gradients[1:], strict=True):
        torch.testing.assert_close(loss, losses[0])
        torch.testing.assert_close(gradient, gradients[0])


def test_corrected_tail_estimates_the_full_softmax():
    torch.manual_seed(0)
    linear, hidden, labels = (
        nn.Linear(8, 1000),
        torch.randn(4, 8),
        torch.tensor([[1], [2], [3], [4]]),
    )
    full = nn.functional.cross_entropy(linear(hidden), labels[:, 0])
    corrected = SampledLayer(linear, drawn=200, corrected=True)
    mean = torch.stack([corrected.loss(hidden, labels).detach() for _ in range(200)]).mean()
    assert abs(mean - full) < 0.01
    assert abs(SampledLayer(linear, drawn=200).loss(hidden, labels) - full) > 1
