"""What a state dict does not hold: the sampler's state, for going on bit for bit."""

from __future__ import annotations

from typing import Any

from torch import nn

from .nn.linear import LSHLinear
from .tables import saved_state


def sampler_state(model: nn.Module) -> dict[str, dict[str, Any]]:
    """The sampler's state of every :class:`LSHLinear` of a model, for resuming in the middle of training.

    A state dict holds the parameters only, as ``nn.Linear``'s, and a layer that loads it builds new tables
    with new hash functions: right, but not the same run. Saved beside state dict, optimizer and
    ``torch.get_rng_state()``, this makes the resumed run equal the uninterrupted one bit for bit.

    It holds the hash functions, the codes that the tables have (they are of the weights at the last rehash,
    which nothing else remembers), which rows are dirty, and the schedule. Buckets are rebuilt from the codes.
    Its size is nearly that of the codes: 2 bytes (4 for codes over 15 bits) for each table and neuron; and
    where one table is searched, as by default, the int8 codes of rows: in_features + 12 bytes a neuron.

    Args:
        model: any module; may itself be the layer.

    Returns:
        For each layer's qualified name a dict of tensors, numbers and strings that
        ``torch.load(weights_only=True)`` takes. As in a state dict, tensors are the tables' own: save or copy
        them before training goes on.
    """
    return {
        name: layer.tables.sampler_state(layer.weight, layer.bias)
        for name, layer in _layers(model).items()
    }


def load_sampler_state(model: nn.Module, state: dict[str, dict[str, Any]]) -> None:
    """Takes up what :func:`sampler_state` returned; call it after ``model.load_state_dict``, which
    marks tables as outdated.

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
    for name, layer in layers.items():
        saved_state.check(layer.tables, state[name], layer.weight)
    for name, layer in layers.items():
        layer.tables.load_sampler_state(state[name], layer.weight)


def _layers(model: nn.Module) -> dict[str, LSHLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LSHLinear)}
