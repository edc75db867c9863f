"""The state of tables as a whole: what a sampler state saves of it, its tensors, its statistics."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..inference_mode import version_of
from .old_formats import FORMAT

if TYPE_CHECKING:
    from .hash_tables import HashTables


def state_of(tables: HashTables, weight: Tensor) -> dict[str, Any]:
    """What goes on with ``tables`` over ``weight`` elsewhere; :func:`read_state` reads it."""
    family, pending, schedule = tables.family, tables.pending, tables.schedule
    changing = None if pending.have_changed(version_of(weight)) else pending.rows()
    sq8 = tables.sq8
    return {
        "format": FORMAT,
        "options": dataclasses.asdict(tables.options),
        "shape": (tables.out_features, tables.in_features, tables.has_bias),
        "seed": None if family is None else family.seed,
        "functions": {} if family is None else dict(family.named_buffers()),
        "codes": tables.codes,
        "dirty": None if tables.dirty is None else tables.dirty.nonzero().flatten(),
        "changing": changing,
        "schedule": schedule.counters(),
        "sq8_codes": None if sq8 is None else sq8.codes,
        "sq8_terms": None if sq8 is None else sq8.terms,
        "sq8_places": None if sq8 is None else sq8.places,
        "drift_sample_codes": schedule.drift_sample_codes,
        "last": dict(tables.last_step),
        "frequencies": tables.tail.frequencies,
    }


def tensors_of(tables: HashTables) -> dict[str, Tensor]:
    """The tensors of ``tables``, their hash functions and their tail, by name."""
    found: dict[str, Tensor | None] = {
        name: getattr(tables, name) for name in ("codes", "offsets", "ids", "dirty")
    }
    if tables.sq8 is not None:
        found |= {f"sq8_{name}": value for name, value in tables.sq8._asdict().items()}
    found["frequencies"] = tables.tail.frequencies
    if tables.family is not None:
        found |= dict(tables.family.named_buffers(prefix="family"))
    return {name: value for name, value in found.items() if value is not None}


def statistics_of(tables: HashTables) -> dict[str, float]:
    """See :meth:`HashTables.stats`."""
    schedule = tables.schedule
    found: dict[str, float] = {
        "steps": schedule.steps,
        "rehashes": schedule.rehashes,
        "rebuilds": schedule.rebuilds,
        "upkeep_seconds": schedule.upkeep_seconds,
        **tables.last_step,
    }
    if tables.options.schedule == "drift":
        found |= {"drift_checks": schedule.drift_checks, "drift": schedule.drift}
    if tables.offsets is not None and tables.dirty is not None:
        load = tables.offsets.diff(dim=1)
        found["memory_bytes"] = tables.memory_bytes()
        found["dirty_share"] = tables.dirty.float().mean().item()
        found["bucket_load_mean"] = load[load > 0].float().mean().item()
        found["bucket_load_max"] = float(load.max())
    return found
