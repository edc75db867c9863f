"""A model that is trained, saved and restored, with every kind of tables."""

import io

import torch
import torch.nn.functional as F
from torch import nn

import slide_torch
from slide_torch import LSHLinear, LSHOptions, load_sampler_state, sampler_state

N, D, B = 300, 16, 8


def make(seed=0, *, sparse=True, optimizer="slide", **options):
    """A model with dropout (which draws from the same generator as the sampler), and its optimizer."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    options = {"budget": 5, "tail": 6, "K": 3, "L": 4, "rehash_every": 3, **options}
    head = LSHLinear(D, N, options=LSHOptions(**options), sparse=sparse)
    head.set_frequencies(torch.rand(N) + 0.1)
    model = nn.Sequential(nn.Linear(D, D), nn.ReLU(), nn.Dropout(0.2), head)
    make_optimizer = {
        "slide": slide_torch.optim.Adam,
        "sgd": lambda p, lr: slide_torch.optim.SGD(p, lr=lr, momentum=0.9),
        "adagrad": slide_torch.optim.Adagrad,
        "torch": torch.optim.AdamW,
    }[optimizer]
    return model, make_optimizer(model.parameters(), lr=0.05)


def train(model, optimizer, steps):
    data = torch.Generator()
    losses = []
    for step in steps:
        data.manual_seed(step)
        x, y = torch.randn(B, D, generator=data), torch.randint(N, (B,), generator=data)
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.tensor(losses)


def through_a_file(content):
    file = io.BytesIO()
    torch.save(content, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def checkpoint(model, optimizer):
    return through_a_file(
        {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "sampler": sampler_state(model),
            "rng": torch.get_rng_state(),
        }
    )


def restore(model, optimizer, saved):
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    load_sampler_state(model, saved["sampler"])
    torch.set_rng_state(saved["rng"])


CASES = {
    "shared": {},
    "per_sample": {"pattern": "per_sample", "correction": "importance"},
    "dwta": {"family": "dwta", "K": 1, "rebuild_every": 2},
    "gaussian": {"projection": "gaussian", "rebuild_every": 2},
    "hadamard": {"projection": "hadamard", "probes": 2},
    "kmeans": {"family": "kmeans", "L": 2, "probes": 2, "rerank": 20, "rebuild_every": 3},
    "search": {"family": "kmeans", "L": 1, "probes": 3, "rerank": 20},
    "augment_norms": {"augment_norms": True, "rebuild_every": 3},
    "drift": {"schedule": "drift", "drift": 0.01, "rehash_every": 2, "rebuild_every": 3},
    "drift_kmeans": {"family": "kmeans", "schedule": "drift", "drift": 0.02, "rehash_every": 2},
    "dense_gradients": {"sparse": False, "optimizer": "torch"},
    "sgd": {"optimizer": "sgd"},
    "adagrad": {"optimizer": "adagrad", "rehash_growth": 1.5},
    "no_tables": {"budget": 0},
    "every_neuron": {"budget": N},
    "frequencies": {"tail_distribution": "frequencies", "correction": "importance"},
    "tail_alone": {"tail_distribution": "log_uniform", "budget": 0},
    "exact_candidates": {"family": "exact"},
}
