"""LSHOptions: how an LSHLinear finds its active neurons."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

MAX_CODE_BITS = 24
MAX_TABLES = 254


def _check_int(name: str, value: Any, low: int, high: int | None, also: str = "") -> None:
    if (
        isinstance(value, bool)
        or not isinstance(value, int)
        or value < low
        or (high is not None and value > high)
    ):
        limits = f"of at least {low}" if high is None else f"from {low} to {high}"
        raise ValueError(f"LSHOptions: {name}: expected an int {limits}{also}, got {value!r}")


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"LSHOptions: {name}: expected one of {choices}, got {value!r}")


@dataclass(frozen=True)
class LSHOptions:
    """Options of :class:`LSHLinear`; ``"auto"`` is settled from the layer's shape by :meth:`resolve`.

    Attributes:
        pattern: ``"shared"``: one active set for the whole batch, so that every sample also meets the
            labels and candidates of all others (most classes for the bytes moved). ``"per_sample"``:
            every sample's softmax runs over its own active set, as in SLIDE (Chen et al. 2020).
        budget: most active neurons per sample, its labels included; labels are active even beyond it.
            ``out_features`` or more makes every neuron active: the layer is then exact. 0 retrieves
            nothing: only labels and tail, and no tables. ``"auto"``: 16 shared, 1,024 per sample.
        tail: neurons drawn uniformly, without replacement, once a batch, on top of the budget.
            ``"auto"``: 1,024 (fewer where that would be over a quarter of the layer).
        correction: ``"none"`` takes the softmax over the active set as it is, which learns to rank in
            the fewest steps but gives no probabilities over all classes. ``"importance"`` weights the
            tail by its inclusion probability, so that loss and gradient estimate those of the full
            softmax (Bengio & Senécal 2008); it needs a tail.
        family: ``"simhash"`` (signs of random projections: Charikar 2002) or ``"dwta"`` (densified
            winner-take-all: Chen & Shrivastava 2018).
        projection: for SimHash, ``"hadamard"`` (structured rotations: Andoni et al. 2015), ``"gaussian"``
            or ``"sparse"`` (entries -1, 0, +1 with a third non-zero: Li et al. 2006). ``"auto"``:
            Hadamard from 32 features on, where its rotations are random enough; Gaussian below.
        center: hash rows relative to their mean. A query's inner products with all rows shift alike, so
            it changes no ranking, and rows that training has pushed in a common direction spread again.
        K: hashes per table. A SimHash is one bit, a DWTA hash log2(``bin_size``) bits; a table's code may
            have at most 24 bits. ``"auto"`` aims at buckets of 64 to 128 neurons, or more where L of
            them would hold fewer than twice the budget, with codes of at most 15 bits.
        L: number of tables, at most 254. ``"auto"``: 50.
        bin_size: for DWTA, coordinates that one hash compares; a power of two.
        bucket_cap: most neurons read from one bucket, starting at a random place in a longer one.
            ``"auto"``: 8 times the mean bucket, at least 128.
        rehash_every: training steps from one rehash of the tables to the next, at first.
        rehash_growth: factor by which that period grows at each rehash, as weights settle (the SLIDE
            paper's exponential decay).
        rebuild_every: rehashes from one rebuild (new hash functions) to the next; 0 for never.

    Raises:
        ValueError: an option is out of its range; the message names it.
    """

    pattern: Literal["shared", "per_sample"] = "shared"
    budget: int | Literal["auto"] = "auto"
    tail: int | Literal["auto"] = "auto"
    correction: Literal["none", "importance"] = "none"
    family: Literal["simhash", "dwta"] = "simhash"
    projection: Literal["auto", "hadamard", "gaussian", "sparse"] = "auto"
    center: bool = True
    K: int | Literal["auto"] = "auto"
    L: int | Literal["auto"] = "auto"
    bin_size: int = 8
    bucket_cap: int | Literal["auto"] = "auto"
    rehash_every: int = 50
    rehash_growth: float = 1.1
    rebuild_every: int = 20

    def __post_init__(self) -> None:
        _check_choice("pattern", self.pattern, ("shared", "per_sample"))
        _check_choice("correction", self.correction, ("none", "importance"))
        _check_choice("family", self.family, ("simhash", "dwta"))
        _check_choice("projection", self.projection, ("auto", "hadamard", "gaussian", "sparse"))
        for name, low, high in (
            ("budget", 0, None),
            ("tail", 0, None),
            ("K", 1, None),
            ("L", 1, MAX_TABLES),
            ("bucket_cap", 1, None),
        ):
            if getattr(self, name) != "auto":
                _check_int(name, getattr(self, name), low, high, " or 'auto'")
        _check_int("bin_size", self.bin_size, 2, 1 << 16)
        if self.bin_size & (self.bin_size - 1):
            raise ValueError(f"LSHOptions: bin_size: expected a power of two, got {self.bin_size}")
        if not isinstance(self.center, bool):
            raise ValueError(f"LSHOptions: center: expected a bool, got {self.center!r}")
        _check_int("rehash_every", self.rehash_every, 1, None)
        _check_int("rebuild_every", self.rebuild_every, 0, None)
        if not isinstance(self.rehash_growth, (int, float)) or not 1 <= self.rehash_growth <= 100:
            raise ValueError(
                "LSHOptions: rehash_growth: expected a number from 1 to 100, "
                f"got {self.rehash_growth!r}"
            )
        if self.correction == "importance" and self.tail == 0:
            raise ValueError(
                "LSHOptions: correction='importance' estimates the inactive classes from the tail: "
                "expected tail of at least 1, got 0"
            )
        if self.K != "auto" and self.code_bits > MAX_CODE_BITS:
            raise ValueError(
                f"LSHOptions: K: a table's code would have {self.code_bits} bits, more than "
                f"{MAX_CODE_BITS}: expected K of at most {MAX_CODE_BITS // self.bits_per_hash}, "
                f"got {self.K}"
            )

    @property
    def bits_per_hash(self) -> int:
        """Bits of one hash: 1 for SimHash, log2(bin_size) for DWTA."""
        return 1 if self.family == "simhash" else self.bin_size.bit_length() - 1

    @property
    def code_bits(self) -> int:
        """Bits of one table's code; K must be settled."""
        assert self.K != "auto"
        return self.K * self.bits_per_hash

    def resolve(self, out_features: int, in_features: int) -> LSHOptions:
        """These options with every ``"auto"`` replaced by its value for a layer of that shape."""
        chosen: dict[str, Any] = {}
        if self.budget == "auto":
            chosen["budget"] = 16 if self.pattern == "shared" else 1024
        if self.tail == "auto":
            chosen["tail"] = min(1024, max(1, out_features // 4))
        if self.projection == "auto":
            chosen["projection"] = "hadamard" if in_features >= 32 else "gaussian"
        if self.L == "auto":
            chosen["L"] = 50
        if self.K == "auto":
            tables = chosen.get("L", self.L)
            budget = chosen.get("budget", self.budget)
            bucket = max(64, 2 * budget // tables)
            bits = max(1, (out_features // bucket).bit_length() - 1)
            chosen["K"] = max(1, min(bits, 15) // self.bits_per_hash)
        resolved = dataclasses.replace(self, **chosen)
        if resolved.bucket_cap == "auto":
            mean = out_features >> resolved.code_bits
            resolved = dataclasses.replace(resolved, bucket_cap=max(128, 8 * mean))
        return resolved
