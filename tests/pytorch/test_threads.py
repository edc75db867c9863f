"""Training beside threads, worker processes and data loaders, and at the end of the interpreter."""

import copy
import multiprocessing
import subprocess
import sys
import threading

import pytest
import torch
import torch.nn.functional as F
from helpers import small_model as make
from small_batches import PATTERNS, D, batch, loss_of
from torch.utils.data import DataLoader, TensorDataset

import slide_torch

pytestmark = pytest.mark.usefixtures("one_thread")


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 12

    def __getitem__(self, index):
        # a worker computes, with the operators too, as a preprocessing step might
        x = torch.full((D,), float(index))
        return slide_torch.ops.mean_row(x.unsqueeze(0), None, 1), index


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_data_loader_workers(start):
    """Workers start while layers with tables live in the parent, which has used its threads."""
    model = make(sparse=True)
    torch.set_num_threads(2)
    loss_of(model).backward()
    context = multiprocessing.get_context(start)
    loader = DataLoader(Rows(), batch_size=4, num_workers=1, multiprocessing_context=context)
    seen = 0
    for x, index in loader:
        assert torch.equal(x[:, 0], index.float())
        F.cross_entropy(model(x), index).backward()
        seen += len(x)
    assert seen == 12


@pytest.mark.parametrize("pattern", PATTERNS)
def test_several_threads(pattern):
    """Each thread trains a layer of its own, and all read one in eval; results are those of one thread."""
    shared = make().eval()

    def train(seed):
        generator = torch.Generator().manual_seed(seed)
        layer = copy.deepcopy(layers[seed])
        for step in range(30):
            x, y = batch(100 * seed + step)
            loss = slide_torch.functional.lsh_linear_cross_entropy(
                x, layer.weight, y, linear_bias=layer.bias, tables=layer.tables, sparse=True,
                generator=generator,
            )  # fmt: skip
            for p, g in zip(layer.parameters(), torch.autograd.grad(loss, list(layer.parameters())),
                            strict=True):  # fmt: skip
                p.data.sub_(g.to_dense(), alpha=0.1)
            with torch.no_grad():
                evaluations[seed] = shared(x)
        return [p.detach() for p in layer.parameters()]

    layers = [make(sparse=True, pattern=pattern, budget=9)[-1] for _ in range(4)]
    evaluations = {}
    expected = [train(seed) for seed in range(4)]
    expected_evaluations = dict(evaluations)
    found = [None] * 4

    def run(seed):
        found[seed] = train(seed)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in range(4):
        assert all(map(torch.equal, found[seed], expected[seed]))
        assert torch.equal(evaluations[seed], expected_evaluations[seed])


def test_threads_changed_between_steps():
    results = []
    for counts in ((1, 1, 1, 1), (2, 1, 2, 1)):
        model = make(sparse=True)
        optimizer = slide_torch.optim.Adam(model[-1].parameters(), lr=0.1)
        for seed, count in enumerate(counts):
            torch.set_num_threads(count)
            optimizer.zero_grad()
            F.cross_entropy(model[-1](batch(seed)[0]), batch(seed)[1]).backward()
            optimizer.step()
        results.append(model[-1].weight.detach())
    assert torch.equal(*results)


LEAVES = """
import threading, torch, torch.nn.functional as F
from slide_torch import LSHLinear, LSHOptions
torch.set_num_threads(2)
layer = LSHLinear(8, 6000, options=LSHOptions(budget=5, tail=6), sparse=True)
def train():
    for _ in range(20):
        F.cross_entropy(layer(torch.randn(64, 8)), torch.randint(6000, (64,))).backward()
train()
threading.Thread(target=train).start()
print("done")
"""


def test_the_interpreter_exits():
    """With its thread pool started, with live tables, while another thread still trains."""
    answer = subprocess.run(
        [sys.executable, "-c", LEAVES], capture_output=True, text=True, timeout=120
    )
    assert answer.stdout == "done\n" and answer.returncode == 0, answer.stderr


def test_tensor_dataset_training_loop_with_generator_state():
    """The sampler draws from torch's generator: restoring it restores the run."""
    model = make(sparse=True)
    data = TensorDataset(*batch())
    state = torch.get_rng_state()
    losses = []
    for _ in range(2):
        torch.set_rng_state(state)
        one = copy.deepcopy(model)
        for x, y in DataLoader(data, batch_size=2, shuffle=True):
            losses.append(F.cross_entropy(one(x), y).item())
    assert losses[:3] == losses[3:]
