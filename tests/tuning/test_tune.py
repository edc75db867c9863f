"""tune and RecallProbe: what they report, against brute force; that they change nothing."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from slide_torch import LSHLinear, LSHOptions, RecallProbe, sampler_state, tune
from slide_torch.optim import Adam
from slide_torch.sampling.candidates import candidates
from slide_torch.sampling.recall import Exact, found_among, softmax_mass
from slide_torch.tables.hash_tables import HashTables

N, d = 2000, 24


def clustered(options=None, queries=200, **arguments):
    """A layer whose rows lie about 40 heads, and inputs near heads."""
    heads = torch.randn(40, 1, d)
    layer = LSHLinear(d, N, options=options, **arguments)
    with torch.no_grad():
        layer.weight.copy_((heads + 0.5 * torch.randn(40, N // 40, d)).view(N, d))
    return layer, heads[torch.randint(40, (queries,)), 0] + 0.2 * torch.randn(queries, d)


def brute_force(layer, options, x, k, seed):
    """Recall, mass, ids read of tables made as tune makes its first ones."""
    generator = torch.Generator().manual_seed(seed)
    torch.randperm(x.shape[0], generator=generator)
    tables = HashTables(options, N, d, has_bias=True)
    weight, bias = layer.weight.detach(), layer.bias.detach()
    tables.rebuild(weight, bias, generator=generator)
    tables.rehash(weight, bias)
    order = torch.randperm(x.shape[0], generator=torch.Generator().manual_seed(seed))
    x = x[order[: x.shape[0] // 2]]
    offsets, ids = candidates(tables, weight, bias, x)
    logits = F.linear(x, weight, bias)
    hits = mass = read = 0
    codes = tables.family.query_codes(x, tables.options.probes)
    for i, row in enumerate(logits):
        own = set(ids[offsets[i] : offsets[i + 1]].tolist())
        hits += len(own & set(row.topk(k).indices.tolist())) / k
        mass += row.softmax(0)[list(own)].sum().item()
        for place, code in enumerate(codes[:, i].tolist()):
            mine = tables.codes[place // tables.options.probes] == code
            read += 0 if code < 0 else min(int(mine.sum()), tables.options.bucket_cap)
    return hits / len(x), mass / len(x), read / len(x)


@pytest.mark.parametrize(
    "options",
    [
        LSHOptions(K=5, L=8, budget=40, tail=0),
        LSHOptions(K=5, L=4, probes=3, budget=20, rerank=100, tail=0, augment_norms=True),
        LSHOptions(family="kmeans", K=5, probes=2, budget=16, bucket_cap=50),
        LSHOptions(family="dwta", K=1, L=6, bin_size=4, budget=30, pattern="per_sample"),
    ],
)
def test_measures_what_brute_force_finds(options):
    layer, x = clustered(queries=120)  # 60 to choose on: one block, for ties go by the place in it
    result = tune(layer, x, 0.5, settings=[options], seed=3)
    (found,) = result.measured
    expected = brute_force(layer, options, x, 10, 3)
    assert (found.recall, found.softmax_mass) == pytest.approx(expected[:2], abs=1e-4)
    assert found.ids_read == expected[2]
    assert found.options == options.resolve(N, d)
    assert result.options == found.options.unresolved()
    assert options.budget / 2 < found.rows_touched <= max(options.budget, found.options.rerank)
    assert found.cost > found.us_query > 0 and found.build_seconds > 0 < found.rehash_seconds


def test_finds_a_setting_that_reaches_the_recall_on_held_out_inputs():
    layer, x = clustered(LSHOptions(budget=20, schedule="drift", correction="importance"))
    result = tune(layer, x, 0.9, families=["kmeans", "simhash"])
    assert result.reached and result.recall >= 0.9 and result.held_out == 100
    assert {m.options.family for m in result.measured} == {"kmeans", "simhash"}
    # what is no matter of retrieval is the layer's
    for name in ("budget", "schedule", "correction", "pattern", "tail"):
        assert getattr(result.options, name) == getattr(layer.options.resolve(N, d), name)
    good = [m.options.unresolved() for m in result.measured if m.recall >= 0.9]
    assert result.options in good
    tuned = LSHLinear.from_linear(layer.to_linear(), options=result.options)
    assert tuned.recall(x, 10) > 0.8
    printed = str(result)
    assert printed.count("\n") == len(result.measured) + 2
    assert "reached 0.9: family=" in printed and "100 held-out inputs" in printed


def test_chooses_the_cheapest_of_those_that_reach_the_recall():
    """The recalls lie so far from what is asked for that held-out inputs cannot change the choice. Which good
    setting is the cheapest is a matter of measured time."""
    layer, x = clustered()
    common = dict(family="kmeans", K=5, tail=0, budget=20)
    costly = [LSHOptions(**common, probes=probes, bucket_cap=N) for probes in (32, 24, 4)]
    too_few = LSHOptions(family="simhash", K=12, L=1, tail=0, budget=20)
    result = tune(layer, x, 0.5, settings=[too_few, *costly])
    missed, *good = result.measured
    assert all(m.recall > 0.8 for m in good) and missed.recall < 0.3
    assert result.reached and result.options == min(good, key=lambda m: m.cost).options.unresolved()


def test_says_so_where_no_setting_reaches_the_recall():
    layer, x = clustered(queries=40)
    settings = [LSHOptions(K=9, L=2), LSHOptions(K=9, L=8)]
    result = tune(layer, x, 1.0, settings=settings)
    assert not result.reached and result.held_out == 0
    assert result.options == settings[1].resolve(N, d).unresolved()
    assert result.recall == max(m.recall for m in result.measured) < 1
    assert "NO SETTING REACHED 1" in str(result) and "inputs of the choice" in str(result)


def test_the_time_limit_leaves_settings_out():
    layer, x = clustered()
    result = tune(layer, x, 0.9, seconds=1e-9)
    assert len(result.measured) == 1 and result.untried > 10
    assert f"{result.untried} settings left out" in str(result)


def test_tune_changes_nothing_and_repeats():
    layer, x = clustered(sparse=True)
    F.cross_entropy(layer(x[:8]), torch.arange(8)).backward()
    before = sampler_state(layer)[""]
    rng, weight, stats = torch.get_rng_state(), layer.weight.detach().clone(), layer.stats()
    one, two = (tune(layer, x.requires_grad_(), 0.9, families=["kmeans"], seed=5) for _ in range(2))
    timed = {"us_query", "build_seconds", "rehash_seconds", "cost"}
    found = [
        [{k: v for k, v in vars(m).items() if k not in timed} for m in r.measured]
        for r in (one, two)
    ]
    assert found[0] == found[1]
    assert torch.equal(torch.get_rng_state(), rng) and torch.equal(layer.weight, weight)
    assert layer.stats() == stats and layer.training and layer.weight.grad is not None
    after = sampler_state(layer)[""]
    assert after["schedule"] == before["schedule"] and torch.equal(after["codes"], before["codes"])


def test_tune_takes_float64_and_no_bias_and_few_neurons():
    layer = LSHLinear(8, 60, bias=False, dtype=torch.float64, options=LSHOptions(tail=4))
    result = tune(layer, torch.randn(5, 3, 8, dtype=torch.float64), 0.5, seconds=2)
    assert 0 < result.recall <= 1


@pytest.mark.parametrize(
    "arguments,message",
    [
        (dict(layer=nn.Linear(d, N)), "layer: expected an LSHLinear.*got Linear"),
        (dict(inputs=torch.randn(3, d + 1)), f"inputs: .*last dimension {d}.*got \\(3, {d + 1}\\)"),
        (dict(inputs=torch.randn(3, d).double()), "inputs: expected torch.float32"),
        (dict(inputs=torch.randn(0, d)), "inputs: expected at least one"),
        (dict(inputs=torch.full((3, d), float("inf"))), "inputs: expected finite"),
        (dict(recall=0), "recall: .*got 0"),
        (dict(recall=1.1), "recall: .*got 1.1"),
        (dict(k=0), f"k: expected an int from 1 to {N}"),
        (dict(k=17), "k: expected at most the budget, 10"),
        (dict(queries=0), "queries: expected an int of at least 1, got 0"),
        (dict(batch=1.5), "batch: expected an int"),
        (dict(seconds=0), "seconds: expected a number above 0"),
        (dict(families=[]), "families: expected one or more of"),
        (dict(families="kmeans"), "families: expected one or more of"),
        (dict(families=["faiss"]), "families: .*faiss"),
        (dict(settings=[]), "settings: expected one or more LSHOptions"),
        (dict(settings=[{"K": 3}]), "settings: expected one or more LSHOptions"),
        (dict(settings=[LSHOptions(budget=N)]), "settings: .*budget=2000.*all or none"),
        (dict(settings=[LSHOptions(family="exact")]), "settings: .*family='exact'.*without tables"),
        (dict(layer=LSHLinear(d, N, options=LSHOptions(budget=0))), "layer: .*budget=0"),
    ],
)
def test_tune_refuses(arguments, message):
    call = dict(layer=LSHLinear(d, N), inputs=torch.randn(3, d), recall=0.9) | arguments
    with pytest.raises(ValueError, match="tune: " + message):
        tune(call.pop("layer"), call.pop("inputs"), **call)


def test_tune_refuses_broken_weights():
    layer, x = clustered()
    with torch.no_grad():
        layer.weight[7, 3] = float("nan")
    with pytest.raises(ValueError, match=r"NaN or Inf in 1 of them \(7\)"):
        tune(layer, x)


# --- watching ----------------------------------------------------------------------------------------


def train(layer, x, steps, probe=None):
    torch.manual_seed(1)
    optimizer = Adam(layer.parameters(), lr=0.01)
    seen = []
    for step in range(steps):
        batch = x[8 * step : 8 * step + 8]
        loss = F.cross_entropy(layer(batch), torch.arange(8))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen.append(dict(probe.last) if probe else {})
    return seen


def test_probe_measures_every_so_many_steps_and_changes_nothing():
    options = LSHOptions(budget=20, K=4, L=10, rehash_every=3)
    watched, x = clustered(options, sparse=True)
    plain = LSHLinear.from_linear(nn.Linear(d, N), options=options, sparse=True)
    plain.load_state_dict(watched.state_dict())
    train(plain, x, 12)
    with RecallProbe(watched, every=4, k=5, rows=3) as probe:
        seen = train(watched, x, 12, probe)
    assert torch.equal(plain.weight, watched.weight) and probe.steps == 12
    counted = {k: v for k, v in watched.stats().items() if k != "upkeep_seconds"}
    assert counted == {k: v for k, v in plain.stats().items() if k != "upkeep_seconds"}
    assert seen[:3] == [{}] * 3 and seen[3] == seen[6] != seen[7] != seen[11]
    assert seen[3].keys() == {"recall@5", "softmax_mass"}
    watched(x)  # no longer hooked
    assert probe.steps == 12


def test_probe_equals_brute_force():
    layer, x = clustered(LSHOptions(budget=20, K=4, L=10))
    train(layer, x, 1)
    probe = RecallProbe(layer, rows=30)
    found = probe.measure(layer, x)
    assert found["recall@10"] == pytest.approx(layer.recall(x[:30], 10), abs=1e-6)
    offsets, ids = candidates(layer.tables, layer.weight, layer.bias, x[:30])
    probabilities = F.linear(x[:30], layer.weight, layer.bias).softmax(1)
    mass = sum(probabilities[i, ids[offsets[i] : offsets[i + 1]]].sum() for i in range(30)) / 30
    assert found["softmax_mass"] == pytest.approx(mass.item(), abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_recall_and_mass_of_every_row_and_of_none(dtype):
    """Recall has one definition: layer, probe and brute force find the same."""
    layer, x = clustered(LSHOptions(budget=20, K=4, L=10), dtype=dtype)
    x = x.to(dtype)
    train(layer, x, 1)
    weight, bias = layer.weight.detach(), layer.bias.detach()
    inputs = x[:30].to(torch.promote_types(dtype, torch.float32))
    exact = Exact.of(weight, bias, inputs, 10)
    offsets, ids = candidates(layer.tables, weight, bias, inputs)
    found = found_among(exact.top, offsets, ids, N)
    rows = [ids[offsets[i] : offsets[i + 1]].tolist() for i in range(30)]
    assert found.tolist() == [
        [top in own for top in tops] for tops, own in zip(exact.top.tolist(), rows, strict=True)
    ]
    recall = pytest.approx(found.double().mean().item(), abs=1e-6)
    assert RecallProbe(layer, rows=30).measure(layer, x)["recall@10"] == recall
    assert layer.recall(x[:30], 10) == recall
    everything = torch.arange(N).repeat(30)
    arguments = weight, bias, inputs, exact.log_normalizer
    mass = softmax_mass(*arguments, torch.arange(31) * N, everything)
    assert mass.tolist() == pytest.approx([1.0] * 30, rel=1e-4)
    none = softmax_mass(*arguments, torch.zeros(31, dtype=torch.int64), everything[:0])
    assert none.tolist() == [0.0] * 30


def test_probe_of_layers_that_look_nothing_up():
    for budget, expected in ((0, 0.0), (N, 1.0)):
        layer, x = clustered(LSHOptions(budget=budget))
        with RecallProbe(layer, every=1) as probe:
            layer.eval()
            layer(x)
            assert probe.steps == 0
            layer.train()
            layer(x.view(2, 100, d))
        assert probe.last == {"recall@10": expected, "softmax_mass": expected}


@pytest.mark.parametrize(
    "arguments,message",
    [
        (dict(layer=nn.Linear(d, N)), "layer: expected an LSHLinear, got Linear"),
        (dict(every=0), "every: expected an int of at least 1, got 0"),
        (dict(k=N + 1), f"k: expected an int from 1 to {N}, got {N + 1}"),
        (dict(rows=True), "rows: expected an int of at least 1, got True"),
    ],
)
def test_probe_refuses(arguments, message):
    call = dict(layer=LSHLinear(d, N)) | arguments
    with pytest.raises(ValueError, match="RecallProbe: " + message):
        RecallProbe(call.pop("layer"), **call)


def test_probe_with_tqdm_and_tensorboard(tmp_path):
    """The loop of docs/choosing.md."""
    from tqdm import tqdm

    layer, x = clustered()
    train(layer, x, 1)
    probe = RecallProbe(layer, every=1)
    layer(x[:8])
    with tqdm(total=1, file=(tmp_path / "bar").open("w")) as bar:
        bar.set_postfix(probe.last)
        assert "recall@10=" in str(bar) and "softmax_mass=" in str(bar)
    pytest.importorskip("tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path / "runs")) as writer:
        for name, value in (layer.stats() | probe.last).items():
            writer.add_scalar(f"lsh/{name}", value, probe.steps)
    (events,) = (tmp_path / "runs").iterdir()
    assert b"lsh/recall@10" in events.read_bytes()


def test_results_are_plain_records():
    layer, x = clustered()
    result = tune(layer, x, 0.2, settings=[LSHOptions()])
    assert dataclasses.asdict(result)["measured"][0]["options"]["family"] == "kmeans"
