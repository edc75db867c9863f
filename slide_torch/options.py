"""LSHOptions: how an LSHLinear finds its active neurons."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from .checks import as_number, checked_int

MAX_CODE_BITS = 24
MAX_TABLES = 254
MAX_COUNT = 1 << 40  # multiples of it fit into the operators' 64 bits
MAX_CENTROID_BITS = 16
FAMILIES = ("simhash", "dwta", "kmeans")
TAIL_DISTRIBUTIONS = ("uniform", "log_uniform", "frequencies")

# Fields that are an integer in these limits, or "auto".
_INTEGERS_OR_AUTO = (
    ("budget", 0, MAX_COUNT),
    ("batch_budget", 0, MAX_COUNT),
    ("tail", 0, MAX_COUNT),
    ("K", 1, MAX_COUNT),
    ("L", 1, MAX_TABLES),
    ("probes", 1, MAX_TABLES),
    ("rerank", 0, 4 * MAX_COUNT),
    ("bucket_cap", 1, MAX_COUNT),
    ("rehash_every", 1, MAX_COUNT),
    ("rebuild_every", 0, MAX_COUNT),
)


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"LSHOptions: {name}: expected one of {choices}, got {value!r}")


@dataclass(frozen=True)
class LSHOptions:
    """How an :class:`LSHLinear` finds its active neurons.

    :meth:`resolve` replaces ``"auto"`` by a value for the layer's shape; a hidden layer first applies
    :meth:`for_hidden_layer`.

    Attributes:
        pattern: ``"shared"``: one active set per batch, so that every sample also meets the labels and
            candidates of all others (the most classes per byte moved). ``"per_sample"``: every sample's
            softmax runs over its own active set, as in SLIDE (Chen et al. 2020).
        budget: the most active neurons per sample, its labels included; labels are active even beyond it.
            With one re-ranked table and the shared pattern (the default): the most candidates per sample, to
            which its labels are added. With ``out_features`` or more every neuron is active and the layer is
            exact. With 0 there are no tables, only labels and tail. ``"auto"``: 10 with the shared pattern
            (16 for families other than ``"kmeans"``), 1,024 with the per-sample pattern.
        batch_budget: with the shared pattern, the most candidates for the whole batch, in addition to labels
            and tail: those that most samples have retrieved (ties by smaller index). 0 for no limit.
            ``"auto"``: 0 in an output layer; the budget in a hidden layer.
        tail: neurons drawn at random per batch, in addition to the budget. ``"auto"``: 1,024, at most a
            quarter of the layer; 0 where k-means finds hard candidates for a shared set and no correction
            requires a tail.
        tail_distribution: the distribution of the tail, see docs/sampling.md. ``"uniform"``: without
            replacement. ``"log_uniform"``: class i in proportion to log((i + 2) / (i + 1)), for ids sorted by
            decreasing frequency. ``"frequencies"``: the shares given to :meth:`LSHLinear.set_frequencies`.
            A tuple of names: the mean of their shares. All but ``"uniform"`` alone are drawn in as many
            strata of equal probability as the tail is long; a class drawn twice shortens the tail.
        correction: ``"none"`` takes the softmax over the active set as it is, which learns to rank in
            the fewest steps but gives no probabilities over all classes. ``"importance"`` weights each
            neuron of the tail by the inverse of its inclusion probability, so that loss and gradient estimate
            those of the full softmax (Horvitz & Thompson 1952, Bengio & Senécal 2008); it requires a tail.
        family: how vectors become codes, see :mod:`slide_torch.hashing`. ``"simhash"``: signs of random
            projections (Charikar 2002). ``"dwta"``: densified winner-take-all (Chen & Shrivastava 2018),
            on rows without zeros the same as winner-take-all (Yagnik et al. 2011). ``"kmeans"``: the
            nearest of 2^K centroids of the rows, by angle: finds most of the largest logits in few
            buckets, with more upkeep. ``"exact"``: no hashing; the candidates are the largest logits, at the
            cost of all N: a reference. ``"auto"``: ``"kmeans"`` with the shared pattern if neither K nor L
            is given, else ``"simhash"``.
        projection: for SimHash, ``"hadamard"`` (structured rotations: Andoni et al. 2015) or ``"gaussian"``.
            ``"auto"``: Hadamard from 32 features on, where its rotations are random enough; Gaussian below.
        center: whether rows are hashed relative to their mean. This shifts a query's inner products with all
            rows alike, so no ranking changes, and spreads rows that training has pushed in a common
            direction.
        augment_norms: whether rows get one more coordinate, sqrt(M^2 - norm^2), and queries a 0 there, so
            that the largest inner product is the smallest angle (Neyshabur & Srebro 2015). M is the 90th
            percentile of the norms; longer rows get 0. (There is no option to normalise rows: no family's
            code depends on a vector's length.)
        K: hashes per table. A hash of SimHash is one bit, one of DWTA log2(``bin_size``) bits; ``"kmeans"``
            has 2^K centroids per table. A table's code has at most 24 bits, with ``"kmeans"`` 16. ``"auto"``:
            codes of at most 15 bits, for buckets of 64 to 128 neurons, or larger ones where L of them would
            hold fewer than twice the budget; with ``"kmeans"`` 9 to 18 sqrt(out_features) centroids.
        L: number of tables. ``"auto"``: 50; 1 for ``"kmeans"``.
        bin_size: coordinates that one hash of ``"dwta"`` compares; a power of two.
        probes: buckets that a query reads in each table: its own, and those that it missed by least
            (Lv et al. 2007). At most 254 in all tables together. ``"auto"``: 1; for ``"kmeans"`` 80, and with
            one table and the shared pattern, where a bucket costs least, 160.
        rerank: how many of the candidates, those that collide most often (labels included), are scored
            exactly to keep the ``budget`` best; 0 keeps those with the highest collision counts. With one
            table and the shared pattern, where no candidate collides twice, any other number scores all
            neurons of the buckets. ``"auto"``: 0; for ``"kmeans"``, whose candidates mostly collide once,
            4,096 or four times the budget, whichever is more.
        bucket_cap: the most neurons read from one bucket; a longer one is read from a random position.
            ``"auto"``: 8 times the mean bucket, at least 128.
        schedule: when tables are rehashed. ``"growing"``: every ``rehash_every`` steps, a period that grows.
            ``"drift"``: every ``rehash_every`` steps 512 rows are checked, and the tables are rehashed if
            more than the share ``drift`` of their codes has changed since the last rehash.
        drift: that share, from 0 to 1; 0 rehashes at any change.
        rehash_every: training steps from one rehash to the next, at first; with ``"drift"`` from one check
            to the next. ``"auto"``: 50; 25 for ``"kmeans"``, whose candidates are worth it.
        rehash_growth: factor by which that period grows at each rehash, as weights settle (the SLIDE
            paper's exponential decay); 1 keeps it fixed. Has no effect with ``"drift"``. ``"auto"``: 1.1;
            1.02 for ``"kmeans"``.
        rebuild_every: rehashes from one rebuild (new hash functions) to the next; 0 for never. ``"auto"``:
            20.

    Raises:
        ValueError: an option is out of its range; the message names it.
    """

    pattern: Literal["shared", "per_sample"] = "shared"
    budget: int | Literal["auto"] = "auto"
    batch_budget: int | Literal["auto"] = "auto"
    tail: int | Literal["auto"] = "auto"
    correction: Literal["none", "importance"] = "none"
    family: Literal["auto", "simhash", "dwta", "kmeans", "exact"] = "auto"
    projection: Literal["auto", "hadamard", "gaussian"] = "auto"
    center: bool = True
    augment_norms: bool = False
    K: int | Literal["auto"] = "auto"
    L: int | Literal["auto"] = "auto"
    bin_size: int = 8
    probes: int | Literal["auto"] = "auto"
    rerank: int | Literal["auto"] = "auto"
    bucket_cap: int | Literal["auto"] = "auto"
    schedule: Literal["growing", "drift"] = "growing"
    drift: float = 0.1
    rehash_every: int | Literal["auto"] = "auto"
    rehash_growth: float | Literal["auto"] = "auto"
    rebuild_every: int | Literal["auto"] = "auto"
    tail_distribution: str | tuple[str, ...] = "uniform"

    def __post_init__(self) -> None:
        self._check_choices()
        self._settle_integers()
        self._check_switches()
        self._settle_rates()
        self._check_active_set()
        self._check_tail_distribution()
        self._check_tables()

    def _check_choices(self) -> None:
        _check_choice("pattern", self.pattern, ("shared", "per_sample"))
        _check_choice("correction", self.correction, ("none", "importance"))
        _check_choice("family", self.family, ("auto", *(*FAMILIES, "exact")))
        _check_choice("schedule", self.schedule, ("growing", "drift"))
        _check_choice("projection", self.projection, ("auto", "hadamard", "gaussian"))

    def _settle_integers(self) -> None:
        for name, low, high in _INTEGERS_OR_AUTO:
            value = getattr(self, name)
            if not (isinstance(value, str) and value == "auto"):
                self._settle(
                    name, checked_int(value, low, high, f"LSHOptions: {name}", " or 'auto'")
                )
        self._settle("bin_size", checked_int(self.bin_size, 2, 1 << 16, "LSHOptions: bin_size"))
        if self.bin_size & (self.bin_size - 1):
            raise ValueError(f"LSHOptions: bin_size: expected a power of two, got {self.bin_size}")

    def _check_switches(self) -> None:
        for name in ("center", "augment_norms"):
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise ValueError(f"LSHOptions: {name}: expected a bool, got {value!r}")

    def _settle_rates(self) -> None:
        """The numbers of the schedule that need not be integers."""
        if self.rehash_growth != "auto":
            growth = as_number(self.rehash_growth)
            if growth is None or not 1 <= growth <= 100:
                raise ValueError(
                    "LSHOptions: rehash_growth: expected a number from 1 to 100 or 'auto', got "
                    f"{self.rehash_growth!r}"
                )
            self._settle("rehash_growth", growth)
        drift = as_number(self.drift)
        if drift is None or not 0 <= drift <= 1:
            raise ValueError(
                f"LSHOptions: drift: expected a number from 0 to 1, got {self.drift!r}"
            )
        self._settle("drift", drift)

    def _check_active_set(self) -> None:
        if self.batch_budget not in (0, "auto") and self.pattern == "per_sample":
            raise ValueError(
                "LSHOptions: batch_budget: expected 'auto' or 0 with pattern='per_sample', whose samples "
                f"share no active set, got {self.batch_budget}"
            )
        if self.correction == "importance" and self.tail == 0:
            raise ValueError(
                "LSHOptions: correction='importance' estimates the inactive classes from the tail: "
                "expected tail of at least 1, got 0"
            )

    def _check_tail_distribution(self) -> None:
        parts = self.tail_parts
        known = all(part in TAIL_DISTRIBUTIONS for part in parts)
        if not parts or not known or len(set(parts)) < len(parts):
            raise ValueError(
                f"LSHOptions: tail_distribution: expected one of {TAIL_DISTRIBUTIONS}, or a tuple of several "
                f"of them, got {self.tail_distribution!r}"
            )
        if self.tail != "auto" and parts != ("uniform",) and self.tail < len(parts):
            raise ValueError(
                f"LSHOptions: tail: expected at least {len(parts)} with tail_distribution="
                f"{self.tail_distribution!r}, got {self.tail}"
            )

    def _check_tables(self) -> None:
        """What must fit together in how rows are hashed, and in how the tables are read."""
        rerank, budget = self.rerank, self.budget
        if self.family == "exact" and rerank not in (0, "auto"):
            raise ValueError(
                "LSHOptions: rerank: expected 0 with family='exact', whose candidates are the best already, "
                f"got {rerank}"
            )
        most_bits = MAX_CENTROID_BITS if self.settled_family == "kmeans" else MAX_CODE_BITS
        if self.K != "auto" and self.code_bits > most_bits:
            raise ValueError(
                f"LSHOptions: K: a table's code would have {self.code_bits} bits, more than "
                f"{most_bits}: expected K of at most {most_bits // self.bits_per_hash}, "
                f"got {self.K}"
            )
        if self.L != "auto" and self.probes != "auto" and self.L * self.probes > MAX_TABLES:
            raise ValueError(
                f"LSHOptions: probes: expected L * probes of at most {MAX_TABLES}, got "
                f"{self.L} * {self.probes} = {self.L * self.probes}"
            )
        if rerank != "auto" and budget != "auto" and 0 < rerank < budget:
            raise ValueError(
                f"LSHOptions: rerank: expected 0 or at least the budget, {budget}, got {rerank}"
            )

    def _settle(self, name: str, value: float) -> None:
        """Sets a field while the options are made: numbers of other kinds (numpy's) become Python's."""
        object.__setattr__(self, name, value)

    @property
    def tail_parts(self) -> tuple[str, ...]:
        """The distributions that the tail is drawn from."""
        given = self.tail_distribution
        return given if isinstance(given, tuple) else (given,)

    @property
    def settled_family(self) -> str:
        """The family, or what ``"auto"`` stands for."""
        if self.family != "auto":
            return self.family
        learnt = self.pattern == "shared" and self.K == "auto" and self.L == "auto"
        return "kmeans" if learnt else "simhash"

    @property
    def bits_per_hash(self) -> int:
        """Bits of one hash: log2(bin_size) for DWTA, 1 for all others."""
        return self.bin_size.bit_length() - 1 if self.settled_family == "dwta" else 1

    @property
    def code_bits(self) -> int:
        """Bits of one table's code.

        Raises:
            ValueError: K is ``"auto"``.
        """
        if self.K == "auto":
            raise ValueError(
                "LSHOptions.code_bits: K: expected an int, got 'auto': call resolve first"
            )
        return self.K * self.bits_per_hash

    def for_hidden_layer(self, out_features: int) -> LSHOptions:
        """These options with what ``"auto"`` means in a hidden layer: a budget of 5% of its neurons, for the
        whole batch too where that shares its active set, and no tail.

        Raises:
            ValueError: an option that means nothing there: importance correction, which is that of a
                softmax; or nothing would be active.
        """
        where = "LSHOptions.for_hidden_layer"
        if self.correction != "none":
            raise ValueError(
                f"{where}: correction: expected 'none', got {self.correction!r}: it corrects a softmax's "
                "normaliser, and a hidden layer has none"
            )
        chosen: dict[str, Any] = {}
        if self.family == "auto":
            chosen["family"] = "simhash"
        if self.budget == "auto":
            chosen["budget"] = -(-out_features // 20)
        if self.tail == "auto":
            chosen["tail"] = 0
        if self.batch_budget == "auto" and self.pattern == "shared":
            chosen["batch_budget"] = chosen.get("budget", self.budget)
        settled = dataclasses.replace(self, **chosen)
        if settled.budget == 0 and settled.tail == 0:
            raise ValueError(
                f"{where}: budget: expected at least 1 without a tail, got 0: no neuron would be active"
            )
        return settled

    def resolve(self, out_features: int, in_features: int) -> ResolvedOptions:
        """These options with every ``"auto"`` replaced by its value for a layer of that shape."""
        family = self.settled_family
        kmeans = family == "kmeans"

        def settled(name: str, automatic: Any) -> Any:
            given = getattr(self, name)
            return automatic if given == "auto" else given

        budget = settled("budget", (10 if kmeans else 16) if self.pattern == "shared" else 1024)
        L = settled("L", 1 if kmeans else 50)
        K = settled("K", self._automatic_K(out_features, budget, L))
        mean_bucket = out_features >> (K * self.bits_per_hash)
        needs_no_tail = (
            kmeans and self.pattern == "shared" and budget != 0 and self.correction == "none"
        )
        return ResolvedOptions(
            **{
                **dataclasses.asdict(self),
                "family": family,
                "budget": budget,
                "batch_budget": settled("batch_budget", 0),
                "tail": settled(
                    "tail", 0 if needs_no_tail else min(1024, max(1, out_features // 4))
                ),
                "projection": settled(
                    "projection", "hadamard" if in_features >= 32 else "gaussian"
                ),
                "K": K,
                "L": L,
                "probes": settled("probes", self._automatic_probes(L)),
                "rerank": settled("rerank", max(4096, 4 * budget) if kmeans else 0),
                "bucket_cap": settled("bucket_cap", max(128, 8 * mean_bucket)),
                "rehash_every": settled("rehash_every", 25 if kmeans else 50),
                "rehash_growth": settled("rehash_growth", 1.02 if kmeans else 1.1),
                "rebuild_every": settled("rebuild_every", 20),
            }
        )

    def _automatic_K(self, out_features: int, budget: int, L: int) -> int:
        if self.settled_family == "kmeans":
            # at most 18 sqrt(out_features) centroids
            bits = ((18 * 18 * out_features).bit_length() - 1) // 2
            return max(1, min(bits, MAX_CENTROID_BITS, out_features.bit_length() - 3))
        bucket = max(64, 2 * budget // L)
        bits = max(1, (out_features // bucket).bit_length() - 1)
        return max(1, min(bits, 15) // self.bits_per_hash)

    def _automatic_probes(self, L: int) -> int:
        if self.settled_family != "kmeans":
            return 1
        searched = L == 1 and self.pattern == "shared"
        return min(160 if searched else 80, MAX_TABLES // L)


@dataclass(frozen=True, kw_only=True)
class ResolvedOptions(LSHOptions):
    """What :meth:`LSHOptions.resolve` returns: options of a layer of known shape, without any ``"auto"``."""

    budget: int
    batch_budget: int
    tail: int
    family: Literal["simhash", "dwta", "kmeans", "exact"]
    projection: Literal["hadamard", "gaussian"]
    K: int
    L: int
    probes: int
    rerank: int
    bucket_cap: int
    rehash_every: int
    rehash_growth: float
    rebuild_every: int

    def __post_init__(self) -> None:
        super().__post_init__()
        left = [f.name for f in dataclasses.fields(self) if getattr(self, f.name) == "auto"]
        if left:
            raise ValueError(
                f"ResolvedOptions: {left[0]}: expected a value, got 'auto': use LSHOptions.resolve"
            )

    def unresolved(self, **changes: Any) -> LSHOptions:
        """The same as :class:`LSHOptions`, with ``changes``, which may be ``"auto"``."""
        return LSHOptions(**{**dataclasses.asdict(self), **changes})
