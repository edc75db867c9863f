"""Layers whose rows lie on two and three processes are one layer: losses, training, prediction, state."""

import copy
import itertools
import os
import time
import traceback
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers import run_processes
from torch import nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import slide_torch
from slide_torch import LSHLinear, LSHOptions
from slide_torch.distributed import (
    VocabParallel,
    allreduce_row_gradients,
    prepare,
    prepare_optimizer,
    shard_,
)
from slide_torch.optim import Adam

N, D, B = 61, 8, 6

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch without gloo"
)


def model_of(seed=0, dtype=torch.float32, bias=True, sparse=True, N=N, **options):
    torch.manual_seed(seed)
    options = LSHOptions(**{"budget": N, "tail": 0, **options})
    head = LSHLinear(D, N, bias, options=options, sparse=sparse)
    return nn.Sequential(nn.Linear(D, D), head).to(dtype)


def data_of(step, rows=B, dtype=torch.float32, classes=N):
    data = torch.Generator().manual_seed(step)
    x = torch.randn(rows, D, generator=data, dtype=torch.float64).to(dtype)
    return x, torch.randint(classes, (rows,), generator=data)


def rows_of(head, whole):
    return whole[head.shard.first : head.shard.last]


def dense(gradient):
    return gradient.to_dense() if gradient.is_sparse else gradient


def check_gradients(model, reference):
    torch.testing.assert_close(model[0].weight.grad, reference[0].weight.grad)
    for name, parameter in model[1].named_parameters():
        expected = dense(getattr(reference[1], name).grad)
        torch.testing.assert_close(dense(parameter.grad), rows_of(model[1], expected))


def equal_on_all(tensor):
    found = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(found, tensor.detach().contiguous())
    return all(torch.equal(found[0], other) for other in found)


# --- losses -----------------------------------------------------------------------------------------


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


# --- prediction -------------------------------------------------------------------------------------


def predictions_are_those_of_the_whole_layer(mesh):
    reference = model_of(N=600, budget=30, family="simhash", K=2, L=4)[1]
    head = shard_(copy.deepcopy(reference), mesh)
    x, _ = data_of(2, rows=40)
    for k in (1, 7, 600):
        for found, expected in zip(head.predict(x, k), reference.predict(x, k), strict=True):
            torch.testing.assert_close(found, expected)
    torch.testing.assert_close(head.log_prob(x), reference.log_prob(x))
    assert 0.3 < head.recall(x, 5) < 1
    assert head.calibrate(x, 5, recall=0.9) >= 0.9
    _, approximate = head.predict(x, 5, exact=False)
    _, best = reference.predict(x, 5)
    assert (approximate.unsqueeze(2) == best.unsqueeze(1)).any(2).float().mean() >= 0.9 - 1e-6
    for use in (lambda logits: logits.topk(1), lambda logits: logits.to_dense()):
        with pytest.raises(NotImplementedError, match=r"call layer\.predict"):
            use(head(x))


# --- state ------------------------------------------------------------------------------------------


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


# --- what is refused --------------------------------------------------------------------------------


def what_cannot_be_is_refused(mesh):
    head = shard_(model_of()[1], mesh)
    x, y = data_of(0, rows=B + mesh.get_rank())
    with pytest.raises(ValueError, match=r"same inputs and targets on every rank.*Shard\(0\)"):
        F.cross_entropy(head(x), y)
    x, y = data_of(mesh.get_rank())
    with pytest.raises(ValueError, match=r"got other inputs or targets"):
        F.cross_entropy(head(x), y)
    with pytest.raises(ValueError, match=r"shard_: layer: expected an LSHLinear.*shard it once"):
        shard_(head, mesh)
    with pytest.raises(ValueError, match=r"shard_: mesh: expected a DeviceMesh"):
        shard_(model_of()[1], None)
    with pytest.raises(ValueError, match=r"shard_: mesh: .*take fewer"):
        shard_(LSHLinear(D, 1), mesh)
    with pytest.raises(ValueError, match=r"shard_: input_layouts: .*got Shard\(dim=1\)"):
        shard_(model_of()[1], mesh, input_layouts=Shard(1))
    with pytest.raises(NotImplementedError, match=r"init_from_class_means_: .*before shard_"):
        head.init_from_class_means_([data_of(0)])
    with pytest.raises(NotImplementedError, match=r"decoupled: .*sharded layer"):
        head(data_of(0)[0]).cross_entropy(data_of(0)[1], decoupled=True)
    with pytest.raises(TypeError, match=r"made by shard_"):
        type(head)(D, N)
    with pytest.raises(NotImplementedError, match=r"untied"):
        head.tie(nn.Embedding(N, D))
    with pytest.raises(TypeError, match=r"torch\.distributed\.checkpoint"):
        torch.save(head, "/dev/null")
    with pytest.raises(ValueError, match=r"tune: layer: .*tune\(layer\.local"):
        slide_torch.tune(head, data_of(0)[0])
    x, y = data_of(0)
    even = model_of(N=60 * mesh.size())
    shard_(even[1], mesh)
    even = model_of(N=60 * mesh.size())
    shard_(even[1], mesh)
    wrapped = DistributedDataParallel(even)
    with pytest.raises(RuntimeError, match=r"prepare\(model\)"):
        wrapped(x)
    by_fsdp = model_of(N=60 * mesh.size())
    shard_(by_fsdp[1], mesh)
    fully_shard(by_fsdp, mesh=mesh)
    with pytest.raises(RuntimeError, match=r"ignored_params"):
        by_fsdp(x)
    ignoring = model_of()
    shard_(ignoring[1], mesh)
    fully_shard(ignoring, mesh=mesh, ignored_params=set(ignoring[1].parameters()))
    F.cross_entropy(ignoring(x), y).backward()
    by_hand = parallelize_module(model_of(), mesh, {"1": ColwiseParallel()})
    with pytest.raises(RuntimeError, match=r"got a DTensor, as of ColwiseParallel.*shard_"):
        F.cross_entropy(by_hand(x), y)


def styles_and_meta_devices(mesh):
    model = parallelize_module(model_of(), mesh, {"1": VocabParallel()})
    assert model[1].weight.shape == (model[1].shard.sizes[mesh.get_rank()], D)
    torch.manual_seed(0)
    head = shard_(LSHLinear(D, N, device="meta", sparse=True), mesh)
    assert not equal_on_all(head.weight[:20]) and head.weight.abs().max() <= D**-0.5
    x, y = data_of(0)
    F.cross_entropy(head(x), y).backward()
    averaged = copy.deepcopy(head)
    assert averaged.local.weight is averaged.weight and averaged.shard is head.shard
    F.cross_entropy(averaged(x), y).backward()


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


ON_TWO = (
    *(losses_equal_those_of_the_whole_layer, a_batch_without_labels_trains_nothing),
    *(twenty_steps_equal_those_of_the_whole_layer, sampled_training_keeps_replicas_and_repeats),
    *(own_batches_are_the_mean_of_the_ranks_losses, importance_correction_is_unbiased),
    *(predictions_are_those_of_the_whole_layer, checkpoints_are_saved),
    *(gradients_are_clipped_as_of_the_whole_layer, what_cannot_be_is_refused),
    *(styles_and_meta_devices, replicas_of_shards),
)
ON_THREE = (
    *(losses_equal_those_of_the_whole_layer, own_batches_are_the_mean_of_the_ranks_losses),
    *(twenty_steps_equal_those_of_the_whole_layer, predictions_are_those_of_the_whole_layer),
    checkpoints_are_loaded_on_other_ranks,
)


def work(rank, file, result, world, folder):
    """Runs all cases of so many ranks; saves what each has raised."""
    torch.set_num_threads(1)
    limit = timedelta(seconds=30)
    dist.init_process_group("gloo", f"file://{file}", timeout=limit, rank=rank, world_size=world)
    mesh = init_device_mesh("cpu", (world,))
    found = {}
    for case in ON_TWO if world == 2 else ON_THREE:
        try:
            case(mesh, folder) if case.__code__.co_argcount == 2 else case(mesh)
            found[case.__name__] = ""
        except BaseException:
            found[case.__name__] = traceback.format_exc()
            break  # the other ranks wait for what this one would have sent
    torch.save(found, f"{result}{rank}")
    try:
        dist.barrier()
        dist.destroy_process_group()
    except RuntimeError:  # another rank has failed
        pass


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """What each case raised on each rank, by ranks and name; three ranks load what two have saved."""
    folder = tmp_path_factory.mktemp("sharded")
    found = {}
    for ranks in (2, 3):
        result = str(folder / f"result_{ranks}_")
        store, checkpoints = str(folder / f"store_{ranks}"), str(folder / "checkpoint")
        run_processes(work, ranks, store, result, ranks, checkpoints, limit=120)
        found[ranks] = [torch.load(f"{result}{r}", weights_only=True) for r in range(ranks)]
    return found


@pytest.mark.parametrize("case", ON_TWO, ids=lambda case: case.__name__)
def test_on_two_ranks(case, outcomes):
    for rank, found in enumerate(outcomes[2]):
        assert found.get(case.__name__, "not reached") == "", f"rank {rank}"


@pytest.mark.parametrize("case", ON_THREE, ids=lambda case: case.__name__)
def test_on_three_ranks(case, outcomes):
    for rank, found in enumerate(outcomes[3]):
        assert found.get(case.__name__, "not reached") == "", f"rank {rank}"


def work_until_killed(rank, file, result, folder):
    torch.set_num_threads(1)
    limit = timedelta(seconds=5)
    dist.init_process_group("gloo", f"file://{file}", timeout=limit, rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    model, optimizer = new_model(mesh)
    error = ""
    try:
        for step in range(6):
            if step == 3:
                model_state, _ = get_state_dict(model, optimizer)
                checkpoint.save({"model": model_state}, checkpoint_id=folder)
                torch.save(model[1].to_linear().weight, f"{result}{rank}.weight")
            if step == 4 and rank == 1:
                os._exit(0)  # as if killed: nothing is said to the others
            train_some(model, optimizer, 1, first=step)
    except RuntimeError as caught:
        error = str(caught)
    torch.save(error, f"{result}{rank}.error")
    os._exit(0)  # the group cannot be left in order


def test_a_rank_that_dies(tmp_path):
    """The other ends with an error, and the last checkpoint is whole."""
    began = time.monotonic()
    result, folder = str(tmp_path / "result"), str(tmp_path / "checkpoint")
    run_processes(work_until_killed, 2, str(tmp_path / "store"), result, folder, limit=60)
    assert time.monotonic() - began < 60
    assert torch.load(f"{result}0.error", weights_only=True) != ""
    model = model_of(seed=3)
    states = {"model": model.state_dict()}
    checkpoint.load(states, checkpoint_id=folder, no_dist=True)
    model.load_state_dict(states["model"])
    assert torch.equal(model[1].weight, torch.load(f"{result}0.weight", weights_only=True))
