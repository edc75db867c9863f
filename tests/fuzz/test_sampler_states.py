"""Damaged sampler states: refused with nothing changed, or taken up by a layer that goes on training."""

import copy

import torch
import torch.nn.functional as F
from helpers import in_format_1

from slide_torch import LSHLinear, LSHOptions, load_sampler_state, optim, sampler_state

N, D, B = 60, 6, 4
CASES = (
    {"K": 2, "L": 3},
    {"K": 2, "L": 3, "pattern": "per_sample", "correction": "importance", "tail": 5},
    {"family": "dwta", "K": 1, "bin_size": 4, "L": 2},
    {"projection": "hadamard", "K": 2, "L": 2, "probes": 2},
    {"family": "kmeans", "K": 2, "L": 2, "probes": 2, "rerank": 20},
    {"family": "kmeans", "K": 3, "L": 1, "probes": 2},
    {"family": "kmeans", "K": 9, "L": 1, "probes": 20},
    {"K": 17, "L": 1, "rerank": 20, "augment_norms": True},
    {"K": 2, "L": 2, "schedule": "drift", "drift": 0.0},
    {"K": 2, "L": 2, "tail": 8, "tail_distribution": ("uniform", "frequencies")},
    {"tail": 8, "tail_distribution": "frequencies", "budget": 0},
)
_TRAINED = {}


def train(layer, steps):
    optimizer = optim.SGD(layer.parameters(), lr=0.01)
    for _ in range(steps):
        loss = F.cross_entropy(layer(torch.randn(B, D)), torch.randint(N, (B,)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert loss.isfinite(), "the loss is not finite"
    assert layer.weight.isfinite().all(), "the weight is not finite"


def trained(case):
    """A layer that has trained a little, and the sampler's state of another one."""
    if case not in _TRAINED:
        both = []
        torch.manual_seed(case)
        for _ in range(2):
            options = LSHOptions(**{"budget": 4, "rehash_every": 2, **CASES[case]})
            layer = LSHLinear(D, N, options=options, sparse=True)
            layer.set_frequencies(torch.rand(N) + 0.1)
            train(layer, 3)
            both.append(layer)
        layer = both[0]
        F.cross_entropy(
            layer(torch.randn(B, D)), torch.randint(N, (B,))
        ).backward()  # rows to change
        _TRAINED[case] = both[1], copy.deepcopy(sampler_state(layer))
    layer, state = _TRAINED[case]
    return copy.deepcopy(layer), copy.deepcopy(state)


def damaged(value, draw):
    """Another value in place of a state's."""
    if isinstance(value, torch.Tensor) and draw.random() < 0.8:
        return damaged_tensor(value, draw)
    numbers = [0, -1, 1, 2**31, 2**63, -(2**70), 0.5, float("nan"), float("inf"), True]
    others = [None, "text", "", b"bytes", [], {}, {"steps": 1}, (1, 2), object()]
    tensors = [torch.zeros(()), torch.zeros(3), torch.full((2,), 7), torch.empty(0)]
    return draw.choice(draw.choice([numbers, others, tensors]))


def damaged_tensor(tensor, draw):
    tensor = tensor.clone()
    way = draw.randrange(8)
    if way == 0:
        dtypes = (torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.float32)
        return tensor.to(draw.choice((*dtypes, torch.float64, torch.bool)))
    if way == 1:
        return tensor.flatten() if tensor.dim() != 1 else tensor.unsqueeze(0)
    if way == 2 and tensor.dim():
        return tensor[draw.choice([slice(1, None), slice(0, 0), slice(0, -1)])]
    if way == 3 and tensor.dim():
        return torch.cat([tensor, tensor])
    if way == 4 and tensor.dim():  # the same values, elsewhere
        return tensor.flip(0)
    if way == 5:
        apart = torch.stack([tensor, tensor], -1)[..., 0]
        return tensor.expand(2, *tensor.shape) if draw.random() < 0.5 else apart
    if way == 6:
        return tensor.to("meta") if draw.random() < 0.3 else tensor.to_sparse()
    if tensor.numel():  # single values
        values = [0, -1, 1, 7, 100, 127, -128]
        values += [] if tensor.dtype == torch.int8 else [2**15 - 1, -(2**15)]
        values += [2**31 - 1, -(2**31)] if tensor.dtype in (torch.int32, torch.int64) else []
        values += [2**63 - 1, -(2**63)] if tensor.dtype == torch.int64 else []
        values += [float("nan"), float("inf"), 1e30] if tensor.is_floating_point() else []
        for _ in range(draw.choice([1, 1, 5])):
            tensor.view(-1)[draw.randrange(tensor.numel())] = draw.choice(values)
    return tensor


def damage(state, draw):
    """Changes one thing in a layer's state."""
    place = state
    for name in ("functions", "schedule", "options", "last"):
        if draw.random() < 0.15 and isinstance(state.get(name), dict) and state[name]:
            place = state[name]
    name = draw.choice(sorted(place, key=str))
    way = draw.random()
    if way < 0.15:
        del place[name]
    elif way < 0.2:
        place[draw.choice(["weight", "steps", "center", "mean_row", "row_codes", 7])] = place[name]
    elif way < 0.3:  # from another layer
        other = trained(draw.randrange(len(CASES)))[1][""]
        if name in other:
            place[name] = other[name]
    else:
        place[name] = damaged(place[name], draw)


def same(one, other):
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[name], other[name]) for name in one)
    return one == other


def test_damaged_sampler_states(fuzz):
    accepted = refused = 0

    def check(draw):
        nonlocal accepted, refused
        layer, state = trained(draw.randrange(len(CASES)))
        torch.manual_seed(draw.randrange(2**32))
        before = copy.deepcopy(sampler_state(layer))
        if draw.random() < 0.3:
            state[""] = in_format_1(state[""])
        if draw.random() < 0.03:
            state = damaged(state, draw)
        else:
            for _ in range(draw.choice([1, 1, 1, 3])):
                damage(state[""], draw)
        try:
            load_sampler_state(layer, state)
        except ValueError as error:
            assert "load_sampler_state: " in str(error) and "expected" in str(error)
            assert same(before, sampler_state(layer)), "a refused state has changed the layer"
            refused += 1
        else:
            accepted += 1
        train(layer, 6)

    fuzz(check)
    assert refused > 0 and accepted + refused > 20
