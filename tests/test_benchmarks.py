"""The benchmarks as commands, on tiny sizes: they run, and write the record that they print."""

import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

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
    names.append("lsh_shared_bf16_parameters")
    record, _ = record_of(tmp_path, "step_time", "--only", *names)
    assert [c["contender"] for c in record["contenders"]] == names and not record["failed"]
    for found in record["contenders"]:
        # the parts make the step: nothing is left out (medians of single parts may differ a little)
        assert 0.3 < sum(found["phases"].values()) / found["ms_step"] < 1.7
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
    from slide_torch.options import FAMILIES

    record, _ = record_of(tmp_path, "retrieval")
    assert {r["family"] for r in record["settings"]} == set(FAMILIES)
    for found in record["settings"]:
        assert 0 <= found["recall"] <= 1 and 0 < found["softmax_mass"] <= 1 + 1e-4
        assert found["rows_touched"] <= found["ids_read"] and found["is_auto"]
    # rows around a query's own centre share its buckets: far above the half that chance gives
    recall = {r["family"]: r["recall"] for r in record["settings"]}
    assert recall["simhash"] > 0.9 and recall["kmeans"] > 0.9


def test_sampling(tmp_path):
    record, printed = record_of(tmp_path, "sampling")
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
    record, printed = record_of(tmp_path, "hidden")
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

    again, printed = record_of(tmp_path, "hidden", "--hidden", 64)
    assert again["runs"] == record["runs"] and "loss" not in printed  # nothing was missing
    answer = run("hidden.py", "--quick", "--seed", 4, "--json", tmp_path / "hidden.json")
    assert "expected a record of" in answer.stderr


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


def test_time_to_accuracy(tmp_path):
    names = ["dense", "uniform_1024", "lsh", "mine=budget:2,tail:2,family:dwta"]
    arguments = [word for name in names[:3] for word in ("--contender", name)]
    record, printed = record_of(tmp_path, "time_to_accuracy", *arguments)
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
        *(tmp_path, "time_to_accuracy", "--seeds", 2),
        *("--contender", names[3], "--contender", "lsh"),
    )
    assert [e["contender"] for e in record["contenders"]] == [*names[:3], "mine"]
    assert record["contenders"][3]["options"] == {"budget": 2, "tail": 2, "family": "dwta"}
    assert record["contenders"][0] == trained[0]
    first, second = record["contenders"][2]["runs"]
    assert first == trained[2]["runs"][0] and second["seed"] == 4

    record, printed = record_of(
        *(tmp_path, "time_to_accuracy", "--clock", "--turns", 2),
        *("--contender", "dense", "--contender", names[3]),
    )
    dense, uniform, _, mine = record["contenders"]
    assert "clock" not in uniform
    assert set(dense["clock"]["variants_ms"]) == {"eager", "compile", "linear_cross_entropy"}
    assert len(mine["clock"]["ms_step"]) == 3 and min(mine["clock"]["ms_step"]) > 0
    assert mine["clock"]["start_ms"] > 0 == dense["clock"]["start_ms"]  # the tables
    assert "s to dense's best" in printed


def test_seconds_at_a_step(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from clock import seconds_at

    entry = {"settings": {"steps": 300}, "clock": {"ms_step": [1, 2, 4], "start_ms": 50}}
    assert [seconds_at(entry, step) for step in (50, 150, 300)] == [0.1, 0.25, 0.75]
    assert seconds_at({"clock": {"seconds": 3.5}}, 1) == 3.5


def test_clock_takes_whole_periods(monkeypatch):
    """What a rehash costs is spread over the steps from one to the next, and a rebuild is not met."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import clock

    now = [0.0]

    class Training:
        def __init__(self, *_):
            self.head = SimpleNamespace(linear=SimpleNamespace(tables=tables))

        def load(self, _):
            pass

        def batches(self):
            while True:
                yield (None, None)

        def step(self, *_):
            now[0] += 1.0
            tables.steps += 1
            if tables.steps % 30 == 0:
                tables.rehashes += 1
                tables.rebuilds += tables.rehashes % 3 == 0
                now[0] += 3000.0 if tables.rehashes % 3 == 0 else 15.0

    tables = SimpleNamespace(has_upkeep=True, steps=0, rehashes=0, rebuilds=0)
    monkeypatch.setattr(clock, "Training", Training)
    monkeypatch.setattr(clock.time, "perf_counter", lambda: now[0])
    entry = {"contender": "lsh", "kind": "lsh", "options": {}, "settings": {}, "seed": 0}
    clocked = clock.Clocked(None, entry, None, None)
    assert [clocked.turn() for _ in range(4)] == [1_500.0] * 4 and tables.steps == 7 * 30
    tables.has_upkeep = False  # no tables, no periods
    assert clock.Clocked(None, entry, None, None).turn() > 0 and tables.steps == 7 * 30 + 2 * 20


@pytest.mark.parametrize("best,tried", [(0.1, {0.005, 0.01, 0.02, 0.05, 0.1, 0.2}), (1e-3, None)])
def test_learning_rates_beyond_those_given(best, tried, monkeypatch):
    """Where the best is the first or the last, the next of 1, 2, 5, 10 on that side; a rate that diverges is
    never the best."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from training import choose_rate

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
    record, printed = record_of(tmp_path, "time_to_accuracy", *arguments)
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
    answer = run("time_to_accuracy.py", *clock)
    assert answer.returncode == 1 and "--clock: expected the states" in answer.stderr


def test_time_to_accuracy_of_label_trees(tmp_path):
    pytest.importorskip("omikuji")
    record, _ = record_of(tmp_path, "time_to_accuracy", "--contender", "omikuji_1")
    (run,) = record["contenders"][0]["runs"]
    assert run["test"]["P@1"] > 0.15  # guessing gives about so much
    record, _ = record_of(tmp_path, "time_to_accuracy", "--clock", "--contender", "omikuji_1")
    assert record["contenders"][0]["clock"]["seconds"] > 0


def test_time_to_accuracy_refuses(tmp_path):
    answer = run("time_to_accuracy.py", "--clock", "--contender", "dense")
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
def test_contender_by_name_or_options(text, message, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from heads import CONTENDERS, parse_contender

    with pytest.raises(ValueError, match=message):
        parse_contender(text)
    assert parse_contender("lsh") is CONTENDERS["lsh"]
    found = parse_contender("mine=family:dwta,budget:64,center:False,rehash_growth:1.5").options
    assert found == {"family": "dwta", "budget": 64, "center": False, "rehash_growth": 1.5}


def test_heads_compute_the_same_loss(monkeypatch):
    """Where every class is active, and for both dense variants: rows of one and of several labels."""
    import torch

    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from heads import Contender, make_head

    torch.manual_seed(0)
    hidden = torch.randn(5, 8)
    labels = torch.tensor([[3, -100], [1, 7], [-100, -100], [11, 0], [4, -100]])
    losses, gradients = [], []
    for contender, variant in (
        (Contender("a", "dense"), "eager"),
        (Contender("b", "dense"), "linear_cross_entropy"),
        (Contender("c", "sampled", {"exact": 12}), None),
        (Contender("d", "sampled", {"exact": 12, "drawn": 4, "corrected": True}), None),
        (Contender("e", "lsh", {"budget": 12}), None),
    ):
        torch.manual_seed(1)
        head = make_head(contender, torch.nn.Linear(8, 12), variant)
        loss = head.loss(hidden, labels)
        loss.backward()
        losses.append(loss.detach())
        gradients.append(head.linear.weight.grad.to_dense())
    for loss, gradient in zip(losses[1:], gradients[1:], strict=True):
        torch.testing.assert_close(loss, losses[0])
        torch.testing.assert_close(gradient, gradients[0])


def test_corrected_tail_estimates_the_full_softmax(monkeypatch):
    import torch

    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from heads import SampledHead
    from torch import nn

    torch.manual_seed(0)
    linear, hidden, labels = (
        nn.Linear(8, 1000),
        torch.randn(4, 8),
        torch.tensor([[1], [2], [3], [4]]),
    )
    full = nn.functional.cross_entropy(linear(hidden), labels[:, 0])
    corrected = SampledHead(linear, drawn=200, corrected=True)
    mean = torch.stack([corrected.loss(hidden, labels).detach() for _ in range(200)]).mean()
    assert abs(mean - full) < 0.01
    assert abs(SampledHead(linear, drawn=200).loss(hidden, labels) - full) > 1
