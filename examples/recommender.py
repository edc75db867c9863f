"""The next item out of a million: a two-tower model with an LSH head, in-batch negatives, and a dense head.

    python examples/recommender.py                             # generated: a million items, 200,000 users
    python examples/recommender.py --csv FILE                  # lines user,item,time of your own
    python examples/recommender.py --equal time                # dense gets the time that LSHLinear took
    python examples/recommender.py --checkpoint run.pt         # killed? the same command goes on

A GRU over a user's last items is the one tower; the item vectors, which it reads, too, are the other.
A user's last item is held out as test, the one before as validation; recall@k and nDCG@k rank all items,
exactly. On generated data the table shows speed, not accuracy: who made the data decided what can be learnt.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.contest import LSH, compete
from common.contest_options import contest_parser, parse
from common.contest_output import show
from common.run import Run
from data import interactions
from slide_torch import LSHLinear, LSHOptions
from slide_torch.metrics import ndcg_at_k, recall_at_k

VALIDATION_USERS = 500  # for the curve only
IN_BATCH = "in-batch negatives"


class TwoTower(nn.Module):
    """The last items' vectors -> GRU -> inner product with every item's vector, and a bias."""

    def __init__(
        self, make_head: Callable[[int, int], nn.Module], num_items: int, width: int
    ) -> None:
        super().__init__()
        self.head: Any = make_head(width, num_items)
        sparse = isinstance(self.head, LSHLinear)
        self.items = nn.Embedding(num_items, width, sparse=sparse)
        nn.init.normal_(self.items.weight, std=width**-0.5)
        if sparse:
            self.head.tie(self.items)
        else:
            self.head.weight = self.items.weight
        nn.init.zeros_(self.head.bias)
        self.body = nn.GRU(width, width, batch_first=True)
        self.output = nn.Linear(width, width)

    def hidden(self, history: Tensor) -> Tensor:
        """(B, T) items, -1 for none -> (B, width)."""
        read = self.items(history.clamp(min=0)) * (history >= 0).unsqueeze(2)
        return self.output(self.body(read)[0][:, -1])

    def forward(self, history: Tensor) -> Any:
        return self.head(self.hidden(history))


class NextItem:
    """Random places of users' histories; what was taken there is the target."""

    def __init__(self, histories: interactions.Histories, args: argparse.Namespace) -> None:
        self.histories, self.args = histories, args
        self.positions = histories.training_positions()
        self.rows = args.batch
        self.k = min(args.k, histories.num_items)
        self.columns = [f"recall@{self.k}", f"nDCG@{self.k}"]
        self.measure = f"recall@{self.k} of validation items"
        self.larger_is_better = True
        self.title = f"next item of {histories.num_items:,}"
        users = len(histories.indptr) - 1
        order = np.random.default_rng(args.seed).permutation(users)
        self.test_users = np.sort(order[: args.test_users or users])
        self.settings = {
            "items": histories.num_items,
            "users": users,
            "width": args.width,
            "history": args.history,
        }

    def examples(self, positions: np.ndarray) -> tuple[Tensor, Tensor]:
        history = self.histories.before(positions, self.args.history)
        targets = self.histories.items[positions].astype(np.int64)
        return torch.from_numpy(history), torch.from_numpy(targets)

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        draw = np.random.default_rng([self.args.seed, step])
        return self.examples(draw.choice(self.positions, self.rows))

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        history, targets = batch
        return F.cross_entropy(model(history), targets)

    @torch.no_grad()
    def ranked(self, model: nn.Module, positions: np.ndarray) -> tuple[Tensor, Tensor]:
        """The exact k best items and the target, (n, k) and (n, 1); items seen before may be among them."""
        history, targets = self.examples(positions)
        head = model.head
        if not isinstance(head, LSHLinear):
            head = LSHLinear.from_linear(
                head
            )  # the same weights: predict is exact and never holds (n, N)
        return head.predict(model.hidden(history), self.k)[1], targets.unsqueeze(1)

    def validate(self, model: nn.Module) -> float:
        positions = self.histories.indptr[self.test_users[:VALIDATION_USERS] + 1] - 2
        return recall_at_k(*self.ranked(model, positions), self.k)

    def test(self, model: nn.Module, run: Run) -> list[str]:
        predicted, targets = self.ranked(model, self.histories.indptr[self.test_users + 1] - 1)
        return [f"{metric(predicted, targets, self.k):.4f}" for metric in (recall_at_k, ndcg_at_k)]


def arguments() -> argparse.Namespace:
    parser = contest_parser(__doc__, steps=3000, batch=256, lr=5e-3, lsh={}, plot="recommender.png")
    parser.add_argument(
        "--csv", type=Path, metavar="FILE", help="user,item,time in place of generated"
    )
    parser.add_argument("--items", type=int, default=1_000_000, help="generated items")
    parser.add_argument("--users", type=int, default=200_000, help="generated users")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--history", type=int, default=8, help="last items that the model reads")
    parser.add_argument("--k", type=int, default=20, help="of recall@k and nDCG@k")
    parser.add_argument("--test-users", type=int, default=5_000, help="to evaluate on; 0: all")
    args = parse(parser, "items", "users", "width", "history", "k")
    if args.test_users < 0:
        parser.error(f"--test-users: expected at least 0, got {args.test_users}")
    return args


def main() -> None:
    args = arguments()
    try:
        if args.csv is not None:
            histories = interactions.read_csv(args.csv)
        else:
            histories = interactions.generate(args.items, args.users, seed=args.seed)
    except (OSError, ValueError) as error:
        raise SystemExit(str(error)) from None
    task = NextItem(histories, args)
    print(
        f"{len(task.positions):,} training items of {len(histories.indptr) - 1:,} users, "
        f"{histories.num_items:,} different ones"
    )
    results = compete(
        args,
        task,
        lambda make_head: TwoTower(make_head, histories.num_items, args.width),
        {LSH: args.lsh, IN_BATCH: LSHOptions(budget=0, tail=0)},
    )
    data = "generated data" if args.csv is None else args.csv.name
    note = f"{data}, {histories.num_items:,} items; {len(task.test_users):,} held-out items, exact ranking"
    show(args, task, results, note)
    if args.csv is None:
        print("\ngenerated data: this shows speed, not accuracy")


if __name__ == "__main__":
    main()
