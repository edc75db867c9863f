"""HashTables: a layer's neurons in buckets, kept fresh as the weights move."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from . import ops
from .hashing import HashFamily, make_family
from .options import LSHOptions

if TYPE_CHECKING:
    from .sampling import ActiveSet


def draw_seed(generator: torch.Generator | None = None) -> int:
    """A seed from ``generator``, or from torch's global one (so ``torch.manual_seed`` governs it)."""
    return int(torch.randint(2**63 - 1, (), generator=generator))


class HashTables(nn.Module):
    """L hash tables over the rows of a weight matrix, in packed (CSR) buckets.

    Memory: 4 bytes per neuron and table for the buckets, 2 (codes up to 15 bits) or 4 for the codes,
    which make it cheap to rehash only the rows that changed. All are integer buffers that no state
    dict holds: tables are remade from the weights at the first use, and after loading.

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

    def __init__(
        self, options: LSHOptions, out_features: int, in_features: int, *, has_bias: bool
    ) -> None:
        super().__init__()
        self.options = options.resolve(out_features, in_features)
        self.out_features = out_features
        self.in_features = in_features
        self.has_bias = has_bias
        for name in ("codes", "offsets", "ids", "dirty"):
            self.register_buffer(name, None, persistent=False)
        self.family: HashFamily | None = None
        self.clear()

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
        options = self.options
        assert isinstance(options.budget, int) and isinstance(options.tail, int)
        return 0 < options.budget < self.out_features and options.tail < self.out_features

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
        """Hashes ``rows`` (int64 (n), distinct; None for all) with the present functions.

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

    def mark_dirty(self, rows: Tensor, version: int | None = None) -> None:
        """Says that ``rows`` (int64 (n)) are about to change.

        ``version``, that of the weight now (``weight._version``), keeps the marks through a rehash that
        comes before the change itself, as when gradients are accumulated over several batches.
        """
        if self.dirty is None:
            return
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

    def memory_bytes(self) -> int:
        """Bytes of the tables and of what keeps them fresh."""
        return sum(buffer.nbytes for buffer in self.buffers())

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

    def extra_repr(self) -> str:
        return f"out_features={self.out_features}, built={self.built}"


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
