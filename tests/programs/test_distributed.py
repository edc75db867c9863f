"""DistributedDataParallel on two processes: replicas stay equal, and equal to one process on both shards."""

import copy
import functools
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers import run_processes
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from slide_torch import LSHFeedForward, LSHLinear, LSHOptions
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
    content["steps"] = tables.schedule.steps
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
    run_processes(work, 2, str(file), result, sparse, budget, built, dtype, limit=300)
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
    run_processes(work_with_unused, 2, str(tmp_path / "store"), result, sparse, limit=300)
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


class Head(nn.Module):
    """Nothing but the layer: its input gets no gradient."""

    def __init__(self, *, sparse=False, budget=N):
        super().__init__()
        self.head = LSHLinear(D, N, options=LSHOptions(budget=budget, tail=6), sparse=sparse)

    def forward(self, x):
        return self.head(x)


class WithHidden(nn.Module):
    """Every kind of row-sparse parameter, one of them under two names."""

    def __init__(self, *, sparse=True, budget=N):
        super().__init__()
        self.embedding = nn.Embedding(N, D, sparse=sparse)
        self.hidden = LSHFeedForward(D, 40, options=LSHOptions(budget=9, tail=3), sparse=sparse)
        self.head = LSHLinear(D, N, options=LSHOptions(budget=budget, tail=6), sparse=sparse)
        self.head.tie(self.embedding)

    def forward(self, x):
        return self.head(self.hidden(self.embedding(x)))


def inputs(step, rank, tokens):
    data = torch.Generator().manual_seed(2 * step + rank)
    x = torch.randint(20, (B,), generator=data) if tokens else torch.randn(B, D, generator=data)
    return x, torch.randint(N, (B,), generator=data)


def work_outside(rank, file, result, make, fuse, options):
    """Trains with the loss outside of forward; saves parameters, or what has been refused."""
    torch.set_num_threads(1)
    limit = timedelta(seconds=60)
    dist.init_process_group("gloo", f"file://{file}", timeout=limit, rank=rank, world_size=2)
    torch.manual_seed(rank)
    model = make()
    sparse = model.head.sparse
    parallel = DistributedDataParallel(prepare(model) if sparse else model, **options)
    initial = copy.deepcopy(model.state_dict())
    optimizer = Adam(model.parameters(), lr=0.05, fuse_backward=fuse)
    refused = None
    for step in range(STEPS):
        x, y = inputs(step, rank, hasattr(model, "embedding"))
        try:
            loss = F.cross_entropy(parallel(x), y)
        except RuntimeError as error:
            refused = str(error)
            break
        optimizer.zero_grad()
        loss.backward()
        if sparse:
            allreduce_row_gradients(parallel)
        optimizer.step()
    content = {"model": model.state_dict(), "initial": initial, "refused": refused}
    torch.save(content, f"{result}{rank}")
    dist.barrier()
    del parallel  # as in work
    dist.destroy_process_group()


@pytest.mark.parametrize("options", [{"static_graph": True}, {"find_unused_parameters": True}])
def test_what_looks_for_tensors_in_the_output(options, tmp_path):
    """An input without gradient, and the loss outside of forward: replicas are what one process would be."""
    result = str(tmp_path / "result")
    run_processes(work_outside, 2, str(tmp_path / "store"), result, Head, False, options, limit=300)
    one, other = (torch.load(f"{result}{rank}", weights_only=True) for rank in range(2))
    torch.set_num_threads(1)
    model = Head()
    model.load_state_dict(one["initial"])
    optimizer = Adam(model.parameters(), lr=0.05)
    for step in range(STEPS):
        optimizer.zero_grad()
        for rank in range(2):
            x, y = inputs(step, rank, False)
            (F.cross_entropy(model(x), y) / 2).backward()
        optimizer.step()
    for name, value in model.state_dict().items():
        assert torch.equal(one["model"][name], other["model"][name])
        torch.testing.assert_close(one["model"][name], value, rtol=1e-4, atol=1e-5)


def test_every_row_sparse_parameter_is_prepared(tmp_path):
    result = str(tmp_path / "result")
    run_processes(
        work_outside, 2, str(tmp_path / "store"), result, WithHidden, False, {}, limit=300
    )
    one, other = (torch.load(f"{result}{rank}", weights_only=True) for rank in range(2))
    for name, value in one["model"].items():
        assert torch.equal(value, other["model"][name]), name
        assert not torch.equal(value, one["initial"][name]), name


def test_row_sparse_parameters_are_those_with_row_sparse_gradients():
    model = WithHidden()
    F.cross_entropy(model(torch.arange(B)), torch.arange(B)).backward()
    named = model.named_parameters(remove_duplicate=False)
    expected = {name for name, p in named if p.grad.is_sparse}
    assert {"embedding.weight", "head.weight", "hidden.second_weight"} < expected
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        assert DistributedDataParallel(prepare(model)).parameters_to_ignore == expected
        dense = DistributedDataParallel(prepare(WithHidden(sparse=False)))
        assert not dense.parameters_to_ignore
    finally:
        dist.destroy_process_group()


def test_an_optimizer_that_steps_inside_backward_is_refused(tmp_path):
    result = str(tmp_path / "result")
    make = functools.partial(Model, True, 5)
    run_processes(work_outside, 2, str(tmp_path / "store"), result, make, True, {}, limit=300)
    for rank in range(2):
        content = torch.load(f"{result}{rank}", weights_only=True)
        assert "set fuse_backward=False" in content["refused"]
        assert torch.equal(content["model"]["head.weight"], content["initial"]["head.weight"])


def test_fused_weights_are_refused_by_name(tmp_path):
    dist.init_process_group("gloo", f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        model = Model(True, 5)
        optimizer = Adam(model.parameters(), fuse_backward=True)
        for function in (prepare, allreduce_row_gradients):
            with pytest.raises(RuntimeError, match=rf"{function.__name__}: head\.weight: .*fuse_b"):
                function(model)
        model.bfloat16()  # its gradient is handed over
        prepare(model)
        del optimizer
        hidden = WithHidden().hidden  # so is that of a hidden layer
        optimizer = Adam(hidden.parameters(), fuse_backward=True)
        prepare(hidden)
        optimizer.step()
    finally:
        dist.destroy_process_group()


# --- fully_shard ------------------------------------------------------------------------------------


@pytest.fixture
def mesh(tmp_path):
    dist.init_process_group("gloo", f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


class Loss(nn.Module):
    """Returns the loss."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x, y):
        return F.cross_entropy(self.model(x), y)


@pytest.mark.parametrize("optimizer_class", [torch.optim.SGD, Adam])
@pytest.mark.parametrize("has_body", [False, True])
@pytest.mark.parametrize("unit", ["root", "head", "inside"])
def test_fully_sharded(unit, has_body, optimizer_class, mesh):
    """With the loss outside of the root's forward or inside, as nn.Linear, bit for bit."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    body = [nn.Linear(D, D)] if has_body else []
    model = nn.Sequential(*body, LSHLinear(D, N, options=LSHOptions(budget=N)))
    reference = copy.deepcopy(model)
    whole = model
    if unit == "head":
        fully_shard(model[-1], mesh=mesh, reshard_after_forward=False)
    elif unit == "inside":
        whole = Loss(model)
        fully_shard(whole, mesh=mesh, reshard_after_forward=True)
        whole = Outer(whole)
    fully_shard(whole, mesh=mesh)
    optimizers = [optimizer_class(m.parameters(), lr=0.5) for m in (whole, reference)]
    for step in range(4):
        x, y = inputs(step, 0, False)
        loss = whole(x, y) if unit == "inside" else F.cross_entropy(whole(x), y)
        for one, optimizer in zip(
            (loss, F.cross_entropy(reference(x), y)), optimizers, strict=True
        ):
            one.backward()
            optimizer.step()
            optimizer.zero_grad()
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.equal(p.full_tensor(), q)


class Outer(nn.Module):
    """A root above a unit that takes two arguments."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x, y):
        return self.inner(x, y)


def test_a_resharded_weight_is_refused(mesh):
    model = nn.Sequential(nn.Linear(D, D), LSHLinear(D, N, options=LSHOptions(budget=5, tail=6)))
    head = model[1]
    fully_shard(head, mesh=mesh, reshard_after_forward=True)
    fully_shard(model, mesh=mesh)
    x, y = inputs(0, 0, False)
    logits = model(x)
    for use in (lambda: F.cross_entropy(logits, y), lambda: logits.topk(1), logits.to_dense):
        with pytest.raises(RuntimeError, match=r"memory has been freed: under fully_shard"):
            use()
    for call in (head.rehash, head.rebuild, lambda: head.predict(x, 1), lambda: head.recall(x)):
        with pytest.raises(RuntimeError, match=r"a DTensor, .*unshard\(\)"):
            call()
    head.unshard()
    assert head.predict(x, 1)[1].shape == (B, 1)


def test_a_dense_gradient_is_refused(tmp_path):
    dist.init_process_group("gloo", f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        model = prepare(Model(True, 5))
        model.head.weight.grad = torch.zeros(N, D)
        with pytest.raises(ValueError, match=r"head\.weight: expected a row-sparse gradient"):
            allreduce_row_gradients(model)
    finally:
        dist.destroy_process_group()
