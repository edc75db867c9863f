"""HashTables: a layer's neurons in buckets, kept fresh as the weights move."""

from __future__ import annotations

import dataclasses
import itertools
import time
import weakref
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from . import ops
from .hashing import HashFamily, make_family
from .options import LSHOptions

if TYPE_CHECKING:
    from .sampling import ActiveSet


_HANDLES = itertools.count()
_TABLES: weakref.WeakValueDictionary[int, HashTables] = weakref.WeakValueDictionary()

# Steps whose recomputation is known: as many as may lie between a forward and its backward.
_REMEMBERED_STEPS = 64

# Share of the rows from which on hashing all, in order, costs less than hashing these and moving their codes.
_MOST = 0.75

# Counters of the schedule, kept by sampler_state.
_SCHEDULE = ("steps", "rehashes", "rebuilds", "upkeep_seconds", "_period", "_since_rehash")

# Options that may differ between the layer that was saved and the one that goes on.
_NOT_IN_CODES = {
    *("pattern", "budget", "batch_budget", "tail", "correction", "probes", "rerank", "bucket_cap"),
    *("rehash_every", "rehash_growth", "rebuild_every"),
}


def draw_seed(generator: torch.Generator | None = None) -> int:
    """A seed from ``generator``, or from torch's global one (so ``torch.manual_seed`` governs it)."""
    return int(torch.randint(2**63 - 1, (), generator=generator))


class HashTables:
    """L hash tables over the rows of a weight matrix, in packed (CSR) buckets.

    Memory: 4 bytes per neuron and table for the buckets, 2 (codes up to 15 bits) or 4 for the codes,
    which make it cheap to rehash only the rows that changed. It is no module, and its tensors are no
    buffers: what copies, averages or broadcasts those of a model (state dicts, ``AveragedModel``,
    ``DistributedDataParallel``) leaves tables alone. They are remade from the weights at the first use,
    and after loading.

    Args:
        options: how to hash and when to rehash; ``"auto"`` is resolved for the shape.
        out_features: number of neurons N.
        in_features: their width d.
        has_bias: whether rows are hashed with their bias appended.
    """

    codes: Tensor | None
    offsets: Tensor | None
    ids: Tensor | None
    dirty: Tensor | None
    family: HashFamily | None

    def __init__(
        self, options: LSHOptions, out_features: int, in_features: int, *, has_bias: bool
    ) -> None:
        self.options = options.resolve(out_features, in_features)
        self.out_features = out_features
        self.in_features = in_features
        self.has_bias = has_bias
        # how often compiled graphs have drawn, see graph.py
        self.draws = torch.zeros((), dtype=torch.int64, device="cpu")
        self._enroll()
        self.clear()

    def _enroll(self) -> None:
        """Takes a number by which compiled graphs, that hold no objects, find these tables."""
        self.handle = next(_HANDLES)
        _TABLES[self.handle] = self

    @staticmethod
    def of_handle(handle: int) -> HashTables:
        """The tables whose ``handle`` this is, in this process."""
        return _TABLES[handle]

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._enroll()  # a copy is not its original

    def clear(self) -> None:
        """Forgets tables, functions and schedule; the next use builds anew."""
        self.codes = self.offsets = self.ids = self.dirty = None
        self.family = None
        self.steps = 0
        self.rehashes = 0
        self.rebuilds = 0
        self.upkeep_seconds = 0.0
        self._period = float(self.options.rehash_every)
        self._since_rehash = 0
        self._last: dict[str, float] = {}
        self._met: dict[tuple[int, int], bool] = {}
        self._pending: list[Tensor] = []
        self._pending_version = -1

    def invalidate(self) -> None:
        """Says that the weights have changed as a whole: all rows are rehashed at the next use."""
        self.codes = None

    @property
    def built(self) -> bool:
        return self.codes is not None

    @property
    def uses_tables(self) -> bool:
        """Whether anything is retrieved: not if nothing, or everything, is active."""
        return self.options.budget != 0 and not self.exact

    @property
    def exact(self) -> bool:
        """Whether every neuron is active."""
        options = self.options
        assert isinstance(options.budget, int) and isinstance(options.tail, int)
        return options.budget >= self.out_features or options.tail >= self.out_features

    @torch.no_grad()
    def rebuild(
        self, weight: Tensor, bias: Tensor | None, *, generator: torch.Generator | None = None
    ) -> None:
        """Draws new hash functions and hashes every row.

        Raises:
            ValueError: rows hold NaN or Inf; nothing is changed.
        """
        started = time.perf_counter()
        family = make_family(
            self.options, self.in_features, has_bias=self.has_bias, seed=draw_seed(generator)
        )
        family.fit(weight, bias)
        codes = _finite(family.row_codes(weight, bias), None)
        self.family = family
        self._install(codes)
        self.rebuilds += 1
        self._finish(started)

    @torch.no_grad()
    def rehash(self, weight: Tensor, bias: Tensor | None, *, rows: Tensor | None = None) -> None:
        """Hashes ``rows`` (int64 (n), distinct) with the present functions. None, for all, also adapts the
        functions to where the rows lie now. Where ``rows`` are most of them, the others are hashed too.

        Raises:
            ValueError: rows hold NaN or Inf; nothing is changed.
        """
        if self.family is None:
            return self.rebuild(weight, bias)
        started = time.perf_counter()
        if rows is None or self.codes is None:
            before = self.family.center, self.family.norm_bound
            self.family.adapt(weight, bias)
            try:
                self._install(_finite(self.family.row_codes(weight, bias), None))
            except ValueError:
                self.family.center, self.family.norm_bound = before
                raise
        elif rows.shape[0] > _MOST * self.out_features:
            self._install(_finite(self.family.row_codes(weight, bias), None))
        else:
            fresh = _finite(self.family.row_codes(weight, bias, rows), rows)
            moved = ops.update_codes_(self.codes, rows, fresh)
            assert self.dirty is not None
            others = self.dirty.index_fill(0, rows, False)
            if bool(moved.any()):
                self._install(self.codes)
            self.dirty = others
            self._keep_pending()
        self.rehashes += 1
        self._finish(started)

    def maintain(
        self,
        weight: Tensor,
        bias: Tensor | None,
        *,
        advance: bool,
        all_rows_move: bool,
        generator: torch.Generator | None = None,
    ) -> None:
        """Builds the tables if there are none, and where ``advance`` takes one training step of the
        schedule: rehashes or rebuilds when it is time.

        ``all_rows_move`` says that rows outside the active set may have changed too (an optimizer with
        momentum under dense gradients moves every row it ever met), so that all are rehashed.
        """
        if weight._version != self._pending_version:
            self._pending = []  # the change has happened
        if self.family is None:
            self.rebuild(weight, bias, generator=generator)
        elif self.codes is None:
            self.rehash(weight, bias)
        elif advance and self._since_rehash >= self._period:
            every = self.options.rebuild_every
            assert isinstance(every, int)
            if every and (self.rehashes + 1) % every == 0:
                self.rebuild(weight, bias, generator=generator)
                self.rehashes += 1
            else:
                assert self.dirty is not None
                rows = None if all_rows_move else self.dirty.nonzero().flatten()
                self.rehash(weight, bias, rows=rows)
            self._period *= self.options.rehash_growth
        self.steps += advance
        self._since_rehash += advance

    def meet(self, seed: int, version: int, *, moving: bool) -> Literal["before", "after"] | None:
        """When a step that drew ``seed`` at the weight's ``version`` has its upkeep: before it draws.

        The recomputation of one of the last steps (activation checkpointing restores the random state)
        must find the same tables and is no step of its own: none. But where the first pass was without
        gradients, it is the recomputation that trains: after its draw.
        """
        counted = self._met.pop((seed, version), None)
        self._met[seed, version] = moving or bool(counted)
        if len(self._met) > _REMEMBERED_STEPS:
            del self._met[next(iter(self._met))]
        if counted is None or not self.built:
            return "before"
        return "after" if moving and not counted else None

    def mark_dirty(self, rows: Tensor, version: int | None = None) -> None:
        """Says that ``rows`` (int64 (n)) are about to change.

        ``version``, that of the weight now (``weight._version``), keeps the marks through a rehash that
        comes before the change itself, as when gradients are accumulated over several batches.
        """
        if self.dirty is not None:
            self.dirty[rows] = True
        if version is not None:
            if version != self._pending_version:
                self._pending, self._pending_version = [], version
            self._pending.append(rows)

    def record(self, active: ActiveSet) -> None:
        """Remembers what the last training step computed, for :meth:`stats`."""
        self._last = {
            "active_per_sample": active.active_per_sample,
            "union": float(active.rows.shape[0]),
            "ids_read": float(active.ids_read),
        }

    def _install(self, codes: Tensor) -> None:
        assert self.family is not None
        self.codes = codes
        self.offsets = self.ids = None  # the old ones make room
        self.offsets, self.ids = ops.build_tables(codes, self.family.bits)
        self.dirty = torch.zeros(self.out_features, dtype=torch.bool)
        self._keep_pending()

    def _keep_pending(self) -> None:
        assert self.dirty is not None
        for rows in self._pending:
            self.dirty[rows] = True

    def _finish(self, started: float) -> None:
        self._since_rehash = 0
        self.upkeep_seconds += time.perf_counter() - started

    def sampler_state(self, weight: Tensor) -> dict[str, Any]:
        """What :func:`slide_torch.sampler_state` keeps of these tables over ``weight``."""
        changing = self._pending if weight._version == self._pending_version else []
        return {
            "format": 1,
            "options": dataclasses.asdict(self.options),
            "shape": (self.out_features, self.in_features, self.has_bias),
            "seed": None if self.family is None else self.family.seed,
            "functions": {} if self.family is None else dict(self.family.named_buffers()),
            "codes": self.codes,
            "dirty": None if self.dirty is None else self.dirty.nonzero().flatten(),
            "changing": torch.cat(changing) if changing else None,
            "schedule": {name: getattr(self, name) for name in _SCHEDULE},
            "last": dict(self._last),
        }

    def load_sampler_state(self, state: dict[str, Any], weight: Tensor) -> None:
        """Takes up what :meth:`sampler_state` returned; ``weight`` is the one loaded beside it.

        Raises:
            ValueError: it is of tables with other options or of another shape; nothing is changed.
        """
        family = self._check_sampler_state(state)
        self.clear()
        self.family = family
        if state["codes"] is not None:
            self._install(state["codes"].clone())
            assert self.dirty is not None
            self.dirty[state["dirty"]] = True
        if state["changing"] is not None:
            self._pending, self._pending_version = [state["changing"].clone()], weight._version
        self._last = dict(state["last"])
        for name in _SCHEDULE:
            setattr(self, name, state["schedule"][name])

    def _check_sampler_state(self, state: dict[str, Any]) -> HashFamily | None:
        """The saved hash family, if the state fits these tables."""
        where = "HashTables.load_sampler_state"
        if not isinstance(state, dict) or state.get("format") != 1:
            raise ValueError(
                f"{where}: state: expected what sampler_state returned (format 1), "
                f"got {state.get('format') if isinstance(state, dict) else type(state).__name__}"
            )
        shape = (self.out_features, self.in_features, self.has_bias)
        if tuple(state["shape"]) != shape:
            raise ValueError(
                f"{where}: state: expected (out_features, in_features, bias) {shape}, "
                f"got {tuple(state['shape'])}: make the layer with the sizes that were saved"
            )
        own, saved = dataclasses.asdict(self.options), state["options"]
        for name in own.keys() - _NOT_IN_CODES:
            if saved.get(name) != own[name]:
                raise ValueError(
                    f"{where}: options.{name}: expected {own[name]!r}, that of these tables, got "
                    f"{saved.get(name)!r}: make the layer with the options that were saved"
                )
        if state["seed"] is None:
            return None
        family = make_family(
            self.options, self.in_features, has_bias=self.has_bias, seed=state["seed"]
        )
        for name, value in state["functions"].items():
            setattr(family, name, None if value is None else value.clone())
        return family

    def tensors(self) -> dict[str, Tensor]:
        """The tables' tensors, those of the hash functions included, by name."""
        own = {name: getattr(self, name) for name in ("codes", "offsets", "ids", "dirty")}
        functions = {} if self.family is None else dict(self.family.named_buffers(prefix="family"))
        return {name: value for name, value in (own | functions).items() if value is not None}

    def memory_bytes(self) -> int:
        """Bytes of the tables and of what keeps them fresh."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def stats(self) -> dict[str, float]:
        """Training steps seen, rehashes, rebuilds, seconds of upkeep; of the last step the active
        neurons per sample, their union over the batch, and the ids read from buckets; once built the
        share of dirty rows, and the mean and largest load of non-empty buckets."""
        result: dict[str, float] = {
            "steps": self.steps,
            "rehashes": self.rehashes,
            "rebuilds": self.rebuilds,
            "upkeep_seconds": self.upkeep_seconds,
            **self._last,
        }
        if self.offsets is not None and self.dirty is not None:
            load = self.offsets.diff(dim=1)
            result["dirty_share"] = self.dirty.float().mean().item()
            result["bucket_load_mean"] = load[load > 0].float().mean().item()
            result["bucket_load_max"] = float(load.max())
        return result

    def __repr__(self) -> str:
        return f"HashTables(out_features={self.out_features}, built={self.built})"


def _finite(codes: Tensor, rows: Tensor | None) -> Tensor:
    """Refuses codes of rows that held NaN or Inf; all tables mark the same rows, so one is looked at."""
    broken = (codes[0] < 0).nonzero().flatten()
    if broken.numel():
        names = (broken if rows is None else rows[broken]).tolist()
        shown = ", ".join(map(str, names[:5])) + (", ..." if len(names) > 5 else "")
        raise ValueError(
            f"HashTables: weight: expected finite rows, got NaN or Inf in {len(names)} of them "
            f"({shown}). Training has diverged or the weights were overwritten: restore them, or "
            "lower the learning rate."
        )
    return codes
