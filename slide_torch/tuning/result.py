"""What tune returns."""

from __future__ import annotations

from dataclasses import dataclass

from ..options import LSHOptions, ResolvedOptions


@dataclass(frozen=True)
class Measurement:
    """What one setting finds, and its cost.

    Attributes:
        options: the setting, resolved.
        recall: share of the exact top k among the candidates within the budget; mean over inputs.
        softmax_mass: softmax probability of the candidates; mean over inputs.
        ids_read: ids read from buckets for an input, over all tables, with repetitions.
        rows_touched: rows of the weight read for an input: those that ``rerank`` scores, else the candidates.
        us_query: microseconds an input, of a median block of 64.
        build_seconds: a rebuild: new functions, all rows hashed, buckets.
        rehash_seconds: a rehash of all rows. (One of dirty rows only costs less.)
        cost: microseconds an input: ``us_query``, and a rehash of all rows spread over the inputs of a first
            period.
    """

    options: ResolvedOptions
    recall: float
    softmax_mass: float
    ids_read: float
    rows_touched: float
    us_query: float
    build_seconds: float
    rehash_seconds: float
    cost: float


@dataclass(frozen=True)
class TuneResult:
    """What :func:`tune` found; prints as a table.

    Attributes:
        options: the setting of least cost that reached the recall; if none did, that of the highest recall.
        reached: whether it did, on the held-out inputs if there are any.
        recall: its recall there.
        softmax_mass: its softmax mass there.
        held_out: inputs, none of which had a part in the choice, that these two are of; 0: they are of the
            inputs that it was chosen on.
        target: the recall asked for.
        k: how many largest logits were looked for.
        measured: every setting tried, on the inputs of the choice.
        untried: settings that the time limit left out.
        seconds: that it took.
    """

    options: LSHOptions
    reached: bool
    recall: float
    softmax_mass: float
    held_out: int
    target: float
    k: int
    measured: list[Measurement]
    untried: int
    seconds: float

    def __str__(self) -> str:
        head = (
            *("family", "K", "L", "probes", "rerank", "augmented", f"recall@{self.k}", "mass"),
            *("ids read", "rows", "us/query", "build, s", "rehash, s", "cost, us"),
        )
        lines = [head]
        for m in self.measured:
            o = m.options
            lines.append(
                (
                    *(o.family, str(o.K), str(o.L), str(o.probes), f"{o.rerank:,}"),
                    "yes" if o.augment_norms else "no",
                    *(f"{m.recall:.3f}", f"{m.softmax_mass:.3f}", f"{m.ids_read:,.0f}"),
                    *(f"{m.rows_touched:,.0f}", f"{m.us_query:.0f}", f"{m.build_seconds:.2f}"),
                    *(f"{m.rehash_seconds:.2f}", f"{m.cost:.0f}"),
                )
            )
        widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
        table = [
            "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
            for line in lines
        ]
        best = self.options
        found = f"recall {self.recall:.3f}, mass {self.softmax_mass:.3f}"
        where = (
            f"on {self.held_out} held-out inputs"
            if self.held_out
            else "on the inputs of the choice"
        )
        verdict = (
            f"reached {self.target:g}"
            if self.reached
            else f"NO SETTING REACHED {self.target:g}; the best"
        )
        chosen = (
            f"{verdict}: family={best.family!r}, K={best.K}, L={best.L}, probes={best.probes}, "
            f"rerank={best.rerank}, augment_norms={best.augment_norms}: {found} {where}"
        )
        left = f"; {self.untried} settings left out by the time limit" if self.untried else ""
        return "\n".join([*table, chosen, f"{self.seconds:.0f} s{left}"])
