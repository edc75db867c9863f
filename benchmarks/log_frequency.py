"""Whether tau * log(class frequency) added to the scores helps a model trained with correction="none".

    python benchmarks/log_frequency.py --json benchmarks/results/log_frequency.json

Negatives that are not corrected for how often they are drawn teach scores shifted by about the log of
that (Mikolov et al. 2013, Menon et al. 2021); adding a multiple of log frequency back might repair
log-probabilities, or ranking. The quickstart's layer (see prediction.py); tau is chosen on validation
names by P@1, and by log-likelihood, and both are reported on held-out test names.
"""

from __future__ import annotations

import numpy as np
import torch
from common import argument_parser, finish, parse, print_table
from prediction import hidden_of, places, train_places

from slide_torch.data import IGNORE_INDEX

TAUS = (-0.5, -0.25, 0.0, 0.25, 0.5, 0.75, 1.0, 1.5)


@torch.no_grad()
def measure(head, hidden, labels, log_frequency, taus) -> dict[float, tuple[float, float]]:
    """tau -> (P@1, mean log-probability of a row's labels)."""
    hits, likelihood = dict.fromkeys(taus, 0.0), dict.fromkeys(taus, 0.0)
    for x, y in zip(hidden.split(128), labels.split(128), strict=True):
        scores = head.log_prob(x)
        kept = y != IGNORE_INDEX
        for tau in taus:
            shifted = scores + tau * log_frequency
            hits[tau] += (shifted.argmax(1, keepdim=True) == y).any(1).sum().item()
            own = shifted.gather(1, y.clamp(min=0)) - shifted.logsumexp(1, keepdim=True)
            likelihood[tau] += ((own * kept).sum(1) / kept.sum(1)).sum().item()
    return {tau: (hits[tau] / len(hidden), likelihood[tau] / len(hidden)) for tau in taus}


def main() -> None:
    parser = argument_parser(__doc__, "50 steps, 200 names of each part")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--validation", type=int, default=2000)
    parser.add_argument("--test", type=int, default=5000)
    args = parse(parser)
    if args.quick:
        args.steps, args.validation, args.test = 50, 200, 200
    data = places.load_places()
    model = train_places(data, args.steps, args.seed)
    counts = np.bincount(data.train.label_indices, minlength=data.num_labels)
    log_frequency = torch.from_numpy(np.log(counts / counts.sum())).float()
    chosen_on = hidden_of(model, data.validation, args.validation, args.seed)
    held_out = hidden_of(model, data.test, args.test, args.seed)
    curve = measure(model.head, *chosen_on, log_frequency, TAUS)
    by_p1 = max(TAUS, key=lambda tau: curve[tau][0])
    by_likelihood = max(TAUS, key=lambda tau: curve[tau][1])
    taus = tuple(dict.fromkeys((0.0, by_p1, by_likelihood)))
    final = measure(model.head, *held_out, log_frequency, taus)
    names = {0.0: "nothing added"}
    names[by_p1] = names.get(by_p1, "") + " best P@1"
    names[by_likelihood] = names.get(by_likelihood, "") + " best likelihood"
    record = {
        "validation": [{"tau": t, "p1": p, "log_likelihood": ll} for t, (p, ll) in curve.items()],
        "test": [{"tau": t, "p1": p, "log_likelihood": ll} for t, (p, ll) in final.items()],
        "names": args.test,
    }
    columns = ["tau", "P@1", "log-likelihood"]
    for title, table in (("validation", curve), ("held out", final)):
        print(f"{title}:")
        rows = [
            [f"{t}{' ' + names[t].strip() if table is final else ''}", f"{p:.4f}", f"{ll:.3f}"]
            for t, (p, ll) in table.items()
        ]
        print_table(columns, rows)

    def paint(figure) -> None:
        axes = figure.subplots()
        axes.plot(list(curve), [p1 for p1, _ in curve.values()], marker="o")
        axes.set_xlabel("tau")
        axes.set_ylabel("P@1, validation names")
        axes.grid(alpha=0.3)

    finish(args, {"steps": args.steps}, record, paint)


if __name__ == "__main__":
    main()
