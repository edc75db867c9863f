"""HashTables: a layer's neurons in buckets, kept fresh as the weights move."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from .. import ops
from ..hashing.base import HashFamily
from ..hashing.make import make_family
from ..inference_mode import keeps_normal_tensors, version_of
from ..options import LSHOptions, ResolvedOptions
from ..randomness import draw_seed
from ..tails.state import TailState
from .built_tables import BuiltTables, Rehashed, SQ8Rows, check_size, finite_codes
from .handles import new_handle
from .pending import PendingRows
from .saved_state import SavedState, read_state
from .schedule import Schedule, SeenSteps
from .state import state_of, statistics_of, tensors_of

if TYPE_CHECKING:
    from ..active_set import ActiveSet

# Share of the rows from which hashing all, in order, costs less than hashing some and moving their codes.
_MOST_ROWS = 0.75


class HashTables:
    """L hash tables over the rows of a weight matrix, in packed (CSR) buckets.

    Memory: 4 bytes per neuron and table for the buckets, 4 more per bucket for where it begins (a table has
    2^bits of them, bits as of ``K``), and 2 (codes up to 15 bits) or 4 per neuron and table for the codes,
    which make it cheap to rehash only the rows that changed. ``"kmeans"`` adds two rows of float32 per
    bucket, its centroid and its mean. Where one table is searched, as by default, the rows are kept as int8
    too: in_features + 12 bytes a neuron.

    It is no module, and its tensors are no buffers: what copies, averages or broadcasts the buffers of a
    model (state dicts, ``AveragedModel``, ``DistributedDataParallel``) leaves tables alone. They are made
    from the weights at the first use, and again after loading.

    Args:
        options: how to hash and when to rehash; ``"auto"`` is resolved for the shape.
        out_features: number of neurons N.
        in_features: their width d.
        has_bias: whether rows are hashed with their bias appended.

    Attributes:
        options: the resolved options.
        family: the hash functions, None before the first build; they outlive the tables that
            :meth:`invalidate` drops.
        schedule: when tables are rehashed, and what has been done so far.
        pending: rows that the optimizer's next step changes.
        tail: what the tail is drawn from.
        last_step: statistics of the last training step.
        handle: the number by which compiled graphs find these tables.

    Raises:
        ValueError: tables of far more buckets than neurons would take over 1 GiB.
    """

    @keeps_normal_tensors
    def __init__(
        self, options: LSHOptions, out_features: int, in_features: int, *, has_bias: bool
    ) -> None:
        self.options = options.resolve(out_features, in_features)
        self.out_features = out_features
        self.in_features = in_features
        self.has_bias = has_bias
        # how often compiled graphs have drawn, see sampling/traced_step.py
        self.draws = torch.zeros((), dtype=torch.int64, device="cpu")
        self.tail = TailState(self.options.tail_parts, out_features)
        if self.uses_tables:
            self._check_size()
        self.handle = new_handle(self)
        self.clear()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.handle = new_handle(self)  # a copy is not its original

    def read_with(self, options: ResolvedOptions) -> HashTables:
        """The same tables, read with ``options`` that differ only in how they are read (budget, probes,
        rerank, bucket_cap, ...); for measuring."""
        found = copy.copy(self)
        found.options = options
        # what is done with them counts nothing here
        for part in ("schedule", "pending", "tail"):
            setattr(found, part, copy.copy(getattr(self, part)))
        return found

    def clear(self) -> None:
        """Drops tables, functions and schedule; the next use builds anew."""
        self.family: HashFamily | None = None
        self._built: BuiltTables | None = None
        self.schedule = Schedule(self.options)
        self.pending = PendingRows()
        self.last_step: dict[str, float] = {}
        self._seen_steps = SeenSteps()

    def become(self, other: HashTables) -> None:
        """Goes on as ``other``, which is used no more, under the handle by which graphs find these tables."""
        self.__dict__.update(vars(other) | {"handle": self.handle, "draws": self.draws})

    def install(self, built: BuiltTables) -> None:
        """Takes up tables that were made for these options; the schedule is not told."""
        self._built = built
        self.family = built.family

    def invalidate(self) -> None:
        """Says that the weights have changed as a whole: all rows are rehashed at the next use."""
        self._built = None

    @property
    def built(self) -> bool:
        return self._built is not None

    def require_built(self) -> BuiltTables:
        """The tables as built.

        Raises:
            RuntimeError: there are none.
        """
        if self._built is None:
            raise RuntimeError(
                "HashTables: expected built tables, got none: call rebuild(weight, bias) first"
            )
        return self._built

    @property
    def codes(self) -> Tensor | None:
        return None if self._built is None else self._built.codes

    @property
    def offsets(self) -> Tensor | None:
        return None if self._built is None else self._built.offsets

    @property
    def ids(self) -> Tensor | None:
        return None if self._built is None else self._built.ids

    @property
    def dirty(self) -> Tensor | None:
        return None if self._built is None else self._built.dirty

    @property
    def sq8(self) -> SQ8Rows | None:
        return None if self._built is None else self._built.sq8

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
            return
        self._check_size()
        with self.schedule.upkeep():
            seed = draw_seed(generator)
            family = make_family(self.options, self.in_features, has_bias=self.has_bias, seed=seed)
            family.fit(weight, bias, self.family)
            self._hash_all(family, weight, bias)
        self.schedule.rebuilds += 1

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
        with self.schedule.upkeep():
            family = self.family.copied()  # that of the tables stays until the rows are hashed
            if rows is None or self._built is None:
                family.adapt(weight, bias)
                self._hash_all(family, weight, bias)
            else:
                family.follow(weight, bias)
                if rows.shape[0] > _MOST_ROWS * self.out_features:
                    self._hash_all(family, weight, bias)
                else:
                    self._hash_some(family, weight, bias, rows)
        self.schedule.rehashes += 1

    def _hash_all(self, family: HashFamily, weight: Tensor, bias: Tensor | None) -> None:
        codes = finite_codes(family.row_codes(weight, bias))
        sq8, self._built = self.sq8, None  # the old buckets make room
        self._install(BuiltTables.of_codes(family, codes, sq8), weight, bias)

    def _hash_some(
        self, family: HashFamily, weight: Tensor, bias: Tensor | None, rows: Tensor
    ) -> None:
        rows = torch.unique(rows)
        fresh = finite_codes(family.row_codes(weight, bias, rows), rows)
        built = self.require_built()
        codes, sq8, dirty = built.codes, built.sq8, built.dirty.index_fill(0, rows, False)
        rehashed = Rehashed(rows, built.offsets)
        if bool(ops.update_codes_(codes, rows, fresh).any()):
            del built
            self._built = None  # the old buckets make room
            built = BuiltTables.of_codes(family, codes, sq8)
        self._install(built._replace(family=family, dirty=dirty), weight, bias, rehashed)

    def _install(
        self,
        built: BuiltTables,
        weight: Tensor,
        bias: Tensor | None,
        rehashed: Rehashed | None = None,
    ) -> None:
        """Takes up tables whose rows have just been hashed, all of them or those that are ``rehashed``."""
        built = built.described(weight, bias, searched=self.searches, rehashed=rehashed)
        self.pending.mark(built.dirty)
        self.family, self._built = built.family, built
        self.schedule.restart(built.family, weight, bias)

    def _check_size(self) -> None:
        check_size(self.options, self.out_features, self.in_features, has_bias=self.has_bias)

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
        if self.pending.have_changed(version_of(weight)):
            self._update_sq8(weight, bias)
            self.pending.clear()
        due = advance and self.schedule.is_over
        if self.family is None:
            self.rebuild(weight, bias, generator=generator)
        elif self._built is None:
            self.rehash(weight, bias)
        elif due:
            with self.schedule.upkeep():
                self._renew_if_drifted(self.family, weight, bias, all_rows_move, generator)
        self.schedule.advance(int(advance))

    def _renew_if_drifted(
        self,
        family: HashFamily,
        weight: Tensor,
        bias: Tensor | None,
        all_rows_move: bool,
        generator: torch.Generator | None,
    ) -> None:
        """Rehashes or rebuilds at the end of a period: under ``schedule="drift"`` only if the codes of the
        drift sample have changed by enough; if not, the next look is a period away."""
        schedule = self.schedule
        drift = schedule.look_at_drift(family, weight, bias)
        if drift is not None and drift <= self.options.drift:
            schedule.period += self.options.rehash_every
        elif schedule.rebuilds_next:
            self.rebuild(weight, bias, generator=generator)
            schedule.rehashes += 1
            schedule.begin_next_period()
        else:
            rows = None if all_rows_move else self.require_built().dirty.nonzero().flatten()
            self.rehash(weight, bias, rows=rows)
            schedule.begin_next_period()
        if drift is not None:
            schedule.count_drift_check(drift)

    def _update_sq8(self, weight: Tensor, bias: Tensor | None) -> None:
        """Updates the int8 copies of the rows that the last step changed: a search that sees rows as they
        were at the last rehash finds negatives that are hard no longer."""
        rows = self.pending.rows() if self.pending.have_changed(version_of(weight)) else None
        if self.sq8 is not None and rows is not None:
            own_bias = None if bias is None else bias.detach()
            self.sq8.rewrite_rows_(weight.detach(), own_bias, torch.unique(rows))

    def meet(self, seed: int, version: int, *, moving: bool) -> Literal["before", "after"] | None:
        """When a step that drew ``seed`` at the weight's ``version`` has its upkeep: before it draws.

        The recomputation of one of the last steps (activation checkpointing restores the random state)
        must find the same tables and is no step of its own: none. But where the first pass was without
        gradients, it is the recomputation that trains: after its draw.
        """
        trained = self._seen_steps.see(seed, version, moving=moving)
        if trained is None or not self.built:
            return "before"
        return "after" if moving and not trained else None

    def mark_dirty(self, rows: Tensor, version: int | None = None) -> None:
        """Says that ``rows`` (int64 (n)) are about to change.

        ``version``, that of the weight now (:func:`version_of`), keeps the marks through a rehash that
        comes before the change itself, as when gradients are accumulated over several batches.
        """
        if self._built is not None:
            self._built.dirty[rows] = True
        if version is not None:
            self.pending.add(rows, version)

    def record(self, active: ActiveSet) -> None:
        """Remembers what the last training step computed, for :meth:`stats`."""
        self.last_step = {
            "active_per_sample": active.active_per_sample,
            "union": float(active.rows.shape[0]),
            "ids_read": float(active.ids_read),
        }

    def set_frequencies(self, counts: Tensor, power: float = 0.75) -> None:
        """Makes ``counts ** power`` the shares of ``tail_distribution="frequencies"``, see
        :meth:`LSHLinear.set_frequencies`."""
        self.tail.set_frequencies(counts, power)

    def check_tail(self, name: str) -> None:
        """Raises a ValueError, in the name of a loss, if the tail cannot be drawn."""
        if self.tail.lacks_frequencies and not self.exact:
            raise ValueError(
                f"{name}: tables: expected class counts, which tail_distribution='frequencies' draws from, "
                "got none: call layer.set_frequencies(counts) first"
            )

    def sampler_state(self, weight: Tensor, bias: Tensor | None) -> dict[str, Any]:
        """What :func:`slide_torch.sampler_state` keeps of these tables over ``weight`` and ``bias``."""
        self._update_sq8(weight, bias)  # the next step would, but will not know of these rows
        return state_of(self, weight)

    def load_sampler_state(self, state: dict[str, Any], weight: Tensor) -> None:
        """Takes up what :meth:`sampler_state` returned; ``weight`` is the one loaded beside it.

        Raises:
            ValueError: it is of tables with other options or of another shape, or damaged; nothing is
                changed.
        """
        self.take_up(read_state(self, state), weight)

    @keeps_normal_tensors
    def take_up(self, saved: SavedState, weight: Tensor) -> None:
        """Goes on from a state that has been read for these tables over ``weight``."""
        self.clear()
        self.family = saved.family
        if saved.family is not None and saved.codes is not None and saved.dirty is not None:
            self._built = BuiltTables.of_codes(saved.family, saved.codes, saved.sq8)
            self._built.dirty[saved.dirty] = True
        if saved.changing is not None:
            self.pending.add(saved.changing, version_of(weight))
        self.schedule.take_up(saved.counters, saved.drift_sample_codes)
        self.last_step = saved.last_step
        if saved.frequencies is not None:
            self.tail.frequencies = saved.frequencies

    def tensors(self) -> dict[str, Tensor]:
        """The tables' tensors, those of the hash functions included, by name."""
        return tensors_of(self)

    def memory_bytes(self) -> int:
        """Bytes of the tables and of what keeps them fresh."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def stats(self) -> dict[str, float]:
        """Training steps seen, rehashes, rebuilds, seconds of upkeep; under ``schedule="drift"`` how often it
        looked, and the share of codes that it last found changed; of the last step the active
        neurons per sample, their union over the batch, and the ids read from buckets (of all samples);
        once built the bytes of the tables, the share of dirty rows, and the mean and largest load of
        non-empty buckets, over all tables."""
        return statistics_of(self)

    def __repr__(self) -> str:
        return f"HashTables(out_features={self.out_features}, built={self.built})"
