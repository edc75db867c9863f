"""Cases of test_sharded.py: losses, gradients and training are those of the whole layer."""

import copy
import itertools

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from sharded_models import B, N, check_gradients, data_of, dense, equal_on_all, model_of, rows_of
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard
from torch.nn.parallel import DistributedDataParallel

import slide_torch
from slide_torch import TopK
from slide_torch.distributed import allreduce_row_gradients, prepare, shard_
from slide_torch.optim import Adam


def targets(dtype):
    _, y = data_of(1)
    y[0] = -100
    lists = torch.tensor(
        [[3, 60, -100], [5, -100, -100], [-100] * 3, [1, 2, 40], [7, 7, -100], [0, 31, 30]]
    )
    dense = torch.zeros(B, N, dtype=dtype)
    dense[torch.arange(B), torch.arange(B) * 10] = 0.7
    dense[1:4, 60] = 0.3
    return {"indices": y, "lists": lists, "dense": dense, "csr": dense.to_sparse_csr()}


def losses_equal_those_of_the_whole_layer(mesh):
    weight = torch.rand(N, dtype=torch.float64, generator=torch.Generator().manual_seed(5)) + 0.5
    for pattern, kind in itertools.product(("shared", "per_sample"), targets(torch.float64)):
        for options in (
            {},
            {"weight": weight, "reduction": "sum"},
            {"label_smoothing": 0.2, "weight": weight},
            {"binary": True, "pos_weight": weight},
        ):
            options = dict(options)
            if pattern == "per_sample" and "weight" in options:
                continue
            reference = model_of(dtype=torch.float64, pattern=pattern)
            model = copy.deepcopy(reference)
            shard_(model[1], mesh)
            target = targets(torch.float64)[kind]
            x, _ = data_of(1, dtype=torch.float64)
            binary = options.pop("binary", False)
            if binary and kind == "indices":
                continue
            loss_of = F.binary_cross_entropy_with_logits if binary else F.cross_entropy
            loss, expected = (loss_of(m(x), target, **options) for m in (model, reference))
            torch.testing.assert_close(loss, expected)
            loss.backward()
            expected.backward()
            check_gradients(model, reference)


def a_batch_without_labels_trains_nothing(mesh):
    model = model_of()
    shard_(model[1], mesh)
    x, y = data_of(1)
    F.cross_entropy(model(x), torch.full_like(y, -100)).backward()
    assert not dense(model[1].weight.grad).any() and not model[0].weight.grad.any()
    loss = F.cross_entropy(model(x), y % model[1].shard.chunk, reduction="none")  # rank 0's alone
    assert loss.shape == (B,) and equal_on_all(loss)
    loss.sum().backward()


def twenty_steps_equal_those_of_the_whole_layer(mesh):
    for fuse, dtype in ((False, torch.float32), (True, torch.float32), (False, torch.bfloat16)):
        reference = model_of(dtype=dtype)
        model = copy.deepcopy(reference)
        head = shard_(model[1], mesh)
        optimizers = [
            Adam(model.parameters(), lr=0.01, fuse_backward=fuse),
            Adam(reference.parameters(), lr=0.01),
        ]
        for step in range(20):
            x, y = data_of(step, rows=B - step % 2, dtype=dtype)
            for one, optimizer in zip((model, reference), optimizers, strict=True):
                optimizer.zero_grad()
                F.cross_entropy(one(x), y).backward()
                slide_torch.clip_grad_norm_(one[0].parameters() if fuse else one.parameters(), 1e9)
                optimizer.step()
        if dtype == torch.float32:
            own = rows_of(head, reference[1].weight)
            torch.testing.assert_close(head.weight, own, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(model[0].weight, reference[0].weight, rtol=1e-4, atol=1e-5)
        assert equal_on_all(model[0].weight.float())


def sampled_training_keeps_replicas_and_repeats(mesh):
    def train():
        model = model_of(N=600, budget=6, tail=40, pattern="shared", rehash_every=2)
        head = shard_(model[1], mesh)
        torch.manual_seed(7)
        optimizer = Adam(model.parameters(), lr=0.05, fuse_backward=True)
        for step in range(12):
            x, y = data_of(step, classes=600)
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert head.stats()["steps"] == 12 and head.stats()["union"] < len(head.weight)
        assert equal_on_all(model[0].weight)
        return model

    one, other = train(), train()
    assert all(map(torch.equal, one.parameters(), other.parameters()))
    assert not torch.equal(one[1].weight, shard_(model_of(N=600)[1], mesh).weight)


def own_batches_are_the_mean_of_the_ranks_losses(mesh):
    ranks, rank = mesh.size(), mesh.get_rank()
    reference = model_of()
    model = copy.deepcopy(reference)
    shard_(model[1], mesh, input_layouts=Shard(0))
    parallel = DistributedDataParallel(prepare(model))
    rows = [B - 2 * r for r in range(ranks)]
    loss = F.cross_entropy(parallel(data_of(rank, rows[rank])[0]), data_of(rank, rows[rank])[1])
    loss.backward()
    allreduce_row_gradients(parallel)
    for r in range(ranks):
        x, y = data_of(r, rows[r])
        expected = F.cross_entropy(reference(x), y)
        (expected / ranks).backward()
        if r == rank:
            torch.testing.assert_close(loss, expected)
    check_gradients(model, reference)
    x, _ = data_of(rank, rows[rank])
    model.eval()
    reference.eval()
    torch.testing.assert_close(model(x), reference(x))
    predicted = model[1].predict(x, 5)
    assert type(predicted) is TopK
    torch.testing.assert_close(predicted, reference[1].predict(x, 5))


def importance_correction_is_unbiased(mesh):
    for draws, options in (
        (1000, {"tail_distribution": "uniform"}),
        (250, {"tail_distribution": "log_uniform", "pattern": "per_sample"}),
    ):
        model = model_of(budget=0, tail=20, correction="importance", **options).eval()
        x, y = data_of(3)
        full = model(x).logsumexp(1)
        label_logits = model(x).gather(1, y[:, None])[:, 0]
        head = shard_(model.train()[1], mesh)
        estimates = []
        with torch.no_grad():
            for seed in range(draws):
                torch.manual_seed(seed)
                loss = F.cross_entropy(head(model[0](x)), y, reduction="none")
                estimates.append((loss + label_logits).exp())
        estimates = torch.stack(estimates).double()
        error = (estimates.mean(0) - full.double().exp()) / (estimates.std(0) / draws**0.5)
        assert error.abs().max() < 4, (options, error)


def gradients_are_clipped_as_of_the_whole_layer(mesh):
    for sparse in (False, True):
        reference = model_of(sparse=sparse)
        model = copy.deepcopy(reference)
        shard_(model[1], mesh)
        x, y = data_of(4)
        norms = []
        for one in (model, reference):
            F.cross_entropy(one(x), y).backward()
            norms.append(slide_torch.clip_grad_norm_(one.parameters(), 0.1))
        torch.testing.assert_close(*norms)
        check_gradients(model, reference)


def replicas_of_shards(mesh):
    """Two by one: rows on one rank, replicas on two, each with a batch of its own."""
    ranks = mesh.size()
    both = init_device_mesh("cpu", (ranks, 1))
    reference = model_of()
    model = copy.deepcopy(reference)
    for parameter in model[1].parameters():
        parameter.data += dist.get_rank()  # rank 0's are taken
    shard_(model[1], both)
    parallel = DistributedDataParallel(prepare(model))
    x, y = data_of(dist.get_rank())
    F.cross_entropy(parallel(x), y).backward()
    allreduce_row_gradients(parallel)
    for r in range(ranks):
        x, y = data_of(r)
        (F.cross_entropy(reference(x), y) / ranks).backward()
    check_gradients(model, reference)
    optimizer = Adam(model.parameters(), fuse_backward=True)
    with pytest.raises(RuntimeError, match=r"set fuse_backward=False"):
        F.cross_entropy(model(x), y)
    del optimizer
