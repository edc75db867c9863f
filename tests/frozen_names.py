"""Public names and signatures, which must not change by accident: see frozen.py."""

import importlib
import inspect
from typing import Any

# None: all that the module's __all__ names
PUBLIC: dict[str, tuple[str, ...] | None] = {
    "slide_torch": None,
    "slide_torch.optim": None,
    "slide_torch.functional": ("lsh_linear_binary_cross_entropy", "lsh_linear_cross_entropy"),
    "slide_torch.metrics": (
        *("ndcg_at_k", "precision_at_k", "propensities", "psp_at_k", "recall_at_k"),
    ),
    "slide_torch.data": ("SparseRows", "XMCData", "batches", "label_embedding", "read_xmc"),
    "slide_torch.distributed": None,
}

# (slide_torch.integrations needs other packages: its names are in tests/programs/test_integrations.py)

# what stands in public classes for the library itself
INTERNAL = {
    "HashTables": {
        *(
            *("become", "check_tail", "install", "maintain", "mark_dirty", "meet"),
            *("read_with", "record", "require_built", "searches", "take_up"),
        ),
        *("codes", "dirty", "ids", "offsets", "sq8"),
    },
    "LSHLinear": {"draw_active"},
    "ShardedLSHLinear": {"draw_active"},
    "Predictor": {"of"},
    "SampledLogits": {"__init__", "of"},
    "Adam": {"awaits_step", "fused_step"},
}


def signature(function: Any) -> str:
    """Names, kinds and defaults of the parameters, without annotations."""
    parameters = []
    found = inspect.signature(function).parameters.values()
    for parameter in found:
        if parameter.name == "self":
            continue
        default = parameter.default
        if callable(default) and default is not parameter.empty:
            default = _Named(f"<{default.__name__}>")
        parameters.append(parameter.replace(annotation=parameter.empty, default=default))
    return str(inspect.Signature(parameters))


class _Named(str):
    __repr__ = str.__str__


def members(cls: type) -> dict[str, str]:
    """Public methods and properties that slide_torch, not torch, gives a class; and its constructor."""
    hidden = INTERNAL.get(cls.__name__, set())
    found = {} if "__init__" in hidden else {"": signature(cls)}
    for name in dir(cls):
        owner = next((base for base in cls.__mro__ if name in vars(base)), object)
        ours = owner.__module__.startswith("slide_torch")
        if name.startswith("_") or name in hidden or not ours:
            continue
        value = inspect.getattr_static(cls, name)
        if isinstance(value, property):
            found[f".{name}"] = " (property)"
        elif callable(getattr(cls, name)):
            kind = {classmethod: " (classmethod)", staticmethod: " (staticmethod)"}
            found[f".{name}"] = signature(getattr(cls, name)) + kind.get(type(value), "")
    return found


def names() -> list[str]:
    """One line each public module, function, class, method and property."""
    lines = []
    for module_name, listed in PUBLIC.items():
        module = importlib.import_module(module_name)
        for name in sorted(module.__all__ if listed is None else listed):
            value = getattr(module, name)
            where = f"{module_name}.{name}"
            if inspect.ismodule(value):
                lines.append(f"{where} (module)")
            elif inspect.isclass(value):
                lines += [f"{where}{member}{rest}" for member, rest in members(value).items()]
            else:
                lines.append(where + signature(value))
    return lines
