"""Saving and loading what a state dict does not hold: the sampler's state."""

from __future__ import annotations

from typing import Any

from torch import nn

from .nn.linear import LSHLinear
from .tables.saved_state import read_state


def sampler_state(model: nn.Module) -> dict[str, dict[str, Any]]:
    """The sampler's state of every :class:`LSHLinear` of a model, for resuming in the middle of training.

    A state dict holds the parameters only, like that of ``nn.Linear``; a layer that loads it builds new
    tables with new hash functions, so that training continues, but not as the same run. Save the sampler's
    state with the state dict, the optimizer's and ``torch.get_rng_state()`` to make the resumed run equal the
    uninterrupted one bit for bit.

    The state holds the hash functions, the codes of the tables (which belong to the weights at the last
    rehash), the dirty rows, and the schedule. Buckets are rebuilt from the codes. Most of its size is
    2 bytes (4 for codes over 15 bits) for each table and neuron; where one table is searched, as by default,
    the int8 copies of the rows add in_features + 12 bytes a neuron.

    Args:
        model: any module; may itself be the layer.

    Returns:
        For each layer's qualified name a dict of tensors, numbers and strings that
        ``torch.load(weights_only=True)`` accepts. As in a state dict, the tensors are those of the tables:
        save or copy them before training goes on.
    """
    return {
        name: layer.tables.sampler_state(layer.weight, layer.bias)
        for name, layer in _layers(model).items()
    }


def load_sampler_state(model: nn.Module, state: dict[str, dict[str, Any]]) -> None:
    """Loads what :func:`sampler_state` returned, in this version or an earlier one. Call it after
    ``model.load_state_dict``, which drops the tables.

    Raises:
        ValueError: layers, their shapes or their options differ from the saved ones, or the state is damaged;
            nothing is changed.
    """
    layers = _layers(model)
    if not isinstance(state, dict) or layers.keys() != state.keys():
        got = sorted(map(str, state)) if isinstance(state, dict) else type(state).__name__
        raise ValueError(
            f"load_sampler_state: state: expected that of layers {sorted(layers)}, got {got}: "
            "load it into the model that it was taken from"
        )
    saved = {name: read_state(layer.tables, state[name]) for name, layer in layers.items()}
    for name, layer in layers.items():
        layer.tables.take_up(saved[name], layer.weight)


def _layers(model: nn.Module) -> dict[str, LSHLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LSHLinear)}
