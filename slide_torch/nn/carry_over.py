"""Conversion of linear layers: what a layer has beside weight and bias is kept, or an error is raised."""

from __future__ import annotations

import itertools
from typing import Any

from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

# Hooks that both layers share: removing one from the old layer removes it from the new one too.
_SHARED_HOOKS = (
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"),
    *("_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks"),
)


# Hooks that would behave differently in the new layer.
_REFUSED_HOOKS = {
    "_backward_hooks": "backward hooks",
    "_backward_pre_hooks": "backward pre-hooks",
    "_load_state_dict_pre_hooks": "load_state_dict pre-hooks",
    "_load_state_dict_post_hooks": "load_state_dict post-hooks",
}


# Forward pre-hooks that compute the weight before each forward, and the call that removes them.
_WEIGHT_HOOKS: tuple[tuple[Any, str, str], ...] = (
    (WeightNorm, "weight_norm", "torch.nn.utils.remove_weight_norm(layer)"),
    (SpectralNorm, "spectral_norm", "torch.nn.utils.remove_spectral_norm(layer)"),
    (BasePruningMethod, "pruning", "torch.nn.utils.prune.remove(layer, name)"),
)


# (a compiled forward stays behind, as when a module is copied)
_OF_ANY_LINEAR = {*vars(nn.Module()), "in_features", "out_features", "_compiled_call_impl"}


def computed_weight(layer: nn.Module) -> tuple[str, str] | None:
    """The name of a hook that computes a parameter before each forward of ``layer``, and the call that
    removes it; None if there is none."""
    for hook in layer._forward_pre_hooks.values():
        for kind, name, remedy in _WEIGHT_HOOKS:
            if isinstance(hook, kind):
                return name, remedy
    return None


def check_carried(
    linear: nn.Linear,
    where: str,
    *,
    classes: tuple[type, ...] = (nn.Linear,),
    own_hooks: tuple[Any, ...] = (),
) -> None:
    """Checks that :func:`carry_over` would lose nothing of ``linear``.

    Args:
        where: function and argument, for the message.
        classes: the supported classes; any other may compute something else.
        own_hooks: hooks that these classes register themselves.

    Raises:
        ValueError: the message names what would be lost, and what to do.
    """

    def refuse(found: str, remedy: str) -> None:
        raise ValueError(f"{where}: expected a plain nn.Linear, got one with {found}: {remedy}")

    if parametrize.is_parametrized(linear):
        parametrizations: Any = linear.parametrizations
        names = ", ".join(parametrizations)
        remedy = "call torch.nn.utils.parametrize.remove_parametrizations(layer, name) first"
        refuse(f"a parametrization of {names}", remedy)
    if type(linear) not in classes:
        raise ValueError(
            f"{where}: expected an nn.Linear itself, got {type(linear).__name__}, a subclass, which may "
            "compute something else: leave it out, or give an nn.Linear that holds its weight and bias"
        )
    computed = computed_weight(linear)
    if computed is not None:
        refuse(computed[0], f"call {computed[1]} first")
    for name in ("weight", "bias"):
        value = linear._parameters.get(name)
        if name not in linear._parameters or (name == "weight" and value is None):
            refuse(
                f"a {name} that is no Parameter of it", f"assign an nn.Parameter to layer.{name}"
            )
        if value is not None and is_traceable_wrapper_subclass(value):
            refuse(
                f"a {name} of {type(value).__name__}",
                "convert before quantising or sharding the model",
            )
        if getattr(value, "_fsdp_flattened", False):
            refuse(f"a {name} that FSDP has flattened", "convert before wrapping the model")
    for attribute, name in _REFUSED_HOOKS.items():
        hooks = getattr(linear, attribute).values()
        if attribute == "_load_state_dict_pre_hooks":  # others do not know which layer they are of
            hooks = [hook for hook in hooks if getattr(hook, "with_module", False)]
        if any(hook not in own_hooks for hook in hooks):
            refuse(name, "remove them, and register them with the new layer")


def check_names(linear: nn.Linear, layer: nn.Linear, where: str, own: frozenset[str]) -> None:
    """Checks that no attribute of ``linear`` has another meaning in ``layer``, such as a ``forward`` assigned
    to the instance.

    Raises:
        ValueError: the message names them.
    """
    for name in extras(linear, own):
        if hasattr(layer, name):
            raise ValueError(
                f"{where}: expected a plain nn.Linear, got one with an attribute {name!r} of its own, which "
                f"{type(layer).__name__} has already: delete or rename it first"
            )


def carry_over(linear: nn.Linear, layer: nn.Linear, own: frozenset[str]) -> None:
    """Gives ``layer`` the parameters, buffers, submodules and attributes of ``linear``, except ``own``, and
    its hooks, which the two then share. Nothing is copied."""
    layer.training = linear.training
    for name in ("weight", "bias"):
        layer._parameters[name] = linear._parameters[name]
    for name in extras(linear, own):
        for kind in ("_parameters", "_buffers", "_modules", "__dict__"):
            values = getattr(linear, kind)
            if name in values:
                getattr(layer, kind)[name] = values[name]
    layer._non_persistent_buffers_set.update(linear._non_persistent_buffers_set)
    if has_hooks(linear):
        for name in _SHARED_HOOKS:
            setattr(layer, name, getattr(linear, name))


def has_hooks(linear: nn.Linear) -> bool:
    """Whether a layer has hooks that :func:`carry_over` shares."""
    return any(getattr(linear, name) for name in _SHARED_HOOKS)


def extras(linear: nn.Linear, own: frozenset[str] = frozenset()) -> list[str]:
    """The names that ``linear`` has in addition to those of an nn.Linear and to ``own``."""
    names = itertools.chain(
        linear._parameters,
        linear._buffers,
        linear._modules,
        linear.__dict__.keys() - _OF_ANY_LINEAR,
    )
    return [name for name in names if name not in ("weight", "bias") and name not in own]
