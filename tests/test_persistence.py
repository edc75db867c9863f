"""Saving and going on: files that others read, and runs that resume bit for bit."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from helpers import in_format_1, in_format_2
from torch import nn

import slide_torch
from slide_torch import LSHLinear, LSHOptions, load_sampler_state, sampler_state

N, D, B = 300, 16, 8


def make(seed=0, *, sparse=True, optimizer="slide", **options):
    """A model with dropout (which draws from the same generator as the sampler), and its optimizer."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    options = {"budget": 5, "tail": 6, "K": 3, "L": 4, "rehash_every": 3, **options}
    head = LSHLinear(D, N, options=LSHOptions(**options), sparse=sparse)
    head.set_frequencies(torch.rand(N) + 0.1)
    model = nn.Sequential(nn.Linear(D, D), nn.ReLU(), nn.Dropout(0.2), head)
    make_optimizer = {
        "slide": slide_torch.optim.Adam,
        "sgd": lambda p, lr: slide_torch.optim.SGD(p, lr=lr, momentum=0.9),
        "adagrad": slide_torch.optim.Adagrad,
        "torch": torch.optim.AdamW,
    }[optimizer]
    return model, make_optimizer(model.parameters(), lr=0.05)


def train(model, optimizer, steps):
    data = torch.Generator()
    losses = []
    for step in steps:
        data.manual_seed(step)
        x, y = torch.randn(B, D, generator=data), torch.randint(N, (B,), generator=data)
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.tensor(losses)


def through_a_file(content):
    file = io.BytesIO()
    torch.save(content, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def checkpoint(model, optimizer):
    return through_a_file(
        {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "sampler": sampler_state(model),
            "rng": torch.get_rng_state(),
        }
    )


def restore(model, optimizer, saved):
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    load_sampler_state(model, saved["sampler"])
    torch.set_rng_state(saved["rng"])


CASES = {
    "shared": {},
    "per_sample": {"pattern": "per_sample", "correction": "importance"},
    "dwta": {"family": "dwta", "K": 1, "rebuild_every": 2},
    "gaussian": {"projection": "gaussian", "rebuild_every": 2},
    "hadamard": {"projection": "hadamard", "probes": 2},
    "kmeans": {"family": "kmeans", "L": 2, "probes": 2, "rerank": 20, "rebuild_every": 3},
    "search": {"family": "kmeans", "L": 1, "probes": 3, "rerank": 20},
    "augment_norms": {"augment_norms": True, "rebuild_every": 3},
    "drift": {"schedule": "drift", "drift": 0.01, "rehash_every": 2, "rebuild_every": 3},
    "drift_kmeans": {"family": "kmeans", "schedule": "drift", "drift": 0.02, "rehash_every": 2},
    "dense_gradients": {"sparse": False, "optimizer": "torch"},
    "sgd": {"optimizer": "sgd"},
    "adagrad": {"optimizer": "adagrad", "rehash_growth": 1.5},
    "no_tables": {"budget": 0},
    "every_neuron": {"budget": N},
    "frequencies": {"tail_distribution": "frequencies", "correction": "importance"},
    "tail_alone": {"tail_distribution": "log_uniform", "budget": 0},
    "exact_candidates": {"family": "exact"},
}


@pytest.mark.parametrize("stop", [0, 1, 4, 7, 9])
@pytest.mark.parametrize("case", CASES)
def test_a_resumed_run_equals_the_uninterrupted_one(case, stop):
    model, optimizer = make(**CASES[case])
    train(model, optimizer, range(stop))
    saved = checkpoint(model, optimizer)
    expected_losses = train(model, optimizer, range(stop, 16))
    random_state = torch.get_rng_state()

    other, other_optimizer = make(seed=1, **CASES[case])
    train(other, other_optimizer, range(50, 53))  # leaves tables of its own behind
    restore(other, other_optimizer, saved)
    assert torch.equal(train(other, other_optimizer, range(stop, 16)), expected_losses)
    assert all(map(torch.equal, other.parameters(), model.parameters()))
    tables, expected = other[-1].tables, model[-1].tables
    assert tables.tensors().keys() == expected.tensors().keys()
    assert all(map(torch.equal, tables.tensors().values(), expected.tensors().values()))
    ignored = "upkeep_seconds"
    stats, expected_stats = tables.stats(), expected.stats()
    assert stats.pop(ignored) >= 0 and expected_stats.pop(ignored) >= 0
    assert stats == expected_stats
    assert torch.equal(torch.get_rng_state(), random_state)


def test_without_the_sampler_the_run_goes_on_but_not_alike():
    """So the test above can fail; and a state dict alone remains enough to train on."""
    model, optimizer = make()
    train(model, optimizer, range(7))
    saved = checkpoint(model, optimizer)
    expected = train(model, optimizer, range(7, 12))
    other, other_optimizer = make(seed=1)
    saved["sampler"] = sampler_state(other)
    restore(other, other_optimizer, saved)
    found = train(other, other_optimizer, range(7, 12))
    assert found.isfinite().all() and not torch.equal(found, expected)


@pytest.mark.parametrize(
    "case, learnt",
    [
        ("kmeans", {"mean_row", "centroids", "buckets"}),
        ("augment_norms", {"mean_row", "norm_bound"}),
    ],
)
def test_what_was_learnt_from_the_rows_is_saved(case, learnt):
    """Mean row, bound of norms, centroids: a seed alone does not remake them."""
    model, optimizer = make(**CASES[case])
    train(model, optimizer, range(5))
    other, other_optimizer = make(seed=1, **CASES[case])
    restore(other, other_optimizer, checkpoint(model, optimizer))
    own, found = (dict(m[-1].tables.family.named_buffers()) for m in (model, other))
    assert learnt <= own.keys() == found.keys()
    assert all(torch.equal(own[name], found[name]) for name in own)
    weight, bias = model[-1].weight, model[-1].bias
    for one in (model, other):
        one[-1].tables.family.adapt(weight * 2, bias * 2)
    if case == "kmeans":  # fitted: it follows what it saw of the buckets
        assert bool(found["fitted"])
        assert torch.equal(other[-1].tables.family.mean_row, model[-1].tables.family.mean_row)
    else:
        assert other[-1].tables.family.norm_bound > own["norm_bound"]


def test_a_state_without_copies_of_rows_is_completed():
    """One saved before tables kept coded copies of rows to search: they are made at the next use."""
    model, optimizer = make(**CASES["search"])
    train(model, optimizer, range(5))
    saved = checkpoint(model, optimizer)
    saved["sampler"] = {name: in_format_1(each) for name, each in saved["sampler"].items()}
    for state in saved["sampler"].values():
        for name in ("row_codes", "row_terms", "row_places"):
            assert state.pop(name) is not None
    other, other_optimizer = make(seed=1, **CASES["search"])
    restore(other, other_optimizer, saved)
    assert train(other, other_optimizer, range(5, 8)).isfinite().all()
    assert other[-1].tables.sq8 is not None


@pytest.mark.parametrize("to_format", [in_format_1, in_format_2])
def test_rows_in_eight_bits_are_taken_up_in_seven(to_format):
    model, optimizer = make(**CASES["search"])
    train(model, optimizer, range(5))
    model[-1].tables.maintain(model[-1].weight, model[-1].bias, advance=False, all_rows_move=False)
    saved = checkpoint(model, optimizer)
    (name, state), *_ = saved["sampler"].items()
    weight, places = model[-1].weight.detach(), state["sq8_places"].long()
    blocks, pairs = len(state["sq8_codes"]), (D + 1) // 2
    rows, scales = torch.zeros(blocks * 16, 2 * pairs), torch.zeros(blocks * 16)
    scales[places] = weight.abs().amax(1) / 127
    rows[places, :D] = (weight / scales[places, None]).round()
    old = to_format(state)
    codes, terms = ("row_codes", "row_terms") if old["format"] == 1 else ("sq8_codes", "sq8_terms")
    assert old[codes].dtype == torch.int8
    old[codes] = rows.to(torch.int8).view(blocks, 16, pairs, 2).transpose(1, 2).contiguous()
    old[terms] = torch.stack([scales.view(blocks, 16), state["sq8_terms"][:, 1]], 1)
    saved["sampler"] = {name: old}
    other, other_optimizer = make(seed=1, **CASES["search"])
    restore(other, other_optimizer, saved)
    found = other[-1].tables.sq8
    assert found.codes.shape == state["sq8_codes"].shape and torch.equal(
        found.places.long(), places
    )
    coded = found.codes.float().transpose(1, 2).reshape(blocks * 16, -1)[places] - 64
    scale = found.terms[:, 0].reshape(-1, 1)[places]
    assert not coded[:, D:].any()
    assert ((coded[:, :D] * scale - weight).abs() <= 0.76 * scale).all()  # rounded twice
    assert torch.equal(other[-1].tables.codes, model[-1].tables.codes)
    assert train(other, other_optimizer, range(5, 8)).isfinite().all()


def test_resuming_between_backward_and_step():
    """Marks of rows about to change outlive the checkpoint, as they outlive a rehash."""

    def accumulate(model, first, last):
        for i in range(first, last):
            torch.manual_seed(i)
            F.cross_entropy(model(torch.randn(B, D)), torch.randint(N, (B,))).backward()

    model, optimizer = make()
    train(model, optimizer, range(2))
    accumulate(model, 0, 1)
    saved = checkpoint(model, optimizer)
    grads = copy.deepcopy([p.grad for p in model.parameters()])
    other, other_optimizer = make(seed=1)
    restore(other, other_optimizer, saved)
    for p, grad in zip(other.parameters(), grads, strict=True):
        p.grad = grad
    for one, its in ((model, optimizer), (other, other_optimizer)):
        accumulate(one, 1, 3)  # rehashes in between
        assert one[-1].stats()["rehashes"] == 1
        its.step()
    assert torch.equal(model[-1].tables.dirty, other[-1].tables.dirty)
    assert model[-1].tables.dirty.sum() > 6 + B  # of more than the last batch


def test_size_is_that_of_the_codes():
    model, optimizer = make(L=50, K=8)
    train(model, optimizer, range(2))
    file = io.BytesIO()
    torch.save(sampler_state(model), file)
    assert 2 * 50 * N < file.tell() < 2 * 50 * N + 40_000


def test_state_of_several_layers_by_name():
    first, second = make()[0], make()[0]
    model = nn.ModuleDict({"a": first, "b": second, "c": nn.Linear(2, 2)})
    state = sampler_state(model)
    assert list(state) == ["a.3", "b.3"]
    assert list(sampler_state(first[-1])) == [""]
    load_sampler_state(model, state)


def test_what_does_not_fit_changes_nothing():
    model, optimizer = make()
    train(model, optimizer, range(4))
    state = sampler_state(model)
    other, other_optimizer = make(K=4)
    train(other, other_optimizer, range(4))
    before = copy.deepcopy(other[-1].tables.codes), other[-1].tables.schedule.steps
    with pytest.raises(ValueError, match=r"options\.K: expected 4, that of these tables, got 3"):
        load_sampler_state(other, state)
    with pytest.raises(ValueError, match=r"expected that of layers \['0\.3'\], got \['3'\]"):
        load_sampler_state(nn.Sequential(other), state)
    smaller = LSHLinear(D, N - 1, options=LSHOptions(budget=5, tail=6, K=3, L=4))
    with pytest.raises(ValueError, match=r"expected .*, in_features, bias"):
        load_sampler_state(smaller, {"": state["3"]})
    with pytest.raises(ValueError, match=r"format 1 to 3\), got None"):
        load_sampler_state(smaller, {"": {}})
    assert (
        torch.equal(other[-1].tables.codes, before[0])
        and other[-1].tables.schedule.steps == before[1]
    )
    # the schedule and the active set may be chosen anew
    other, _ = make(budget=9, rehash_every=5)
    load_sampler_state(other, state)
    assert other[-1].stats()["steps"] == 4


def test_a_loaded_state_is_a_copy():
    model, optimizer = make()
    train(model, optimizer, range(4))
    state = copy.deepcopy(sampler_state(model))
    kept = copy.deepcopy(state)
    other, other_optimizer = make()
    other.load_state_dict(model.state_dict())
    load_sampler_state(other, state)
    train(other, other_optimizer, range(9))
    assert torch.equal(state["3"]["codes"], kept["3"]["codes"])
    assert torch.equal(state["3"]["dirty"], kept["3"]["dirty"])


def test_a_state_from_before_there_were_frequencies_and_drift():
    model, optimizer = make()
    train(model, optimizer, range(7))
    saved = checkpoint(model, optimizer)
    state = saved["sampler"]["3"] = in_format_1(saved["sampler"]["3"])
    for name in ("probe_codes", "frequencies"):
        del state[name]
    for name in ("drift_checks", "drift"):
        del state["schedule"][name]
    for name in ("schedule", "drift", "tail_distribution"):
        del state["options"][name]
    expected = train(model, optimizer, range(7, 12))
    other, other_optimizer = make(seed=1)
    restore(other, other_optimizer, saved)
    assert torch.equal(train(other, other_optimizer, range(7, 12)), expected)


@pytest.mark.parametrize("direction", ["to_linear", "from_linear"])
def test_safetensors(direction, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    path = tmp_path / "model.safetensors"
    model, optimizer = make()
    train(model, optimizer, range(2))
    plain = nn.Sequential(nn.Linear(D, D), nn.ReLU(), nn.Dropout(0.2), nn.Linear(D, N))
    source, target = (model, plain) if direction == "to_linear" else (plain, model)
    safetensors.save_model(source, path)
    assert safetensors.load_model(target, path) == (set(), [])
    x = torch.randn(B, D)
    assert torch.equal(target.eval()(x), source.eval()(x))
    # a dict of tensors, too
    safetensors.save_file(source.state_dict(), path)
    target.load_state_dict(safetensors.load_file(path), strict=True)
    if direction == "from_linear":
        assert not model[-1].tables.built
        assert train(model.train(), optimizer, range(3)).isfinite().all()


def without(name):
    return lambda state: state.pop(name)


def with_value(name, value):
    return lambda state: state.__setitem__(name, value)


def with_change(name, change):
    return lambda state: state.__setitem__(name, change(state[name]))


def filled(place, value):
    def change(tensor):
        tensor = tensor.clone()
        tensor.view(-1)[place] = value
        return tensor

    return change


def inside(name, damage):
    return lambda state: damage(state[name])


DAMAGES = [
    ("search", without("codes"), "expected the keys .*, got none of codes"),
    ("search", with_value("format", 4), r"format 1 to 3\), got 4"),
    ("search", with_value("seed", -1), r"\['seed'\]: expected an int from 0 .* got -1"),
    ("search", with_value("seed", None), r"\['functions'\]: expected none without a seed"),
    (
        "search",
        with_change("codes", torch.Tensor.int),
        r"\['codes'\]: .*int16 \(1, 300\), got .*int32",
    ),
    (
        "search",
        with_change("codes", filled(7, 8)),
        r"\['codes'\]: expected values from 0 to 7, got",
    ),
    (
        "search",
        with_change("codes", filled(7, -1)),
        r"\['codes'\]: expected values from 0 to 7, got",
    ),
    ("search", with_value("dirty", torch.tensor([N])), r"\['dirty'\]: .* from 0 to 299, got 300"),
    (
        "search",
        with_value("changing", torch.tensor([-1])),
        r"\['changing'\]: expected values from 0",
    ),
    (
        "search",
        with_value("sq8_terms", None),
        r"\['sq8_terms'\]: expected a CPU tensor float32 .* got None",
    ),
    ("search", without("sq8_terms"), "expected the keys .*, got none of sq8_terms"),
    ("search", with_change("sq8_codes", lambda t: t[:9]), r"\['sq8_codes'\]: expected at least 26"),
    ("search", with_change("sq8_places", filled(0, 10**6)), r"\['sq8_places'\]: expected those"),
    ("search", inside("schedule", without("period")), r"\['schedule\.period'\]: .* got None"),
    ("search", inside("schedule", with_value("steps", True)), r"\['schedule.steps'\]: .* got True"),
    ("search", inside("last", with_value("steps", 0.0)), r"\['last'\]: expected the keys active"),
    (
        "search",
        inside("functions", without("mean_row")),
        r"\['functions'\]: expected the keys buckets, ",
    ),
    (
        "search",
        inside("functions", with_change("centroids", filled(3, float("nan")))),
        r"\['functions\.centroids'\]: expected finite values, got NaN or Inf",
    ),
    (
        "search",
        inside("functions", with_change("sizes", filled(0, 1))),
        r"sizes'\]: expected 300 rows",
    ),
    (
        "gaussian",
        inside("functions", without("matrix")),
        r"\['functions'\]: expected the keys matrix, m",
    ),
    (
        "dwta",
        inside("functions", with_change("coordinates", filled(0, D + 1))),
        r"\['functions\.coordinates'\]: expected values from 0 to 16, got 0 to 17",
    ),
    (
        "hadamard",
        inside("functions", with_change("signs", filled(0, 3))),
        r"signs'\]: expected values -1 and 1",
    ),
    (
        "drift",
        with_change("drift_sample_codes", lambda t: t[:, 1:]),
        r"\['drift_sample_codes'\]: .*\(4, 512\)",
    ),
    ("frequencies", with_change("frequencies", filled(9, 0.0)), r"\['frequencies'\]: .*positive"),
]


@pytest.mark.parametrize("case, damage, message", DAMAGES)
def test_damage_is_refused_before_anything_changes(case, damage, message):
    saved, optimizer = make(**CASES[case])
    train(saved, optimizer, range(5))
    state = copy.deepcopy(sampler_state(saved))
    model, optimizer = make(seed=1, **CASES[case])
    train(model, optimizer, range(4))
    # a second layer, whole: what comes first must not be taken up either
    both = nn.ModuleDict({"a": copy.deepcopy(saved), "b": model})
    states = {"a.3": copy.deepcopy(state["3"]), "b.3": state["3"]}
    damage(states["b.3"])
    both["a"][-1].tables.clear()
    before = copy.deepcopy(model[-1].tables.tensors())
    with pytest.raises(ValueError, match="load_sampler_state: .*" + message):
        load_sampler_state(both, states)
    assert not both["a"][-1].tables.built
    after = model[-1].tables.tensors()
    assert after.keys() == before.keys() and all(torch.equal(after[n], before[n]) for n in before)
    assert model[-1].stats()["steps"] == 4
    assert train(model, optimizer, range(4, 9)).isfinite().all()


@pytest.mark.parametrize(
    "option, value",
    [
        ("family", "minhash"),
        ("family", "cross_polytope"),
        ("projection", "sparse"),
        ("tail_distribution", "quadratic_kernel"),
        ("tail_distribution", ["uniform", "quadratic_kernel"]),
    ],
)
@pytest.mark.parametrize("format", [1, 2])
def test_states_of_removed_options_are_refused(option, value, format):
    model, optimizer = make()
    train(model, optimizer, range(4))
    state = copy.deepcopy(sampler_state(model))
    if format == 1:
        state = {name: in_format_1(each) for name, each in state.items()}
    state["3"]["options"][option] = value
    name = value if isinstance(value, str) else value[-1]
    message = rf"options\.{option}: .*got '{name}', which was removed: make the layer with another"
    with pytest.raises(ValueError, match=message):
        load_sampler_state(model, state)
    assert model[-1].stats()["steps"] == 4


@pytest.mark.parametrize(
    "state", [None, [], 7, {"3": None}, {3: {}}, {"3": {"format": torch.ones(2)}}]
)
def test_what_is_no_state_is_refused(state):
    with pytest.raises(ValueError, match="load_sampler_state: state: expected"):
        load_sampler_state(make()[0], state)


def test_a_state_of_a_searching_layer_for_one_that_does_not():
    """What was kept for searches is left out; the pattern may be chosen anew."""
    model, optimizer = make(**CASES["search"])
    train(model, optimizer, range(4))
    other, other_optimizer = make(**{**CASES["search"], "rerank": 0})
    other.load_state_dict(model.state_dict())
    load_sampler_state(other, sampler_state(model))
    assert other[-1].tables.sq8 is None
    assert train(other, other_optimizer, range(6)).isfinite().all()
