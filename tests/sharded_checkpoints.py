"""Cases of test_sharded.py: checkpoints, loaded on as many ranks and on others."""

import copy

import pytest
import torch
import torch.nn.functional as F
from sharded_models import D, N, data_of, model_of
from torch import nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.tensor import Shard

import slide_torch
from slide_torch import LSHLinear
from slide_torch.distributed import prepare_optimizer, shard_
from slide_torch.optim import Adagrad, Adam


def train_some(model, optimizer, steps, first=0):
    for step in range(first, first + steps):
        x, y = data_of(step)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


def new_model(mesh, make=Adam):
    model = model_of(seed=3, budget=10, tail=8, family="simhash", K=2, L=4)
    shard_(model[1], mesh)
    optimizer = make(model.parameters())
    return model, optimizer if make is Adam else prepare_optimizer(optimizer)


def checkpoints_are_saved(mesh, folder):
    model, optimizer = new_model(mesh)
    torch.manual_seed(1)
    train_some(model, optimizer, 5)
    model_state, optimizer_state = get_state_dict(model, optimizer)
    checkpoint.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder)
    sampler, random = slide_torch.sampler_state(model), torch.get_rng_state()
    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    linear = model[1].to_linear()
    assert torch.equal(whole["1.weight"], linear.weight) and linear.weight.shape == (N, D)
    if mesh.get_rank() == 0:
        moments = {f"{k}": v for k, v in _full(optimizer_state).items()}
        torch.save({"model": whole, "optimizer": moments}, f"{folder}/whole.pt")
    else:
        _full(optimizer_state)
    sampler = copy.deepcopy(sampler)
    train_some(model, optimizer, 3, first=5)
    # resumed on as many ranks: the same bits
    other, other_optimizer = new_model(mesh)
    load(other, other_optimizer, folder)
    slide_torch.load_sampler_state(other, sampler)
    torch.set_rng_state(random)
    train_some(other, other_optimizer, 3, first=5)
    assert all(map(torch.equal, model.parameters(), other.parameters()))
    # torch's optimizers
    model, optimizer = new_model(mesh, lambda p: torch.optim.Adagrad(p))
    train_some(model, optimizer, 1)
    sums = optimizer.state_dict()["state"][2]["sum"]
    assert sums.shape == (N, D) and sums.placements == (Shard(0),)
    # one number a row
    for key, make in (
        ("sum", lambda p: Adagrad(p, row_wise=True)),
        ("log_decay", lambda p: Adam(p, weight_decay=0.1, deferred_decay=True)),
    ):
        model, _ = new_model(mesh)
        optimizer = make(model.parameters())
        train_some(model, optimizer, 3)
        rows = optimizer.state_dict()["state"][2][key]
        assert rows.shape == (N,) and rows.placements == (Shard(0),)
        states = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
        checkpoint.save(states, checkpoint_id=f"{folder}/{key}")
        other, _ = new_model(mesh)
        other_optimizer = make(other.parameters())
        load(other, other_optimizer, f"{folder}/{key}")
        for one, two in zip(model.parameters(), other.parameters(), strict=True):
            assert torch.equal(one, two) and optimizer.state[one][key].any()
            for name, value in optimizer.state[one].items():
                assert torch.equal(value, other_optimizer.state[two][name])


def _full(optimizer_state):
    return {
        f"{name}.{key}": value.full_tensor() if hasattr(value, "full_tensor") else value
        for name, state in optimizer_state["state"].items()
        for key, value in state.items()
    }


def load(model, optimizer, folder):
    model_state, optimizer_state = get_state_dict(model, optimizer)
    states = {"model": model_state, "optimizer": optimizer_state}
    checkpoint.load(states, checkpoint_id=folder)
    set_state_dict(
        model,
        optimizer,
        model_state_dict=states["model"],
        optim_state_dict=states["optimizer"],
    )


def checkpoints_are_loaded_on_other_ranks(mesh, folder):
    model, optimizer = new_model(mesh)
    load(model, optimizer, folder)
    saved = torch.load(f"{folder}/whole.pt", weights_only=True)
    _, optimizer_state = get_state_dict(model, optimizer)
    for name, value in _full(optimizer_state).items():
        torch.testing.assert_close(value, saved["optimizer"][name], rtol=0, atol=0)
    whole = nn.Sequential(nn.Linear(D, D), LSHLinear(D, N))
    whole.load_state_dict(saved["model"])
    x, _ = data_of(9)
    assert torch.equal(model[1].predict(x, 9)[1], whole[1].predict(x, 9)[1])
    again, _ = new_model(mesh)
    again.load_state_dict(saved["model"])  # whole tensors, as of an nn.Linear
    assert all(map(torch.equal, again.parameters(), model.parameters()))
    with pytest.raises(RuntimeError, match=r"weight: expected shape"):
        again.load_state_dict({**saved["model"], "1.weight": torch.zeros(N + 1, D)})
