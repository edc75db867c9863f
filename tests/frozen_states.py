"""Keys of states, and kept checkpoints, which must be taken up in every later version: see frozen.py."""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from frozen_runs import Case, classes, digest, fill_, numbers

import slide_torch
from slide_torch import LSHFeedForward, LSHLinear, LSHOptions

# checkpoints in each format of sampler states
SAVED_STATES = {
    format: Path(__file__).parent / "data" / f"sampler_state_{format}.pt" for format in (1, 2, 3)
}

# whose checkpoints are kept: one that searches coded rows, one with all else that is saved
SAVED = {
    "search": Case(
        {"budget": 4, "tail": 8, "K": 3, "rehash_every": 3, "correction": "importance"},
    ),
    "drift": Case(
        {
            **{"budget": 6, "tail": 8, "K": 3, "L": 4, "rehash_every": 3, "schedule": "drift"},
            **{"tail_distribution": ("uniform", "frequencies"), "drift": 0.01},
            **{"correction": "importance", "augment_norms": True},
        },
        uses_numpy=True,
    ),
}
SAVED_N, SAVED_D, SAVED_B, SAVED_STEPS = 64, 8, 6, 7


def small(case: Case) -> tuple[LSHLinear, Any]:
    layer = LSHLinear(SAVED_D, SAVED_N, options=LSHOptions(**case.options), sparse=True)
    fill_(layer)
    layer.set_frequencies(classes(SAVED_N, salt=90, below=100).double() + 1)
    return layer, slide_torch.optim.Adam(layer.parameters(), lr=2.0**-5)


def train_small(layer: LSHLinear, optimizer: Any, steps: range) -> None:
    for step in steps:
        torch.manual_seed(step)
        x = numbers(SAVED_B, SAVED_D, salt=1000 + step, dtype=torch.float32)
        loss = F.cross_entropy(layer(x), classes(SAVED_B, salt=5000 + step, below=SAVED_N))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def save_states() -> None:
    """Writes the checkpoints of format 1 in the present format, into a file beside theirs."""
    found = {}
    for name in SAVED:
        layer, _, saved = resumed(name)
        found[name] = {**saved, "sampler": slide_torch.sampler_state(layer)}
    torch.save(found, SAVED_STATES[max(SAVED_STATES)])


def resumed(name: str, format: int = 1) -> tuple[LSHLinear, Any, dict[str, Any]]:
    """The layer and the optimizer that take up a kept checkpoint, and the checkpoint."""
    saved = torch.load(SAVED_STATES[format], weights_only=True)[name]
    layer, optimizer = small(SAVED[name])
    layer.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    slide_torch.load_sampler_state(layer, saved["sampler"])
    return layer, optimizer, saved


def resume(name: str, format: int = 1) -> list[str]:
    layer, optimizer, _ = resumed(name, format)
    train_small(layer, optimizer, range(SAVED_STEPS, SAVED_STEPS + 12))
    return [digest(layer.parameters()), digest(layer.tables.tensors().values())]


def described(value: Any) -> Any:
    """Dtypes and shapes of tensors, the kinds of all else."""
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    if isinstance(value, dict):
        return {str(key): described(each) for key, each in value.items()}
    return None if value is None else type(value).__name__


def keys() -> dict[str, Any]:
    """Keys of state dicts, of the optimizers' states and of sampler states, with dtypes and shapes."""
    found: dict[str, Any] = {
        "LSHLinear": described(LSHLinear(8, 64).state_dict()),
        "LSHLinear without bias": described(LSHLinear(8, 64, bias=False).state_dict()),
        "LSHFeedForward": described(LSHFeedForward(8, 64, 4).state_dict()),
    }
    for name, options in (
        ("Adam", {}),
        ("Adam, deferred_decay", {"deferred_decay": True}),
        ("SGD", {"momentum": 0.9}),
        ("Adagrad", {}),
        ("Adagrad, row_wise", {"row_wise": True}),
    ):
        layer = LSHLinear(8, 64, sparse=True)
        make = getattr(slide_torch.optim, name.split(",")[0])
        optimizer = make(layer.parameters(), **options)
        F.cross_entropy(layer(torch.zeros(2, 8)), torch.tensor([1, 2])).backward()
        optimizer.step()
        state = optimizer.state_dict()
        found[name] = {
            "state": described(state["state"]),
            "param_groups": sorted(state["param_groups"][0]),
        }
    for name, case in SAVED.items():
        layer, optimizer = small(case)
        found[f"sampler state before training, {name}"] = described(
            slide_torch.sampler_state(layer)
        )
        train_small(layer, optimizer, range(SAVED_STEPS))
        found[f"sampler state, {name}"] = described(slide_torch.sampler_state(layer))
    return found
