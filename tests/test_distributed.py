"""DistributedDataParallel on two processes: replicas stay equal, and equal to one process on both shards."""

import copy
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from slide_torch import LSHLinear, LSHOptions
from slide_torch.distributed import allreduce_row_gradients, prepare
from slide_torch.optim import Adam

N, D, B, STEPS = 60, 8, 5, 7

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch without gloo"
)


class Model(nn.Module):
    def __init__(self, sparse, budget):
        super().__init__()
        self.embedding = nn.Embedding(20, D, sparse=sparse)
        self.body = nn.Linear(D, D)
        options = LSHOptions(budget=budget, tail=6, K=2, L=3, rehash_every=2)
        self.head = LSHLinear(D, N, options=options, sparse=sparse)

    def forward(self, x):
        return self.head(torch.relu(self.body(self.embedding(x))))


def batch(step, rank):
    data = torch.Generator().manual_seed(2 * step + rank)
    return torch.randint(20, (B,), generator=data), torch.randint(N, (B,), generator=data)


def work(rank, file, result, sparse, budget, built, dtype):
    torch.set_num_threads(1)
    limit = timedelta(seconds=60)
    dist.init_process_group("gloo", f"file://{file}", timeout=limit, rank=rank, world_size=2)
    torch.manual_seed(rank)  # parameters, tables and draws differ until rank 0's are taken
    model = Model(sparse, budget).to(dtype)
    if built:
        F.cross_entropy(model(torch.zeros(2, dtype=torch.int64)), torch.zeros(2, dtype=torch.int64))
    if sparse:
        prepare(model)
    parallel = DistributedDataParallel(model)
    optimizer = Adam(model.parameters(), lr=0.05)
    initial = copy.deepcopy(model.state_dict())
    for step in range(STEPS):
        x, y = batch(step, rank)
        loss = F.cross_entropy(parallel(x), y)
        optimizer.zero_grad()
        loss.backward()
        if sparse:
            allreduce_row_gradients(parallel)
        optimizer.step()
    tables = model.head.tables
    stale = None
    if tables.built:
        fresh = tables.family.row_codes(model.head.weight, model.head.bias)
        moved = (fresh != tables.codes).any(0)
        stale = bool((moved & ~tables.dirty).any()) if sparse else False
    layout = str(model.head.weight.grad.layout)
    content = {"model": model.state_dict(), "initial": initial, "stale": stale, "layout": layout}
    content["steps"] = tables.steps
    torch.save(content, f"{result}{rank}")
    dist.barrier()  # no process takes the group, and the file behind it, from the other
    # One that outlives the group destroys it, and may then wait for a thread that waits for the interpreter
    # (pytorch/pytorch#56297).
    del parallel
    dist.destroy_process_group()


class WithUnused(Model):
    """Returns the loss; ``extra`` is there for some batches only."""

    def __init__(self, sparse, budget):
        super().__init__(sparse, budget)
        self.extra = nn.Linear(D, D)

    def forward(self, x, y, use_extra):
        hidden = torch.relu(self.body(self.embedding(x)))
        return F.cross_entropy(self.head(self.extra(hidden) if use_extra else hidden), y)


def work_with_unused(rank, file, result, sparse):
    """Ranks use ``extra`` in turn, in every third step neither does."""
    torch.set_num_threads(1)
    limit = timedelta(seconds=60)
    dist.init_process_group("gloo", f"file://{file}", timeout=limit, rank=rank, world_size=2)
    torch.manual_seed(rank)
    model = WithUnused(sparse, N)
    if sparse:
        prepare(model)
    parallel = DistributedDataParallel(model, find_unused_parameters=True)
    optimizer = Adam(model.parameters(), lr=0.05)
    initial = copy.deepcopy(model.state_dict())
    for step in range(STEPS):
        optimizer.zero_grad()
        parallel(*batch(step, rank), step % 3 == rank).backward()
        if sparse:
            allreduce_row_gradients(parallel)
        optimizer.step()
    torch.save({"model": model.state_dict(), "initial": initial}, f"{result}{rank}")
    dist.barrier()
    del parallel  # as in work
    dist.destroy_process_group()


def run_both(work, *arguments):
    """Runs work in two processes; one that hangs fails the test instead of stopping it."""
    context = mp.spawn(work, arguments, nprocs=2, join=False)
    deadline = time.monotonic() + 300
    try:
        while not context.join(timeout=1):
            assert time.monotonic() < deadline, "the processes hang"
    finally:
        for process in context.processes:
            process.kill()


@pytest.mark.parametrize(
    "sparse,budget,built,dtype",
    [
        (False, 5, True, torch.float32),
        (True, 5, True, torch.float32),
        (True, N, False, torch.float32),
        (True, 5, False, torch.bfloat16),
    ],
)
def test_replicas_stay_equal(sparse, budget, built, dtype, tmp_path):
    file, result = tmp_path / "store", str(tmp_path / "result")
    run_both(work, str(file), result, sparse, budget, built, dtype)
    one, other = (torch.load(f"{result}{rank}", weights_only=True) for rank in range(2))
    for key in ("initial", "model"):
        assert all(torch.equal(one[key][name], other[key][name]) for name in one[key])
    assert not torch.equal(one["initial"]["head.weight"], one["model"]["head.weight"])
    assert one["layout"] == ("torch.sparse_coo" if sparse else "torch.strided")
    assert one["stale"] in (None, False) and other["stale"] in (None, False)
    if budget == N:  # exact: one process with both shards' batches does the same
        torch.set_num_threads(1)
        model = Model(sparse, budget)
        model.load_state_dict(one["initial"])
        optimizer = Adam(model.parameters(), lr=0.05)
        for step in range(STEPS):
            optimizer.zero_grad()
            for rank in range(2):
                x, y = batch(step, rank)
                (F.cross_entropy(model(x), y) / 2).backward()
            optimizer.step()
        for name, value in model.state_dict().items():
            torch.testing.assert_close(one["model"][name], value, rtol=1e-4, atol=1e-5)
    else:
        assert one["steps"] == other["steps"] == STEPS + built


@pytest.mark.parametrize("sparse", [False, True])
def test_parameters_that_a_rank_does_not_use(sparse, tmp_path):
    result = str(tmp_path / "result")
    run_both(work_with_unused, str(tmp_path / "store"), result, sparse)
    one, other = (torch.load(f"{result}{rank}", weights_only=True) for rank in range(2))
    assert all(torch.equal(one["model"][name], other["model"][name]) for name in one["model"])
    # exact: one process with both shards' batches does the same
    torch.set_num_threads(1)
    model = WithUnused(sparse, N)
    model.load_state_dict(one["initial"])
    optimizer = Adam(model.parameters(), lr=0.05)
    for step in range(STEPS):
        optimizer.zero_grad()
        for rank in range(2):
            (model(*batch(step, rank), step % 3 == rank) / 2).backward()
        optimizer.step()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(one["model"][name], value, rtol=1e-4, atol=1e-5)


def test_a_dense_gradient_is_refused(tmp_path):
    dist.init_process_group("gloo", f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        model = prepare(Model(True, 5))
        model.head.weight.grad = torch.zeros(N, D)
        with pytest.raises(ValueError, match=r"head\.weight: expected a row-sparse gradient"):
            allreduce_row_gradients(model)
    finally:
        dist.destroy_process_group()
