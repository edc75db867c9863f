"""Reading a saved sampler state: all of it is checked before any of it is taken up."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from ..hashing.base import HashFamily
from ..hashing.kmeans import KMeans, group_count
from ..hashing.make import make_family
from ..inference_mode import keeps_normal_tensors
from ..options import ResolvedOptions
from .built_tables import SQ8Rows
from .old_formats import FORMAT, in_present_format
from .schedule import COUNTERS, DRIFT_SAMPLE_ROWS

if TYPE_CHECKING:
    from .hash_tables import HashTables

KEYS = (
    *("options", "shape", "seed", "functions", "codes", "dirty", "changing", "schedule", "last"),
    *("sq8_codes", "sq8_terms", "sq8_places", "drift_sample_codes", "frequencies"),
)

# Options that may differ between the layer that was saved and the one that goes on.
_NOT_IN_CODES = {
    *("pattern", "budget", "batch_budget", "tail", "correction", "probes", "rerank", "bucket_cap"),
    *("schedule", "drift", "rehash_every", "rehash_growth", "rebuild_every"),
    "tail_distribution",
}

# Values of options that earlier versions had.
_REMOVED = {
    "tail_distribution": ("quadratic_kernel",),
    "family": ("minhash", "cross_polytope"),
    "projection": ("sparse",),
}

_INT_COUNTERS = ("steps", "rehashes", "rebuilds", "drift_checks", "since_rehash")
_LAST = {"active_per_sample", "union", "ids_read"}
_WHERE = "HashTables.load_sampler_state"
_FLOATS = (torch.float32, torch.float64)


class SavedState(NamedTuple):
    """A sampler state that has been checked, in tensors of its own.

    Attributes:
        family: the functions, or None before the first build.
        codes, dirty, sq8: of the tables, see :class:`BuiltTables`; ``dirty`` is int64 (n) here. ``codes`` is
            None where the rows are to be hashed at the next use.
        changing: int64 (n), rows that the optimizer's next step changes, or None.
        counters: see :class:`Schedule`.
        drift_sample_codes: see :class:`Schedule`.
        last_step: statistics of the last step.
        frequencies: see :class:`TailState`.
    """

    family: HashFamily | None
    codes: Tensor | None
    dirty: Tensor | None
    sq8: SQ8Rows | None
    changing: Tensor | None
    counters: dict[str, int | float]
    drift_sample_codes: Tensor | None
    last_step: dict[str, float]
    frequencies: Tensor | None


@keeps_normal_tensors
def read_state(tables: HashTables, state: Any) -> SavedState:
    """What ``state``, of any format, says of ``tables``.

    Raises:
        ValueError: it is of tables with other options or of another shape, with an option that there is no
            longer, or it is damaged.
    """
    state = _in_present_format(state)
    missing = [name for name in KEYS if name not in state]
    if missing:
        _damaged("", f"the keys {', '.join(KEYS)}", f"none of {', '.join(missing)}")
    _refuse_removed(state["options"])
    _check_settings(tables, state)
    _check_schedule(state)
    family = _family(tables, state)
    codes, sq8 = state["codes"], None
    if codes is not None:
        if family is None:
            _damaged("codes", "None without a seed", codes)
        _check_codes("codes", codes, family, tables.out_features)
        _check_rows("dirty", state["dirty"], tables.out_features)
        if tables.searches:
            sq8 = _sq8(tables, state, family)
            if sq8 is None:  # of tables that were not searched: the next use makes them
                codes = None
    if state["changing"] is not None:
        _check_rows("changing", state["changing"], tables.out_features)
    drift_sample_codes = state["drift_sample_codes"]
    if drift_sample_codes is not None:
        if family is None:
            _damaged("drift_sample_codes", "None without a seed", drift_sample_codes)
        _check_codes("drift_sample_codes", drift_sample_codes, family, DRIFT_SAMPLE_ROWS)
    if state["frequencies"] is not None:
        _check_frequencies(tables, state["frequencies"])
    return SavedState(
        family,
        _kept(codes),
        None if codes is None else _kept(state["dirty"]),
        sq8,
        _kept(state["changing"]),
        {name: state["schedule"][name] for name in COUNTERS},
        _kept(drift_sample_codes),
        dict(state["last"]),
        _kept(state["frequencies"]),
    )


def same_functions(own: ResolvedOptions, other: ResolvedOptions) -> bool:
    """Whether hash functions and codes of tables with ``own`` options are of use to tables with ``other``."""
    names = {field.name for field in dataclasses.fields(own)} - _NOT_IN_CODES
    return all(getattr(own, name) == getattr(other, name) for name in names)


def _in_present_format(state: Any) -> dict[str, Any]:
    version = state.get("format") if isinstance(state, dict) else state
    if not isinstance(state, dict) or type(version) is not int or not 1 <= version <= FORMAT:
        raise ValueError(
            f"{_WHERE}: state: expected what sampler_state returned (format 1 to {FORMAT}), got "
            f"{_short(version)}"
        )
    return in_present_format(state)


def _kept(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else _copy(tensor)


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def _refuse_removed(options: Any) -> None:
    for name, removed in _REMOVED.items():
        given = options.get(name) if isinstance(options, dict) else None
        for value in given if isinstance(given, (tuple, list)) else (given,):
            if isinstance(value, str) and value in removed:
                raise ValueError(
                    f"{_WHERE}: options.{name}: expected one that this version has, got {value!r}, which was "
                    f"removed: make the layer with another {name}, load its weights and optimizer, and "
                    "leave the sampler state out: training goes on with new tables"
                )


def _check_settings(tables: HashTables, state: dict[str, Any]) -> None:
    shape = (tables.out_features, tables.in_features, tables.has_bias)
    given = state["shape"]
    # as text: in a damaged one there may be anything
    if not isinstance(given, (tuple, list)) or list(map(repr, given)) != list(map(repr, shape)):
        raise ValueError(
            f"{_WHERE}: state: expected (out_features, in_features, bias) {shape}, "
            f"got {_short(given)}: make the layer with the sizes that were saved"
        )
    own, saved = dataclasses.asdict(tables.options), state["options"]
    if not isinstance(saved, dict):
        _damaged("options", "a dict", saved)
    for name in sorted(own.keys() - _NOT_IN_CODES):
        value = saved.get(name)
        if isinstance(value, Tensor) or value != own[name]:
            raise ValueError(
                f"{_WHERE}: options.{name}: expected {own[name]!r}, that of these tables, got "
                f"{_short(value)}: make the layer with the options that were saved"
            )


def _check_schedule(state: dict[str, Any]) -> None:
    schedule, last = state["schedule"], state["last"]
    if not isinstance(schedule, dict):
        _damaged("schedule", "a dict", schedule)
    for name in _INT_COUNTERS:
        count = schedule.get(name)
        if type(count) is not int or not 0 <= count < 1 << 63:
            _damaged(f"schedule.{name}", "an int from 0 to 2^63 - 1", count)
    for name, low, high in (
        ("upkeep_seconds", 0, math.inf),
        ("period", 1, math.inf),
        ("drift", 0, 1),
    ):
        value: Any = schedule.get(name)
        if not _is_number(value) or not low <= value <= high:
            _damaged(f"schedule.{name}", f"a finite number from {low} to {high}", value)
    if not isinstance(last, dict) or not all(_is_number(value) for value in last.values()):
        _damaged("last", "a dict of finite numbers", last)
    if not last.keys() <= _LAST:
        _damaged("last", f"the keys {', '.join(sorted(_LAST))}", ", ".join(map(str, last)))


def _family(tables: HashTables, state: dict[str, Any]) -> HashFamily | None:
    seed, functions = state["seed"], state["functions"]
    if not isinstance(functions, dict):
        _damaged("functions", "a dict", functions)
    if seed is None:
        if functions:
            _damaged("functions", "none without a seed", ", ".join(map(str, functions)))
        return None
    if type(seed) is not int or not 0 <= seed < 1 << 63:
        _damaged("seed", "an int from 0 to 2^63 - 1, or None", seed)
    if tables.options.family == "exact":
        _damaged("seed", "None with family='exact', which hashes nothing", seed)
    family = make_family(tables.options, tables.in_features, has_bias=tables.has_bias, seed=seed)
    drawn = dict(family.named_buffers())
    learnt = _learnt_functions(tables, family)
    if functions.keys() != drawn.keys() | learnt.keys():
        _damaged(
            "functions",
            f"the keys {', '.join(sorted(drawn.keys() | learnt.keys()))}",
            ", ".join(sorted(map(str, functions))) or "none",
        )
    for name, value in functions.items():
        where = f"functions.{name}"
        if name in learnt:
            _check_tensor(where, value, *learnt[name])
        else:
            _check_tensor(where, value, (drawn[name].dtype,), tuple(drawn[name].shape))
        if value.is_floating_point():
            _check_finite(where, value)
    _check_function_values(tables, family, functions)
    for name, value in functions.items():
        setattr(family, name, _copy(value))
    return family


def _learnt_functions(
    tables: HashTables, family: HashFamily
) -> dict[str, tuple[tuple[torch.dtype, ...], tuple[int, ...]]]:
    """Dtypes and shape of the functions that come from the rows, not from the seed."""
    width = tables.in_features + tables.has_bias
    learnt: dict[str, tuple[tuple[torch.dtype, ...], tuple[int, ...]]] = {}
    if family.center:
        learnt["mean_row"] = _FLOATS, (width,)
    if family.augment_norms:
        learnt["norm_bound"] = (torch.float64,), ()
    if isinstance(family, KMeans):
        count = 1 << family.K
        learnt["buckets"] = (torch.float32,), (family.L, count, width + 1)
        learnt["sizes"] = (torch.int32,), (family.L, count)
        groups = group_count(count)
        if groups:
            learnt["group_offsets"] = (torch.int64,), (family.L, groups + 1)
            learnt["group_members"] = (torch.int32,), (family.L, count)
    return learnt


def _check_function_values(
    tables: HashTables, family: HashFamily, functions: dict[str, Tensor]
) -> None:
    if "signs" in functions and not bool((functions["signs"].abs() == 1).all()):
        _damaged("functions.signs", "values -1 and 1", "others")
    if "coordinates" in functions:
        _check_range("functions.coordinates", functions["coordinates"], 0, family.width - 1)
    if "norm_bound" in functions:
        _check_range("functions.norm_bound", functions["norm_bound"], 0, math.inf)
    if not isinstance(family, KMeans):
        return
    if not bool(functions["fitted"]):
        _damaged("functions.fitted", "True", False)
    sizes = functions["sizes"].long()
    _check_range("functions.sizes", sizes, 0, tables.out_features)
    if not bool((sizes.sum(1) == tables.out_features).all()):
        _damaged("functions.sizes", f"{tables.out_features} rows in each table", sizes.sum(1))
    if "group_offsets" in functions:
        offsets, members = functions["group_offsets"], functions["group_members"]
        count = members.shape[1]
        ends = bool((offsets[:, 0] == 0).all()) and bool((offsets[:, -1] == count).all())
        if not ends or not bool((offsets.diff() >= 0).all()):
            _damaged("functions.group_offsets", f"values rising from 0 to {count}", "others")
        if not torch.equal(members.sort().values, torch.arange(count).int().expand_as(members)):
            _damaged("functions.group_members", f"each of 0 to {count - 1} once", "others")


def _check_codes(name: str, codes: Any, family: HashFamily, count: int) -> None:
    dtype = torch.int16 if family.bits <= 15 else torch.int32
    _check_tensor(name, codes, (dtype,), (family.L, count))
    _check_range(name, codes, 0, (1 << family.bits) - 1)


def _check_rows(name: str, rows: Any, neurons: int) -> None:
    _check_tensor(name, rows, (torch.int64,), (-1,))
    _check_range(name, rows, 0, neurons - 1)


def _sq8(tables: HashTables, state: dict[str, Any], family: HashFamily) -> SQ8Rows | None:
    given: list[Any] = [state[name] for name in ("sq8_codes", "sq8_terms", "sq8_places")]
    if all(tensor is None for tensor in given):
        return None
    codes, terms, places = given
    neurons, d = tables.out_features, tables.in_features
    quads, room = (d + 7) // 8 * 2, neurons // 16 + min(neurons, 1 << family.bits)
    _check_tensor("sq8_codes", codes, (torch.uint8,), (-1, quads, 16, 4))
    if codes.shape[0] < room:
        _damaged("sq8_codes", f"at least {room} blocks", codes.shape[0])
    _check_tensor("sq8_terms", terms, (torch.float32,), (codes.shape[0], 2, 16))
    _check_tensor("sq8_places", places, (torch.int32,), (neurons,))
    own = state["codes"][0].long()
    order = own.argsort(stable=True)
    held, which = own[order].unique_consecutive(return_inverse=True)
    sizes = torch.bincount(which, minlength=held.shape[0])
    begins = sizes.cumsum(0) - sizes
    blocks = (sizes + 15) // 16
    first = (blocks.cumsum(0) - blocks) * 16
    if not torch.equal(places[order].long(), first[which] + torch.arange(neurons) - begins[which]):
        _damaged("sq8_places", "those that the codes give", "others")
    return SQ8Rows(_copy(codes), _copy(terms), _copy(places))


def _check_frequencies(tables: HashTables, shares: Any) -> None:
    _check_tensor("frequencies", shares, (torch.float64,), (tables.out_features,))
    _check_range("frequencies", shares, 0, 1)
    if not bool((shares > 0).all()):
        _damaged("frequencies", "positive values", "some that are 0")


def _check_tensor(
    name: str, value: Any, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...]
) -> None:
    names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    shown = str(tuple("any" if size < 0 else size for size in shape)).replace("'", "")
    expected = f"a CPU tensor {names} {shown}"
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.device.type != "cpu":
        _damaged(name, expected, value)
    fits = value.dim() == len(shape) and all(
        own < 0 or own == given for own, given in zip(shape, value.shape, strict=True)
    )
    if value.dtype not in dtypes or not fits:
        _damaged(name, expected, value)


def _check_range(name: str, value: Tensor, low: float, high: float) -> None:
    if value.numel() and not (low <= value.min().item() and value.max().item() <= high):
        got = f"{value.min().item()} to {value.max().item()}"
        _damaged(name, f"values from {low} to {high}", got)


def _check_finite(name: str, value: Tensor) -> None:
    if not bool(torch.isfinite(value).all()):
        _damaged(name, "finite values", "NaN or Inf")


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _short(value: Any) -> str:
    if isinstance(value, Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        return f"a tensor {dtype} {tuple(value.shape)}"
    text = repr(value)
    return text if len(text) <= 100 else text[:100] + "..."


def _damaged(name: str, expected: str, got: Any) -> NoReturn:
    which = f"state['{name}']" if name else "state"
    got = got if isinstance(got, str) else _short(got)
    raise ValueError(
        f"{_WHERE}: {which}: expected {expected}, got {got}: the state is damaged, or of "
        "another version; without it, training goes on with new tables"
    )
