"""Layers whose rows lie on two and three processes are one layer: losses, training, prediction, state.

A case is a function of the mesh. A process runs all cases of so many ranks, one after the other.
"""

import copy
import os
import time
import traceback
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers import run_processes
from sharded_checkpoints import (
    checkpoints_are_loaded_on_other_ranks,
    checkpoints_are_saved,
    new_model,
    train_some,
)
from sharded_models import B, D, N, data_of, equal_on_all, model_of
from sharded_training import (
    a_batch_without_labels_trains_nothing,
    gradients_are_clipped_as_of_the_whole_layer,
    importance_correction_is_unbiased,
    losses_equal_those_of_the_whole_layer,
    own_batches_are_the_mean_of_the_ranks_losses,
    replicas_of_shards,
    sampled_training_keeps_replicas_and_repeats,
    twenty_steps_equal_those_of_the_whole_layer,
)
from torch import nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import slide_torch
from slide_torch import LSHLinear
from slide_torch.distributed import VocabParallel, shard_

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch without gloo"
)


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
    with pytest.raises(NotImplementedError, match=r"LSHLinear\.predictor: .*that is whole"):
        head.predictor()
    for use in (lambda logits: logits.topk(1), lambda logits: logits.to_dense()):
        with pytest.raises(NotImplementedError, match=r"call layer\.predict"):
            use(head(x))


def search_and_active_set_are_shared(mesh):
    options = dict(budget=9, tail=31, family="kmeans", probes=5)
    head = shard_(model_of(N=600, **options)[1], mesh)
    own = head.local.options
    assert (own.budget, own.tail, own.probes) == (5, 16, 3)


# --- what is refused --------------------------------------------------------------------------------


def what_cannot_be_is_refused(mesh):
    head = shard_(model_of()[1], mesh)
    x, y = data_of(0, rows=B + mesh.get_rank())
    with pytest.raises(ValueError, match=r"same inputs and targets on every rank.*Shard\(0\)"):
        F.cross_entropy(head(x), y)
    x, y = data_of(mesh.get_rank())
    with pytest.raises(ValueError, match=r"got other inputs or targets"):
        F.cross_entropy(head(x), y)
    for argument in ("negatives", "exclude"):
        with pytest.raises(NotImplementedError, match=f"{argument}: expected None for a sharded"):
            head(x, **{argument: y[:, None]})
    with pytest.raises(ValueError, match=r"shard_: layer: expected an LSHLinear.*shard it once"):
        shard_(head, mesh)
    with pytest.raises(ValueError, match=r"shard_: mesh: expected a DeviceMesh"):
        shard_(model_of()[1], None)
    with pytest.raises(ValueError, match=r"shard_: mesh: .*take fewer"):
        shard_(LSHLinear(D, 1), mesh)
    with pytest.raises(ValueError, match=r"shard_: input_layouts: .*got Shard\(dim=1\)"):
        shard_(model_of()[1], mesh, input_layouts=Shard(1))
    tied = model_of()[1]
    tied.tie(nn.Embedding(tied.out_features, tied.in_features, dtype=tied.weight.dtype))
    with pytest.raises(ValueError, match=r"shard_: layer: .*tied to an embedding"):
        shard_(tied, mesh)
    with pytest.raises(NotImplementedError, match=r"init_from_class_means_: .*before shard_"):
        head.init_from_class_means_([data_of(0)])
    for resize, argument in ((head.extend_, 2), (head.drop_, [2])):
        with pytest.raises(NotImplementedError, match=rf"{resize.__name__}: .*before shard_"):
            resize(argument)
    with pytest.raises(ValueError, match=r"weight: .*this rank's rows of a sharded layer"):
        head.local.extend_(2)
    with pytest.raises(NotImplementedError, match=r"decoupled: .*sharded layer"):
        head(data_of(0)[0]).cross_entropy(data_of(0)[1], decoupled=True)
    with pytest.raises(NotImplementedError, match=r"margin: .*sharded layer"):
        head(data_of(0)[0]).cross_entropy(data_of(0)[1], margin=1.0)
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


ON_TWO = (
    *(losses_equal_those_of_the_whole_layer, a_batch_without_labels_trains_nothing),
    *(twenty_steps_equal_those_of_the_whole_layer, sampled_training_keeps_replicas_and_repeats),
    *(own_batches_are_the_mean_of_the_ranks_losses, importance_correction_is_unbiased),
    *(predictions_are_those_of_the_whole_layer, checkpoints_are_saved),
    *(gradients_are_clipped_as_of_the_whole_layer, what_cannot_be_is_refused),
    search_and_active_set_are_shared,
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
