"""Checks of the arguments of LSHLinear, and of its parameters before they are used."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..checks import as_number, checked_int
from ..options import LSHOptions
from ..precision import DTYPES
from ..prediction import inputs
from ..sampling.negatives import check_lists
from ..tables import HashTables
from . import carry_over

MOST_FEATURES = 2**24
MOST_NEURONS = 2**31 - 2


def options_of(
    options: LSHOptions | None, out_features: int, output: Any, eval_active: Any
) -> LSHOptions:
    """The options of a layer with this ``output`` and ``eval_active``, which are checked."""
    if output not in ("sampled", "dense"):
        raise ValueError(f"LSHLinear: output: expected 'sampled' or 'dense', got {output!r}")
    if eval_active not in ("all", "budget"):
        raise ValueError(f"LSHLinear: eval_active: expected 'all' or 'budget', got {eval_active!r}")
    if output == "dense":
        return (options or LSHOptions(pattern="per_sample")).for_hidden_layer(out_features)
    if eval_active != "all":
        raise ValueError(
            f"LSHLinear: eval_active: expected 'all' with output='sampled', got {eval_active!r}: for "
            "prediction within a budget see LSHLinear.predict(exact=False)"
        )
    return options or LSHOptions()


def check_arguments(
    in_features: Any, out_features: Any, options: Any, device: Any, dtype: torch.dtype | None
) -> tuple[int, int]:
    """Checks the arguments of a constructor; returns the sizes as ints."""
    sizes = (
        checked_int(in_features, 1, MOST_FEATURES, "LSHLinear: in_features"),
        checked_int(out_features, 1, MOST_NEURONS, "LSHLinear: out_features"),
    )
    if options is not None and not isinstance(options, LSHOptions):
        raise ValueError(f"LSHLinear: options: expected LSHOptions, got {type(options).__name__}")
    where = torch.device(device) if device is not None else torch.get_default_device()
    if where.type not in ("cpu", "meta"):
        raise ValueError(f"LSHLinear: device: expected the CPU, got {where}")
    what = torch.get_default_dtype() if dtype is None else dtype
    if what not in DTYPES:
        raise ValueError(f"LSHLinear: dtype: expected float32, float64 or bfloat16, got {what}")
    return sizes


def check_shapes(where: str, weight: Tensor, bias: Tensor | None) -> None:
    """Checks that parameters are those of a linear layer."""
    if weight.dim() != 2:
        raise ValueError(
            f"{where}: expected a weight of 2 dimensions, got shape {tuple(weight.shape)}"
        )
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != weight.dtype):
        raise ValueError(
            f"{where}: expected a bias of shape {tuple(weight.shape[:1])}, {weight.dtype}, as the weight "
            f"has it, got {tuple(bias.shape)}, {bias.dtype}"
        )


def wrong_shapes(layer: nn.Module, state_dict: dict[str, Tensor], prefix: str) -> list[str]:
    """An error message for each parameter of ``layer`` that has another shape in ``state_dict``."""
    own = {prefix + name: param for name, param in layer.named_parameters(recurse=False)}
    return [
        f"LSHLinear.load_state_dict: {name}: expected shape {tuple(own[name].shape)}, got "
        f"{tuple(state_dict[name].shape)}: make the layer with the sizes that were saved"
        for name in own
        if name in state_dict and state_dict[name].shape != own[name].shape
    ]


def check_parameters(
    where: str, layer: nn.Linear, tables: HashTables, *, called: bool = True
) -> None:
    """Checks that the parameters of ``layer`` have the shapes that its ``tables`` were made for.

    Args:
        called: False outside of the layer's forward, where parameters that hooks compute at each forward are
            out of date, and raise an error too.
    """
    weight, bias = layer.weight, layer.bias
    N, d = tables.out_features, tables.in_features
    sizes = (layer.out_features, layer.in_features)
    of_bias = None if bias is None else tuple(bias.shape)
    wanted = (N,) if tables.has_bias else None
    if tuple(weight.shape) != (N, d) or sizes != (N, d) or of_bias != wanted:
        raise ValueError(
            f"{where}: weight: expected shape {(N, d)} and bias {wanted}, which the layer was made with, "
            f"got {tuple(weight.shape)} and {of_bias}, (out_features, in_features) {sizes}: of resized "
            "parameters make a new layer, LSHLinear.from_linear(layer, options=layer.options, "
            "sparse=layer.sparse, output=layer.output)"
        )
    computed = None if called else carry_over.computed_weight(layer)
    if computed is not None:
        raise ValueError(
            f"{where}: weight: expected a Parameter, got one that {computed[0]} computes anew at each "
            f"forward only: call {computed[1]} first"
        )


def check_not_parametrized(where: str, layer: nn.Module) -> None:
    if parametrize.is_parametrized(layer):
        raise ValueError(
            f"{where}: weight: expected a Parameter, whose changes are noticed, got the "
            "result of a parametrization: call torch.nn.utils.parametrize.remove_parametrizations first"
        )


def checked_input(input: Tensor, layer: nn.Linear, tables: HashTables) -> Tensor:
    """The input of a forward in training, in the weight's dtype under autocast."""
    check_parameters("LSHLinear", layer, tables)
    if hasattr(layer.weight, "full_tensor") or hasattr(input, "full_tensor"):
        raise RuntimeError(
            "LSHLinear: weight: expected tensors in training, got a DTensor, as of ColwiseParallel or "
            "distribute_module: cut the rows by slide_torch.distributed.shard_(layer, mesh), or "
            "VocabParallel() in the plan of parallelize_module, instead"
        )
    if input.dim() < 1 or input.shape[-1] != layer.in_features:
        raise ValueError(
            f"LSHLinear: input: expected last dimension {layer.in_features} (in_features), "
            f"got shape {tuple(input.shape)}"
        )
    return inputs.cast_input("LSHLinear", input, layer.weight)


def check_lists_of(input: Tensor, output: str, **lists: Any) -> None:
    """Checks ``negatives`` and ``exclude``, where there are any, for ``input`` (\\*, d)."""
    for argument, ids in lists.items():
        if ids is None:
            continue
        if output == "dense":
            raise NotImplementedError(
                f"LSHLinear: {argument}: expected None with output='dense', got {type(ids).__name__}: a "
                "hidden layer has no classes that compete: pass it to the output layer"
            )
        by_batch = argument == "negatives"
        check_lists(ids, input.shape[:-1], "LSHLinear", argument, whole_batch=by_batch)


def flat_inputs(where: str, input: Tensor, layer: nn.Linear, tables: HashTables) -> Tensor:
    """The inputs of a prediction as contiguous (n, d), bfloat16 ones as float32."""
    check_parameters(where, layer, tables, called=False)
    return inputs.flat_inputs(where, input, layer.weight, layer.bias)


def some_inputs(where: str, input: Tensor, layer: nn.Linear, tables: HashTables) -> Tensor:
    """As :func:`flat_inputs`: at least one, and finite."""
    flat = flat_inputs(where, input, layer, tables)
    if flat.shape[0] == 0:
        raise ValueError(f"{where}: input: expected at least one, got none")
    if not bool(torch.isfinite(flat).all()):
        raise ValueError(f"{where}: input: expected finite numbers, got NaN or Inf")
    return flat


def checked_k(where: str, k: Any, neurons: int) -> int:
    return checked_int(k, 1, neurons, f"{where}: k", " (out_features)")


def checked_share(where: str, share: Any) -> float:
    number = as_number(share)
    if number is None or not 0 < number <= 1:
        raise ValueError(f"{where}: expected a number above 0 and at most 1, got {share!r}")
    return number


def refuse_backward_hooks(layer: nn.Module) -> None:
    """Module backward hooks would never be called: there is no gradient of N logits to call them with."""
    module = torch.nn.modules.module
    everywhere = module._global_backward_hooks or module._global_backward_pre_hooks
    if layer._backward_hooks or layer._backward_pre_hooks or everywhere:
        raise NotImplementedError(
            "LSHLinear: backward hooks are not available in training, whose logits have no gradient tensor: "
            "use input.register_hook or weight.register_hook, or hook the modules before, or one whose "
            "forward returns the loss"
        )
