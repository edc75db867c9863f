"""States of samplers that are damaged or do not fit: refused before anything changes."""

import copy

import pytest
import torch
from saved_models import CASES, D, N, make, train
from torch import nn

from slide_torch import LSHLinear, LSHOptions, load_sampler_state, sampler_state


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


@pytest.mark.parametrize(
    "state", [None, [], 7, {"3": None}, {3: {}}, {"3": {"format": torch.ones(2)}}]
)
def test_what_is_no_state_is_refused(state):
    with pytest.raises(ValueError, match="load_sampler_state: state: expected"):
        load_sampler_state(make()[0], state)
