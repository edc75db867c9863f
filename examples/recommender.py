"""The next item out of a million: a transformer with an LSH head, in-batch negatives, and a dense head.

    python examples/recommender.py                             # generated: a million items, 200,000 users
    python examples/recommender.py --csv FILE                  # lines user,item,time of your own
    python examples/recommender.py --seconds 600               # of each contender
    python examples/recommender.py --checkpoint run.pt         # killed? the same command goes on

The model is SASRec (Kang & McAuley 2018, arXiv 1808.09781): item vectors and learned positions, causal
self-attention, the item vectors again as output layer. It learns from every position of a user's sequence.
A user's last item is held out as test, the one before as validation; recall@k and nDCG@k rank all items,
exactly.

In-batch negatives are the rival in plain torch: the softmax runs over the items of the batch, less the
logarithm of the probability of each to be there (Yi et al. 2019, "Sampling-bias-corrected neural modeling for
large corpus item recommendations"). By default LSHLinear has no tables and learns from the same items
(budget=0, tail=0); that logarithm is then a part of its scores in place of the loss, which comes to the same.
Candidates of tables lengthen steps, which short trainings on generated data do not repay: a second LSH head
shows by how much. Where items are fewer, try a corrected tail as well:

    python examples/recommender.py --items 100000 --users 50000 \\
        --lsh budget=0 tail=1024 tail_distribution=frequencies correction=importance
"""

from __future__ import annotations

import argparse
import dataclasses
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
from common.likelihood import log_frequency
from common.run import Run
from data import interactions
from slide_torch import LSHLinear
from slide_torch.metrics import ndcg_at_k, recall_at_k
from slide_torch.ops import topk_linear

VALIDATION_USERS = 500  # for the curve only
IN_BATCH = "in-batch negatives"
# What tables add is the difference between these and the head of the options given.
NO_TABLES, WITH_TABLES, BUDGET = "labels and tail alone", "with candidates of tables", 4
LSH_DEFAULTS = {"budget": 0, "tail": 0}


class InBatchSoftmax(nn.Linear):
    """A linear layer with the loss of in-batch negatives; ``counts`` are those of the classes in training."""

    def __init__(self, width: int, counts: Tensor) -> None:
        super().__init__(width, len(counts))
        self.register_buffer("share", counts / counts.sum(), persistent=False)
        self.active = 0

    def loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        classes, places = targets.unique(return_inverse=True)
        present = -torch.expm1(len(targets) * torch.log1p(-self.share[classes]))
        bias = self.bias.gather(0, classes, sparse_grad=True) - present.log()
        logits = torch.addmm(bias, hidden, F.embedding(classes, self.weight, sparse=True).T)
        self.active = len(classes)
        return F.cross_entropy(logits, places)

    def stats(self) -> dict[str, float]:
        return {"active_per_sample": self.active}


class SASRec(nn.Module):
    """Items and positions -> causal self-attention -> inner product with every item's vector, and a bias."""

    def __init__(
        self,
        make_head: Callable[[int, int], nn.Module],
        counts: np.ndarray,
        args: argparse.Namespace,
    ) -> None:
        super().__init__()
        width = args.width
        # the head comes last: whatever it draws, all contenders start from the same vectors and body
        self.items = nn.Embedding(len(counts), width)
        nn.init.normal_(self.items.weight, std=width**-0.5)
        self.position = nn.Parameter(torch.randn(args.history, width) * width**-0.5)
        self.dropout = nn.Dropout(args.dropout)
        layer = nn.TransformerEncoderLayer(
            width, 2, 4 * width, args.dropout, F.gelu, batch_first=True, norm_first=True
        )
        norm = nn.LayerNorm(width)
        self.body = nn.TransformerEncoder(layer, args.layers, norm, enable_nested_tensor=False)
        self.head: Any = make_head(width, len(counts))
        self.items.sparse = isinstance(self.head, (LSHLinear, InBatchSoftmax))
        if isinstance(self.head, LSHLinear):
            self.head.tie(self.items)
            self.head.set_frequencies(torch.from_numpy(counts).clamp(min=1))
        else:
            self.head.weight = self.items.weight
        # without correction a softmax over labels of the batch learns log p - log q, q being the frequency
        options = getattr(self.head, "options", None)
        corrected = options is None or options.correction != "none"
        popularity = log_frequency(counts)
        with torch.no_grad():
            self.head.bias.copy_(popularity if corrected else torch.zeros(len(counts)))
        prior = torch.zeros(len(counts)) if corrected else popularity
        self.register_buffer("prior", prior, persistent=False)

    def hidden(self, items: Tensor) -> Tensor:
        """(B, T) items, padded behind with -1 -> (B, T, width). No item sees the padding, which follows."""
        length = items.shape[1]
        read = self.dropout(self.items(items.clamp(min=0)) + self.position[:length])
        mask = nn.Transformer.generate_square_subsequent_mask(length)
        return self.body(read, mask=mask, is_causal=True)


class NextItem:
    """Windows of random users' sequences; the loss of every position that has an item after it."""

    def __init__(self, histories: interactions.Histories, args: argparse.Namespace) -> None:
        self.histories, self.args = histories, args
        self.users = len(histories.indptr) - 1
        self.rows = args.batch
        self.k = min(args.k, histories.num_items)
        self.columns = [f"recall@{self.k}", f"nDCG@{self.k}"]
        self.measure = f"recall@{self.k} of validation items"
        self.larger_is_better = True
        self.title = f"next item of {histories.num_items:,}"
        order = np.random.default_rng(args.seed).permutation(self.users)
        self.test_users = np.sort(order[: args.test_users or self.users])
        names = ("width", "layers", "dropout", "history")
        self.settings = {"items": histories.num_items, "users": self.users}
        self.settings |= {name: getattr(args, name) for name in names}

    def batch(self, step: int) -> Tensor:
        """(B, T + 1) items: a window of each user's training items, any of those of its full length."""
        draw = np.random.default_rng([self.args.seed, step])
        users = draw.integers(0, self.users, self.args.batch)
        first, end = self.histories.indptr[users], self.histories.indptr[users + 1] - 2
        length = self.args.history + 1
        ends = draw.integers(np.minimum(first + length, end), end, endpoint=True)
        windows = torch.from_numpy(self.histories.windows(users, ends, length))
        return windows[:, : int((windows >= 0).sum(1).max())]

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        targets = batch[:, 1:]
        known = targets >= 0
        hidden, targets = model.hidden(batch[:, :-1])[known], targets[known]
        if isinstance(model.head, InBatchSoftmax):
            return model.head.loss(hidden, targets)
        return F.cross_entropy(model.head(hidden), targets)

    @torch.no_grad()
    def ranked(self, model: nn.Module, users: np.ndarray, back: int) -> tuple[Tensor, Tensor]:
        """The exact k best items after each user's items but the last ``back``, and the item that followed,
        (n, k) and (n, 1); items seen before may be among them."""
        ends = self.histories.indptr[users + 1] - back
        targets = torch.from_numpy(self.histories.items[ends].astype(np.int64))
        windows = torch.from_numpy(self.histories.windows(users, ends, self.args.history))
        weight, bias = model.head.weight, model.head.bias + model.prior
        best = []
        for items in windows.split(256):
            last = (items >= 0).sum(1) - 1
            hidden = model.hidden(items)[torch.arange(len(items)), last]
            best.append(topk_linear(hidden, weight, bias, self.k)[1])
        return torch.cat(best), targets.unsqueeze(1)

    def validate(self, model: nn.Module) -> float:
        return recall_at_k(*self.ranked(model, self.test_users[:VALIDATION_USERS], 2), self.k)

    def test(self, model: nn.Module, run: Run) -> list[str]:
        predicted, targets = self.ranked(model, self.test_users, 1)
        return [f"{metric(predicted, targets, self.k):.4f}" for metric in (recall_at_k, ndcg_at_k)]


def arguments() -> argparse.Namespace:
    parser = contest_parser(
        __doc__, steps=1_000_000, batch=32, lr=1e-2, lsh=LSH_DEFAULTS, plot="recommender.png"
    )
    # dense logits of so many items take 10 GB: --head both, for fewer
    parser.set_defaults(head="lsh", seconds=120.0, equal="time")
    parser.add_argument(
        "--csv", type=Path, metavar="FILE", help="user,item,time in place of generated"
    )
    parser.add_argument("--items", type=int, default=1_000_000, help="generated items")
    parser.add_argument("--users", type=int, default=200_000, help="generated users")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument(
        "--dropout", type=float, default=0.0, help="for logs so small that they are read often"
    )
    parser.add_argument("--history", type=int, default=50, help="last items that the model reads")
    parser.add_argument("--k", type=int, default=10, help="of recall@k and nDCG@k")
    parser.add_argument("--test-users", type=int, default=5_000, help="to evaluate on; 0: all")
    args = parse(parser, "items", "users", "width", "layers", "history", "k")
    if args.test_users < 0:
        parser.error(f"--test-users: expected at least 0, got {args.test_users}")
    if args.width % 2:
        parser.error(f"--width: expected an even number, for two heads, got {args.width}")
    if not 0 <= args.dropout < 1:
        parser.error(f"--dropout: expected a number from 0 to below 1, got {args.dropout}")
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
    counts = histories.counts()
    print(
        f"{counts.sum():,} training items of {task.users:,} users, "
        f"{histories.num_items:,} different ones"
    )
    weights = torch.from_numpy(counts).clamp(min=1)
    other = (NO_TABLES, 0) if args.lsh.budget else (WITH_TABLES, BUDGET)
    sampled: dict[str, Any] = {
        LSH: args.lsh,
        IN_BATCH: lambda width, _: InBatchSoftmax(width, weights),
        other[0]: dataclasses.replace(args.lsh, budget=other[1], rerank="auto"),
    }
    results = compete(args, task, lambda make_head: SASRec(make_head, counts, args), sampled)
    data = "generated data" if args.csv is None else args.csv.name
    note = f"{data}, {histories.num_items:,} items; {len(task.test_users):,} held-out items, exact ranking"
    show(args, task, results, note)


if __name__ == "__main__":
    main()
