"""Saving and going on: files that others read, and runs that resume bit for bit."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from saved_models import CASES, B, D, N, checkpoint, make, restore, train
from torch import nn

from slide_torch import load_sampler_state, sampler_state


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


def test_a_state_of_a_searching_layer_for_one_that_does_not():
    """What was kept for searches is left out; the pattern may be chosen anew."""
    model, optimizer = make(**CASES["search"])
    train(model, optimizer, range(4))
    other, other_optimizer = make(**{**CASES["search"], "rerank": 0})
    other.load_state_dict(model.state_dict())
    load_sampler_state(other, sampler_state(model))
    assert other[-1].tables.sq8 is None
    assert train(other, other_optimizer, range(6)).isfinite().all()
