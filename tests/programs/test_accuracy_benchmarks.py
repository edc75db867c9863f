"""The benchmarks of accuracy as commands, on tiny sizes; what their contenders compute."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import ROOT
from torch import nn

from benchmarks.accuracy import contenders, query_tails, step_timing
from benchmarks.accuracy.contenders import CONTENDERS, make_output_layer, parse_contender
from benchmarks.accuracy.head_optimizers import OPTIMIZERS
from benchmarks.accuracy.output_layers import SampledLayer
from benchmarks.accuracy.record import seconds_at
from benchmarks.accuracy.training import choose_rate
from benchmarks.common import places_model
from examples.common.likelihood import log_frequency
from slide_torch import LSHLinear, LSHOptions
from slide_torch.data import read_xmc
from slide_torch.options import FAMILIES


def test_equal_steps(record_of, tmp_path):
    record_of("accuracy.equal_steps", "--head", "dense")
    dense = tmp_path / "dense.json"
    (tmp_path / "equal_steps.json").rename(dense)
    record, printed = record_of("accuracy.equal_steps", "--head", "lsh", "--against", dense)
    assert record["contender"] == "LSHLinear" and "dense torch" in printed
    # twelve labels are fewer than the tail: every neuron is active, and the heads are the same model
    other = json.loads(dense.read_text())
    assert [p["validation_p1"] for p in record["curve"]] == [
        p["validation_p1"] for p in other["curve"]
    ]


def test_head_optimizers(record_of):
    record, printed = record_of("accuracy.head_optimizers")
    runs = {run["optimizer"]: run for run in record["optimizers"]}
    assert set(runs) == set(OPTIMIZERS) and all(name in printed for name in runs)
    for run in runs.values():
        tried = {trial["lr"]: trial["P@1"] for trial in run["trials"]}
        assert tried[run["lr"]] == max(tried.values()) == run["validation"]["P@1"]
        assert len(tried) == 2 and 0 <= run["test"]["P@1"] <= 1 and run["ms_step"] > 0
    # of 128 weights and a bias in float32
    state = {name: run["state_bytes_per_neuron"] for name, run in runs.items()}
    assert state["Adam"] == 2 * 4 * 129 == 2 * state["Adam, bfloat16 moments"]
    assert state["Adagrad"] == 4 * 129 and state["row-wise Adagrad"] == 4 * 2


def test_retrieval_measures_every_family(record_of):
    record, _ = record_of("accuracy.retrieval")
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


def test_sampling(record_of):
    record, printed = record_of("accuracy.sampling")
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


def test_query_tails(record_of, refusal, tmp_path):
    text = tmp_path / "text.txt"
    lines = [" ".join(f"w{(start + i) % 13}" for i in range(70)) for start in range(60)]
    text.write_text("\n\n".join(lines))
    arguments = ("--text", text, "--draws", 4, 8, "--seeds", 2)
    record, printed = record_of("accuracy.query_tails", *arguments)
    found = {(r["sampler"], r["draws"]): r for r in record["samplers"]}
    assert len(found) == len(record["samplers"]) == 2 * len(query_tails.SAMPLERS)
    for (sampler, draws), r in found.items():
        assert sampler in printed and r["weight_gradient_of_mean"] > 0
        assert r["weight_gradient_of_mean"] <= r["weight_gradient_rms"] * 1.001
        trained = next(s.trained for s in query_tails.SAMPLERS if s.name == sampler)
        assert len(r.get("perplexity", ())) == 2 * trained
        if trained:
            assert all(1 < value < 30 for value in r["perplexity"])
            assert all(draws <= rows <= 15 for rows in r["active_rows"])
            own = zip(r["proposal_ms_step"], r["ms_step"], strict=True)
            assert all((0 < part < whole) == (sampler != "log-uniform") for part, whole in own)
    assert "--repeats" in refusal("benchmarks.accuracy.query_tails", "--repeats", 1)


def test_query_tails_of_tables_are_the_softmax_where_buckets_hold_equal_rows():
    generator = torch.Generator().manual_seed(0)
    words, counts = 64, np.arange(64, 0, -1)
    layer = LSHLinear(8, words, sparse=True, options=LSHOptions(**query_tails.options_of(draws=20)))
    with torch.no_grad():
        layer.weight.copy_(torch.randn(4, 8, generator=generator).repeat(words // 4, 1))
        layer.bias.copy_(torch.randn(4, generator=generator).repeat(words // 4))
    problem = SimpleNamespace(num_labels=words, log_frequency=log_frequency(counts))
    hidden = torch.randn(5, 8, generator=generator)
    softmax = F.linear(hidden, layer.weight, layer.bias).softmax(1).detach()
    own = softmax.square().mean(0).sqrt().double()
    rank = torch.arange(1.0, words + 1, dtype=torch.float64)
    expected = 0.75 * own / own.sum() + 0.25 * (1 / rank).log1p() / math.log(words + 1)
    for kind in ("tables", "exact"):
        query_tails.Proposal(query_tails.Sampler(kind, 0.75), problem).attach(layer)
        layer(hidden)
        shares = layer.tables.tail.frequencies
        torch.testing.assert_close(shares / shares.sum(), expected, rtol=1e-4, atol=0)


def test_time_to_accuracy(record_of):
    names = ["dense", "uniform_1024", "lsh", "mine=budget:2,tail:2,family:dwta"]
    arguments = [word for name in names[:3] for word in ("--contender", name)]
    record, printed = record_of("accuracy.time_to_accuracy", *arguments)
    assert [e["contender"] for e in record["contenders"]] == names[:3]
    for entry in record["contenders"]:
        tried = {(t["lr"], t["decay"]): t["P@1"] for t in entry["trials"]}
        chosen = entry["settings"]["lr"], entry["settings"]["decay"]
        # two rates, and the better one with the other decay
        assert tried[chosen] == max(tried.values()) and len(tried) == 3
        (run,) = entry["runs"]
        # the trial that was best is the run
        assert run["curve"][-1]["step"] == entry["settings"]["steps"]
        assert run["curve"][-1]["P@1"] == max(tried.values())
        # the warm start, the same for all, is far above guessing
        assert run["curve"][0] == record["contenders"][0]["runs"][0]["curve"][0]
        assert run["curve"][0]["step"] == 0 and run["curve"][0]["P@1"] > 0.4
        assert entry["contender"] in printed and 0 <= run["test"]["P@1"] <= 1
        assert "clock" not in entry
    # with all twelve classes active, every head is the same model
    dense, _, lsh = (e["runs"][0]["classes_a_step"] for e in record["contenders"])
    assert dense == lsh == 12
    # another call adds its contender and the seed that is missing, and trains nothing else
    trained = record["contenders"]
    record, _ = record_of(
        *("accuracy.time_to_accuracy", "--seeds", 2),
        *("--contender", names[3], "--contender", "lsh"),
    )
    assert [e["contender"] for e in record["contenders"]] == [*names[:3], "mine"]
    assert record["contenders"][3]["options"] == {"budget": 2, "tail": 2, "family": "dwta"}
    assert record["contenders"][0] == trained[0]
    first, second = record["contenders"][2]["runs"]
    assert first == trained[2]["runs"][0] and second["seed"] == 4

    record, printed = record_of(
        *("accuracy.time_to_accuracy", "--clock", "--turns", 2),
        *("--contender", "dense", "--contender", names[3]),
    )
    dense, uniform, _, mine = record["contenders"]
    assert "clock" not in uniform
    assert set(dense["clock"]["variants_ms"]) == {"eager", "compile"}  # of several labels a row
    assert len(mine["clock"]["ms_step"]) == 3 and min(mine["clock"]["ms_step"]) > 0
    assert mine["clock"]["start_ms"] > dense["clock"]["start_ms"] > 0  # the tables; the warm start
    assert "s to dense's best" in printed


def test_time_to_perplexity(record_of, refusal, tmp_path):
    text = tmp_path / "text.txt"
    lines = [" ".join(f"w{(start + i) % 13}" for i in range(70)) for start in range(60)]
    text.write_text("\n".join(lines))
    names = ["dense", "log_uniform_1024", "tail_1024"]
    arguments = [word for name in names for word in ("--contender", name)]
    arguments += ["--problem", "words", "--text", text, "--batch", 64, "--epochs", 1, "--lr", 0.02]
    record, printed = record_of("accuracy.time_to_accuracy", *arguments)
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
    said = refusal("benchmarks.accuracy.time_to_accuracy", *clock)
    assert said.startswith("--clock: expected the states")


def test_time_to_accuracy_of_label_trees(record_of):
    pytest.importorskip("omikuji")
    record, _ = record_of("accuracy.time_to_accuracy", "--contender", "omikuji_1")
    (run,) = record["contenders"][0]["runs"]
    assert run["test"]["P@1"] > 0.15  # guessing gives about so much
    record, _ = record_of("accuracy.time_to_accuracy", "--clock", "--contender", "omikuji_1")
    assert record["contenders"][0]["clock"]["seconds"] > 0


def test_recipe_beside_label_trees(record_of):
    pytest.importorskip("omikuji")
    options = ("--options", "budget:8,probes:4", "--tree-turns", 1)
    record, printed = record_of("accuracy.recipe", "--seeds", 2, "--decay", 0, *options)
    assert {name: len(runs) for name, runs in record["runs"].items()} == {
        "recipe": 2,
        "omikuji_1": 1,
        "omikuji_3": 1,
    }
    assert record["options"] == {"budget": 8, "probes": 4}
    assert record["recipe"]["decay"] == 0 and record["choosing_seconds"] > 0
    assert [run["seed"] for run in record["runs"]["recipe"]] == [3, 4]
    for run in record["runs"]["recipe"]:
        assert run["P@1"] > 0.5 and f"lr={record['recipe']['lr']}" in printed


def test_recipe_refuses_options(refusal):
    said = refusal("benchmarks.accuracy.recipe", "--options", "buckets:3")
    assert "--options: expected option:value of" in said


def test_time_to_accuracy_refuses(refusal):
    said = refusal("benchmarks.accuracy.time_to_accuracy", "--clock", "--contender", "dense")
    assert "--clock: expected --json" in said


def test_seconds_at_a_step():
    entry = {"settings": {"steps": 300}, "clock": {"ms_step": [1, 2, 4], "start_ms": 50}}
    assert [seconds_at(entry, step) for step in (50, 150, 300)] == [0.1, 0.25, 0.75]
    assert seconds_at({"clock": {"seconds": 3.5}}, 1) == 3.5


def test_clock_takes_whole_periods(monkeypatch):
    """What a rehash costs is spread over the steps from one to the next, and a rebuild is not met. Without
    tables a turn has 20 steps, or 5 where they are slow."""
    now, pace = [0.0], [1.0]

    class Training:
        def __init__(self, *_):
            self.output = SimpleNamespace(linear=SimpleNamespace(tables=tables))

        def load(self, _):
            pass

        def batches(self):
            while True:
                yield (None, None)

        def step(self, *_):
            now[0] += pace[0]
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
    for pace[0], steps in ((1.0, 5), (0.01, 20)):
        before = schedule.steps
        assert step_timing.Clocked(None, entry, None, None).turn() > 0
        assert schedule.steps - before == 2 * steps


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


@pytest.mark.parametrize("several", [False, True])
def test_output_layers_compute_the_same_loss(several):
    """Decoupled softmax, where every class is active: rows of one and of several labels."""
    torch.manual_seed(0)
    hidden = torch.randn(5, 8)
    labels = torch.tensor([[3, -100], [1, 7], [-100, -100], [11, 0], [4, -100]])
    labels = labels if several else labels[:, :1]
    losses, gradients = [], []
    for contender, variant in (
        (contenders.Contender("a", "dense"), "eager"),
        (contenders.Contender("b", "dense"), "linear_cross_entropy"),
        (contenders.Contender("c", "sampled", {"exact": 12}), None),
        (contenders.Contender("d", "sampled", {"exact": 12, "drawn": 4, "corrected": True}), None),
        (contenders.Contender("e", "lsh", {"budget": 12}), None),
    ):
        if variant not in contenders.variants_of(
            contender.kind, contender.options, several_labels=several
        ):
            assert several and variant == "linear_cross_entropy"
            continue
        torch.manual_seed(1)
        layer = make_output_layer(contender, torch.nn.Linear(8, 12), variant)
        loss = layer.loss(hidden, labels)
        loss.backward()
        losses.append(loss.detach())
        gradients.append(layer.linear.weight.grad.to_dense())
    with torch.no_grad():
        terms = []
        for logits, own in zip(layer.linear.eval()(hidden), labels.tolist(), strict=True):
            own = [label for label in own if label >= 0]
            others = logits[[label for label in range(12) if label not in own]]
            one = [torch.cat([logits[[label]], others]).log_softmax(0)[0] for label in own]
            terms += [-sum(one) / len(one)] if one else []
    torch.testing.assert_close(losses[0], torch.stack(terms).mean())
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
