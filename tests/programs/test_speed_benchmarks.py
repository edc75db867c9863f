"""The benchmarks of speed as commands, on tiny sizes: they run, and write the record that they print."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch

from benchmarks.accuracy.load import load_problem
from benchmarks.accuracy.time_to_accuracy import TINY
from benchmarks.common.relu_classifier import ReLUClassifier, loss_of
from benchmarks.speed import gpu_training, prediction, prediction_sweep
from benchmarks.speed.gpu_contenders import WAYS, DenseTrainer, Device, on_device
from benchmarks.speed.step_contenders import PHASES, Contender
from benchmarks.speed.step_turns import summary
from examples.common.classifier import Classifier
from examples.common.classifier import loss_of as decoupled_softmax
from examples.common.recipe import Recipe, warm_start_
from examples.data import places
from slide_torch import LSHLinear
from slide_torch.data import batches


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


def test_gpu_on_the_cpu(record_of):
    """What would run on a GPU, and what runs beside it."""
    record, printed = record_of("speed.gpu", "--device", "cpu")
    dense = [name for name, way in WAYS.items() if not way.compiled]
    names = [step["contender"] for step in record["steps"]]
    assert names == [*dense, "lsh_shared", "lsh_per_sample"] and not record["failed_steps"]
    best = min(step["ms_step"] for step in record["steps"][: len(dense)])
    for step in record["steps"]:
        assert step["batch"] == 8 and step["contender"] in printed
        assert step["times_best_dense"] == pytest.approx(best / step["ms_step"])
    runs = record["runs"]
    assert [run["contender"] for run in runs] == ["LSHLinear", "dense_tf32", "dense_bf16_sparse"]
    assert not record["failed_runs"]
    for run in runs:
        last = run["curve"][-1]
        seconds = [point["seconds"] for point in run["curve"]]
        assert [point["step"] for point in run["curve"]] == [6, 12, 18, 24]  # 48 rows, batches of 8
        assert 0 < run["start_seconds"] < seconds[0] and seconds == sorted(seconds)
        tried = {(trial["lr"], trial["decay"]): trial["P@1"] for trial in run["trials"]}
        assert tried[run["lr"], run["decay"]] == max(tried.values()) == last["P@1"]
        assert last["P@1"] > 0.5 and run["test"]["P@1"] > 0.5  # guessing gives a sixth
    best = [max(point["P@1"] for point in run["curve"]) for run in runs]
    assert record["equal_P@1"] == min(best) and f"s to P@1 {min(best):.4f}" in printed


def test_gpu_without_a_gpu(run, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    printed = run("benchmarks.speed.gpu", "--json", tmp_path / "gpu.json")
    assert printed.count("\n") == 1 and "finds no CUDA device" in printed
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", [name for name, way in WAYS.items() if not way.compiled])
def test_gpu_contenders_compute_the_same_step(name):
    """Rows of one label, so that it is the first one too; padding changes nothing."""
    device, batch = Device("cpu"), (torch.tensor([0, 3, 5, 1]), torch.tensor([0, 1, 3, 4]))
    batch += (torch.tensor([1.0, 0.5, 0.25, 1.0]), torch.tensor([[3], [7], [0]]))
    found = []
    for way, width in ((WAYS["dense_fp32"], 1), (WAYS[name], 4)):
        torch.manual_seed(0)
        model = ReLUClassifier(6, 16, torch.nn.Linear(16, 40))
        trainer = DenseTrainer(model, way, loss_of, device, lr=0.1)
        trainer.warm_up(on_device(batch, width, device))
        before = [parameter.detach().clone() for parameter in model.parameters()]
        loss = trainer.step(on_device(batch, width, device), 0.5)
        gradients = [parameter.grad.to_dense() for parameter in model.parameters()]
        found.append((loss.float(), gradients))
        # Adam's first step is the rate, towards the sign of the gradient
        for old, parameter, gradient in zip(before, model.parameters(), gradients, strict=True):
            moved = old - parameter.detach()
            torch.testing.assert_close(moved, 0.05 * gradient.sign(), rtol=0, atol=2e-3)
        assert model.embedding.weight.grad.is_sparse == way.sparse
    (expected, true), (loss, gradients) = found
    narrow = WAYS[name].bf16 or WAYS[name].chunked
    torch.testing.assert_close(loss, expected, rtol=2e-2 if narrow else 1e-6, atol=0)
    for own, other in zip(gradients, true, strict=True):
        error = (own - other).norm() / other.norm()
        assert error < (2e-2 if narrow else 1e-6)


def test_gpu_training_is_the_plain_loop():
    """The recipe's batches and start, a rate that falls to 0, decay of the output layer alone."""
    files = (TINY / "tiny_train.txt", TINY / "tiny_test.txt")
    problem = load_problem("xmc", files=files, validation_rows=12)
    recipe = Recipe(batch=10, lr=0.02, decay=0.5, seed=3, epochs=2.0)
    found = gpu_training.Dense(problem, 3, Device("cpu")).train(WAYS["dense_fp32"], recipe, 3)
    assert [step for _, step, _ in found.curve] == [4, 7, 10]

    torch.manual_seed(3)
    head = torch.nn.Linear(128, problem.num_labels)
    model = Classifier(problem.num_features, 128, head)
    rows = problem.parts["train"]
    warm_start_(model, rows, 3, progress=False)
    model.embedding.sparse = False
    embedding = torch.optim.Adam(model.embedding.parameters())
    optimizers = [embedding, torch.optim.AdamW(head.parameters(), weight_decay=0.5)]
    step = 0
    for epoch in range(2):
        for *features, labels in batches(rows, 10, seed=3 + epoch):
            model.zero_grad()
            decoupled_softmax(model(*features), labels).backward()
            for optimizer in optimizers:
                optimizer.param_groups[0]["lr"] = 0.02 * (1 - step / 10)
                optimizer.step()
            step += 1
    for name, value in found.model.state_dict().items():
        torch.testing.assert_close(value, model.state_dict()[name], rtol=1e-4, atol=1e-5)


def test_gpu_runs_that_fail_are_not_chosen():
    def train(recipe):
        if recipe.lr == 0.1:
            raise RuntimeError("CUDA out of memory\nmore")
        if recipe.decay == 1.0:
            raise ValueError("diverged before step 3")
        return gpu_training.Outcome([(1.0, 9, recipe.lr)], 0.5, 0.0, None)

    recipe = Recipe(8, 0.0, 0.0, 0, epochs=1)
    (best, outcome), trials = gpu_training.chosen_run(
        train, recipe, [0.01, 0.02, 0.1], [0.0, 1.0], beyond=False
    )
    assert (best.lr, best.decay) == (0.02, 0.0) and outcome.curve[-1][2] == 0.02
    failed = [trial["failed"] for trial in trials if "failed" in trial]
    assert failed == ["CUDA out of memory", "diverged before step 3"] and len(trials) == 4
    found, trials = gpu_training.chosen_run(train, recipe, [0.1], [0.0], beyond=True)
    assert found is None and len(trials) == 1


def test_gpu_seconds_to_equal_precision():
    def run(name, *scores):
        curve = [{"seconds": 10.0 * i, "P@1": score} for i, score in enumerate(scores, 1)]
        return {"contender": name, "curve": curve}

    runs = [run("a", 0.1, 0.5, 0.4), run("b", 0.3, 0.3), run("b", 0.2, 0.45)]
    equal = gpu_training.equal_precision(runs)
    assert equal == 0.45
    assert [gpu_training.seconds_to(one, equal) for one in runs] == [20.0, None, 20.0]


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
