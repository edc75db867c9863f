"""The result of tune."""

from __future__ import annotations

from dataclasses import dataclass

from ..options import LSHOptions, ResolvedOptions


@dataclass(frozen=True)
class Measurement:
    """Recall and cost of one setting.

    Attributes:
        options: the setting, resolved.
        recall: share of the exact top k among the candidates within the budget; mean over inputs.
        softmax_mass: softmax probability of the candidates; mean over inputs.
        ids_read: ids read from buckets for an input, over all tables, with repetitions.
        rows_touched: rows of the weight read for an input: those that ``rerank`` scores, else the candidates.
        us_query: microseconds an input, in the median block of 64 inputs.
        build_seconds: duration of a rebuild: new functions, all rows hashed, buckets.
        rehash_seconds: duration of a rehash of all rows. (A rehash of changed rows only takes less.)
        cost: microseconds an input: ``us_query``, plus a rehash of all rows spread over the inputs of the
            first period.
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
    """The result of :func:`tune`; prints as a table.

    Attributes:
        options: the cheapest setting that reached the recall; if none did, the one of the highest recall.
        reached: whether it reached the recall, on the held-out inputs if there are any.
        recall: its recall there.
        softmax_mass: its softmax mass there.
        held_out: number of held-out inputs that recall and mass were measured on; 0 if they were measured on
            the inputs of the choice.
        target: the recall to reach.
        k: number of largest logits looked for.
        measured: every setting tried, measured on the inputs of the choice.
        untried: number of settings that were left out because time was up.
        seconds: duration of the search.
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
