"""HashTables: a layer's neurons in buckets, kept fresh as the weights move."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import time
import weakref
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from .. import ops, precision
from ..hashing.base import HashFamily
from ..hashing.make import make_family
from ..inference_mode import keeps_normal_tensors, version_of
from ..options import LSHOptions, ResolvedOptions
from ..randomness import draw_seed
from ..tails.proposals import FixedProposal, kernel_sums, log_uniform_shares, power_of_counts
from . import saved_state

if TYPE_CHECKING:
    from ..active_set import ActiveSet


_HANDLES = itertools.count()


_TABLES: weakref.WeakValueDictionary[int, HashTables] = weakref.WeakValueDictionary()


# Steps whose recomputation is known: as many as may lie between a forward and its backward.
_REMEMBERED_STEPS = 64


# Batches whose rows wait, each on its own, for the step that changes them.
_MOST_PENDING = 64


# Share of the rows from which on hashing all, in order, costs less than hashing these and moving their codes.
_MOST = 0.75


# Bytes from which on tables are refused that have far more buckets than there are neurons.
_MUCH = 1 << 30


# Counters of the schedule, kept by sampler_state.
_SCHEDULE = (
    *("steps", "rehashes", "rebuilds", "upkeep_seconds", "drift_checks", "drift"),
    *("_period", "_since_rehash"),
)


class HashTables:
    """L hash tables over the rows of a weight matrix, in packed (CSR) buckets.

    Memory: 4 bytes per neuron and table for the buckets, 4 more per bucket for where it begins (a table has
    2^bits of them, bits as of ``K``), 2 (codes up to 15 bits) or 4 per neuron and table for the codes,
    which make it cheap to rehash only the rows that changed; of ``"kmeans"`` also two rows of float32 per
    bucket, its centroid and its mean; where one table is searched, as by default, also
    the rows as int8, in_features + 12 bytes a neuron. It is no module, and its tensors are no
    buffers: what copies, averages or broadcasts those of a model (state dicts, ``AveragedModel``,
    ``DistributedDataParallel``) leaves tables alone. They are remade from the weights at the first use,
    and after loading.

    Args:
        options: how to hash and when to rehash; ``"auto"`` is resolved for the shape.
        out_features: number of neurons N.
        in_features: their width d.
        has_bias: whether rows are hashed with their bias appended.

    Raises:
        ValueError: tables of far more buckets than neurons would take over 1 GiB.
    """

    # Rows whose codes tell how far all have drifted: a share is known to about 0.01.
    PROBE_ROWS = 512

    codes: Tensor | None
    offsets: Tensor | None
    ids: Tensor | None
    dirty: Tensor | None
    family: HashFamily | None
    row_codes: Tensor | None
    row_terms: Tensor | None
    row_places: Tensor | None
    kernel_sums: Tensor | None
    frequencies: Tensor | None

    @keeps_normal_tensors
    def __init__(
        self, options: LSHOptions, out_features: int, in_features: int, *, has_bias: bool
    ) -> None:
        self.options = options.resolve(out_features, in_features)
        self.out_features = out_features
        self.in_features = in_features
        self.has_bias = has_bias
        # how often compiled graphs have drawn, see graph.py
        self.draws = torch.zeros((), dtype=torch.int64, device="cpu")
        self.frequencies = None
        self._fixed: FixedProposal | None = None
        if self.uses_tables:
            self._check_memory()
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

    def read_with(self, options: ResolvedOptions) -> HashTables:
        """These very tables, read with ``options`` that differ only in how they are read (budget, probes,
        rerank, bucket_cap, ...); for measuring."""
        found = copy.copy(self)
        found.options = options
        return found

    def clear(self) -> None:
        """Forgets tables, functions and schedule; the next use builds anew."""
        self.codes = self.offsets = self.ids = self.dirty = None
        self.row_codes = self.row_terms = self.row_places = None
        self.family = None
        self.kernel_sums = None
        self.steps = 0
        self.rehashes = 0
        self.rebuilds = 0
        self.upkeep_seconds = 0.0
        self.drift_checks = 0
        self.drift = 0.0
        self._probe_codes: Tensor | None = None
        self._period = float(self.options.rehash_every)
        self._since_rehash = 0
        self._last: dict[str, float] = {}
        self._met: dict[tuple[int, int], bool] = {}
        self._pending: list[Tensor] = []
        self._pending_version = -1

    def invalidate(self) -> None:
        """Says that the weights have changed as a whole: all rows are rehashed at the next use."""
        self.codes = None
        self.kernel_sums = None

    @property
    def built(self) -> bool:
        return self.codes is not None

    @property
    def uses_tables(self) -> bool:
        """Whether anything is retrieved from tables: not if nothing, or everything, is active."""
        options = self.options
        return options.budget != 0 and options.family != "exact" and not self.exact

    @property
    def searches(self) -> bool:
        """Whether candidates are the best of all that an input's buckets hold: with one table nothing
        collides twice, so that counting tells nothing."""
        options = self.options
        return options.L == 1 and bool(options.rerank) and self.uses_tables

    @property
    def uses_kernel(self) -> bool:
        """Whether (part of) the tail is drawn from the quadratic kernel."""
        return "quadratic_kernel" in self.options.tail_parts and not self.exact

    @property
    def has_upkeep(self) -> bool:
        """Whether there is anything to keep fresh as the weights move."""
        return self.uses_tables or self.uses_kernel

    @property
    def exact(self) -> bool:
        """Whether every neuron is active."""
        options = self.options
        return options.budget >= self.out_features or options.tail >= self.out_features

    @keeps_normal_tensors
    @torch.no_grad()
    def rebuild(
        self, weight: Tensor, bias: Tensor | None, *, generator: torch.Generator | None = None
    ) -> None:
        """Draws new hash functions and hashes every row (nothing to do for ``family="exact"``).

        Raises:
            ValueError: rows hold NaN or Inf; nothing is changed.
        """
        if self.options.family == "exact":
            self.kernel_sums = None
            return
        self._check_memory()
        started = time.perf_counter()
        family = make_family(
            self.options, self.in_features, has_bias=self.has_bias, seed=draw_seed(generator)
        )
        family.fit(weight, bias, self.family)
        codes = _finite(family.row_codes(weight, bias), None)
        self.family = family
        self._install(codes)
        self.rebuilds += 1
        self._finish(weight, bias, started)

    @keeps_normal_tensors
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
        before = dict(self.family.named_buffers())
        try:
            if rows is None or self.codes is None:
                self.family.adapt(weight, bias)
                codes, dirty = _finite(self.family.row_codes(weight, bias), None), None
            else:
                assert self.dirty is not None
                self.family.follow(weight, bias)
                if rows.shape[0] > _MOST * self.out_features:
                    codes, dirty = _finite(self.family.row_codes(weight, bias), None), None
                else:
                    fresh = _finite(self.family.row_codes(weight, bias, rows), rows)
                    codes, dirty = self.codes, self.dirty.index_fill(0, rows, False)
        except ValueError:
            for name, value in before.items():
                setattr(self.family, name, value)
            raise
        if rows is None or dirty is None:
            self._install(codes)
        else:
            if bool(ops.update_codes_(codes, rows, fresh).any()):
                self._install(codes)
            self.dirty = dirty
            self._keep_pending()
        self.rehashes += 1
        self._finish(weight, bias, started)

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
        schedule: rehashes or rebuilds when it is time. The quadratic kernel's sums are renewed with them.

        ``all_rows_move`` says that rows outside the active set may have changed too (an optimizer with
        momentum under dense gradients moves every row it ever met), so that all are rehashed.
        """
        if version_of(weight) != self._pending_version:  # the change has happened
            self._recode_changed(weight, bias)
            self._pending = []
        due = advance and self._since_rehash >= self._period
        if not self.uses_tables:
            if due:
                self.rehashes += 1
                self._begin_next_period()
                self._since_rehash = 0
                self.kernel_sums = None
        elif self.family is None:
            self.rebuild(weight, bias, generator=generator)
        elif self.codes is None:
            self.rehash(weight, bias)
        elif due and self._is_due(weight, bias):
            every = self.options.rebuild_every
            if every and (self.rehashes + 1) % every == 0:
                self.rebuild(weight, bias, generator=generator)
                self.rehashes += 1
            else:
                assert self.dirty is not None
                rows = None if all_rows_move else self.dirty.nonzero().flatten()
                self.rehash(weight, bias, rows=rows)
            self._begin_next_period()
        if self.uses_kernel and self.kernel_sums is None:
            started = time.perf_counter()
            self.kernel_sums = kernel_sums(weight, bias)
            self.upkeep_seconds += time.perf_counter() - started
        self.steps += advance
        self._since_rehash += advance

    def _begin_next_period(self) -> None:
        every, growth = self.options.rehash_every, self.options.rehash_growth
        if self.options.schedule == "drift":
            self._period = float(every)
        else:
            self._period *= growth

    def _is_due(self, weight: Tensor, bias: Tensor | None) -> bool:
        """Whether to rehash now that the period is over: under ``schedule="drift"`` only if the codes of
        some rows have changed by enough; if not, the next look is a period away."""
        if self.options.schedule == "growing":
            return True
        before = self._probe_codes
        if before is None:  # taken up from a run with the other schedule
            return True
        started = time.perf_counter()
        self.drift = (self._codes_of_probe(weight, bias) != before).float().mean().item()
        self.drift_checks += 1
        self._period += self.options.rehash_every
        self.upkeep_seconds += time.perf_counter() - started
        return self.drift > self.options.drift

    def _codes_of_probe(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Present codes (L, 512) of some rows, the same ones as long as the hash functions' seed."""
        assert self.family is not None
        generator = torch.Generator().manual_seed(self.family.seed)
        rows = torch.randint(self.out_features, (self.PROBE_ROWS,), generator=generator)
        return self.family.row_codes(weight, bias, rows)

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
        tables_ready = self.built or not self.uses_tables
        kernel_ready = self.kernel_sums is not None or not self.uses_kernel
        if counted is None or not (tables_ready and kernel_ready):
            return "before"
        return "after" if moving and not counted else None

    def mark_dirty(self, rows: Tensor, version: int | None = None) -> None:
        """Says that ``rows`` (int64 (n)) are about to change.

        ``version``, that of the weight now (:func:`version_of`), keeps the marks through a rehash that
        comes before the change itself, as when gradients are accumulated over several batches.
        """
        if self.dirty is not None:
            self.dirty[rows] = True
        if version is not None:
            if version != self._pending_version:
                self._pending, self._pending_version = [], version
            elif len(self._pending) == _MOST_PENDING:  # fully_shard keeps the version as it was
                self._pending = [torch.cat(self._pending).unique()]
            self._pending.append(rows)

    def record(self, active: ActiveSet) -> None:
        """Remembers what the last training step computed, for :meth:`stats`."""
        self._last = {
            "active_per_sample": active.active_per_sample,
            "union": float(active.rows.shape[0]),
            "ids_read": float(active.ids_read),
        }

    def _check_memory(self) -> None:
        """Refuses tables that would take much memory for buckets most of which can hold nothing."""
        options = self.options
        assert isinstance(options.K, int) and isinstance(options.L, int)
        per_bucket, useful = 4, 16 * self.out_features
        if options.family == "kmeans":  # a centroid, a mean row and its spread
            per_bucket += 4 * (2 * (self.in_features + self.has_bias) + options.augment_norms + 1)
            useful = self.out_features
        size = (per_bucket * options.L) << options.code_bits
        if size > _MUCH and 1 << options.code_bits > useful:
            fitting = max(_MUCH // (per_bucket * options.L), useful, 2).bit_length() - 1
            raise ValueError(
                f"HashTables: options.K: expected at most {max(1, fitting // options.bits_per_hash)} for "
                f"{self.out_features} neurons in {options.L} tables, got {options.K}: a table would have "
                f"2^{options.code_bits} buckets, {size:,} bytes for all tables"
            )

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

    def _finish(self, weight: Tensor, bias: Tensor | None, started: float) -> None:
        assert self.family is not None and self.offsets is not None and self.ids is not None
        rows = weight.detach(), None if bias is None else bias.detach()
        if self.searches:
            if self.row_codes is None:
                room = ops.empty_codes(rows[0], self.offsets[0], room=True)
                self.row_codes, self.row_terms, self.row_places = room
            assert self.row_terms is not None and self.row_places is not None
            own_codes = (self.row_codes, self.row_terms, self.row_places)
            lists = self.offsets[0].long()
            if not self.family.describes:  # then nobody wants centers of empty buckets
                lists = lists.unique_consecutive()
            centers = precision.code_lists_(*own_codes, *rows, lists, self.ids[0])
            self.family.describe([centers], self.offsets)
        elif self.family.describes:
            self.family.describe(
                [
                    precision.list_centers(*rows, offsets.long(), ids)
                    for offsets, ids in zip(self.offsets, self.ids, strict=True)
                ],
                self.offsets,
            )
        self._since_rehash = 0
        self.kernel_sums = None  # of weights as old as the codes were
        if self.options.schedule == "drift":
            self._probe_codes = self._codes_of_probe(weight, bias)
        self.upkeep_seconds += time.perf_counter() - started

    def set_frequencies(self, counts: Tensor, power: float = 0.75) -> None:
        """Makes ``counts ** power`` the shares of ``tail_distribution="frequencies"``, see
        :meth:`LSHLinear.set_frequencies`."""
        self.frequencies = power_of_counts(counts, power, self.out_features)
        self._fixed = None

    def check_tail(self, name: str) -> None:
        """Raises a ValueError, in the name of a loss, if the tail cannot be drawn."""
        if self.frequencies is None and "frequencies" in self.options.tail_parts and not self.exact:
            raise ValueError(
                f"{name}: tables: expected class counts, which tail_distribution='frequencies' draws from, "
                "got none: call layer.set_frequencies(counts) first"
            )

    def fixed_proposal(self, count: int) -> FixedProposal:
        """Of the parts of the tail whose distribution is fixed, the mean, for ``count`` draws."""
        if self._fixed is None or self._fixed.count != count:
            shares = []
            for part in self.options.tail_parts:
                if part == "uniform":
                    shares.append(np.ones(self.out_features))
                elif part == "log_uniform":
                    shares.append(log_uniform_shares(self.out_features))
                elif part == "frequencies":
                    assert self.frequencies is not None
                    shares.append(self.frequencies.numpy())
            mixed = np.mean([share / share.sum() for share in shares], axis=0)
            self._fixed = FixedProposal.of_shares(mixed, count)
        return self._fixed

    def _recode_changed(self, weight: Tensor, bias: Tensor | None) -> None:
        """Brings the int8 codes of the rows that the last step changed up to date: a search that sees rows as
        they were at the last rehash finds negatives that are hard no longer."""
        if (
            self.row_codes is None
            or version_of(weight) == self._pending_version
            or not self._pending
        ):
            return
        assert self.row_terms is not None and self.row_places is not None
        precision.recode_rows_(
            self.row_codes,
            self.row_terms,
            self.row_places,
            weight.detach(),
            None if bias is None else bias.detach(),
            torch.cat(self._pending).unique(),
        )

    def sampler_state(self, weight: Tensor, bias: Tensor | None) -> dict[str, Any]:
        """What :func:`slide_torch.sampler_state` keeps of these tables over ``weight`` and ``bias``."""
        self._recode_changed(weight, bias)  # the next step would, but will not know of these rows
        changing = self._pending if version_of(weight) == self._pending_version else []
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
            "row_codes": self.row_codes,
            "row_terms": self.row_terms,
            "row_places": self.row_places,
            "probe_codes": self._probe_codes,
            "last": dict(self._last),
            "kernel_sums": self.kernel_sums,
            "frequencies": self.frequencies,
        }

    @keeps_normal_tensors
    def load_sampler_state(self, state: dict[str, Any], weight: Tensor) -> None:
        """Takes up what :meth:`sampler_state` returned; ``weight`` is the one loaded beside it.

        Raises:
            ValueError: it is of tables with other options or of another shape, or damaged; nothing is
                changed.
        """
        family = saved_state.check(self, state, weight)
        self.clear()
        self.family = family
        codes = saved_state.kept(state, "codes")
        if codes is not None:
            self._install(codes)
            assert self.dirty is not None
            self.dirty[state["dirty"]] = True
            if self.searches:
                for name in ("row_codes", "row_terms", "row_places"):
                    setattr(self, name, saved_state.kept(state, name))
                if self.row_codes is None:
                    self.invalidate()
        changing = saved_state.kept(state, "changing")
        if changing is not None:
            self._pending, self._pending_version = [changing], version_of(weight)
        self._last = dict(state["last"])
        self._probe_codes = saved_state.kept(state, "probe_codes")
        if self.uses_kernel:
            self.kernel_sums = saved_state.kept(state, "kernel_sums")
        frequencies = saved_state.kept(state, "frequencies")
        if frequencies is not None:
            self.frequencies = frequencies
        self._fixed = None
        for name in _SCHEDULE:
            setattr(self, name, state["schedule"].get(name, getattr(self, name)))

    def tensors(self) -> dict[str, Tensor]:
        """The tables' tensors, those of the hash functions included, by name."""
        names = [
            *("codes", "offsets", "ids", "dirty", "row_codes", "row_terms", "row_places"),
            *("kernel_sums", "frequencies"),
        ]
        own = {name: getattr(self, name) for name in names}
        functions = {} if self.family is None else dict(self.family.named_buffers(prefix="family"))
        return {name: value for name, value in (own | functions).items() if value is not None}

    def memory_bytes(self) -> int:
        """Bytes of the tables and of what keeps them fresh."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def stats(self) -> dict[str, float]:
        """Training steps seen, rehashes, rebuilds, seconds of upkeep; under ``schedule="drift"`` how often it
        looked, and the share of codes that it last found changed; of the last step the active
        neurons per sample, their union over the batch, and the ids read from buckets (of all samples);
        once built the bytes of the tables, the share of dirty rows, and the mean and largest load of
        non-empty buckets, over all tables."""
        result: dict[str, float] = {
            "steps": self.steps,
            "rehashes": self.rehashes,
            "rebuilds": self.rebuilds,
            "upkeep_seconds": self.upkeep_seconds,
            **self._last,
        }
        if self.options.schedule == "drift":
            result |= {"drift_checks": self.drift_checks, "drift": self.drift}
        if self.offsets is not None and self.dirty is not None:
            load = self.offsets.diff(dim=1)
            result["memory_bytes"] = self.memory_bytes()
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
