"""Checkpoints: all that the rest of a training depends on, in a file that is whole whenever it is there."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from torch.optim import Optimizer

from slide_torch import load_sampler_state, sampler_state

from .run import Run

__all__ = ["add_checkpoint_options", "checkpoint_of", "load_checkpoint", "save_checkpoint"]

_KEPT_OF_RUN = ("steps", "seconds", "step_ms", "curve", "peak_gb", "active")


def add_checkpoint_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoint",
        type=Path,
        metavar="FILE",
        help="keep the LSH training's state here; where it exists, go on from it",
    )
    parser.add_argument("--checkpoint-every", type=int, default=1000, metavar="STEPS")


def save_checkpoint(path: Path, content: dict) -> None:
    """Writes beside the target, forces it to the disk and renames: whenever the program or the machine
    stops, `path` is the old file or the new one, whole. A full disk is an OSError that names it."""
    temporary = path.with_name(path.name + ".part")
    try:
        with open(temporary, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except Exception as error:
        # where a write fails, torch.save goes on to its own error, "unexpected pos"
        reason = error if isinstance(error, OSError) else error.__context__
        if not isinstance(reason, OSError):
            raise
        message = f"{reason.strerror or reason} (nothing was replaced)"
        raise OSError(reason.errno, message, str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.absolute().parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the renaming itself
    finally:
        os.close(folder)


def checkpoint_of(
    run: Run, model: nn.Module, optimizers: Sequence[Optimizer], settings: dict
) -> dict:
    """All that the rest of the training depends on."""
    return {
        "settings": settings,
        "run": {name: getattr(run, name) for name in _KEPT_OF_RUN},
        "model": model.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "sampler": sampler_state(model),
        "rng": torch.get_rng_state(),
    }


def load_checkpoint(
    path: Path, run: Run, model: nn.Module, optimizers: Sequence[Optimizer], settings: dict
) -> None:
    content = torch.load(path, weights_only=True)
    for name, value in settings.items():
        if content["settings"][name] != value:
            raise SystemExit(
                f"{path}: {name}: expected {value!r} as in this call, got {content['settings'][name]!r}: "
                "call with what the checkpoint was made with, or name another file"
            )
    model.load_state_dict(content["model"])
    for optimizer, state in zip(optimizers, content["optimizers"], strict=True):
        optimizer.load_state_dict(state)
    load_sampler_state(model, content["sampler"])
    torch.set_rng_state(content["rng"])
    for name, value in content["run"].items():
        setattr(run, name, value)
    print(f"{path}: going on after {run.steps:,} steps")
