"""Who took which item, in what order: read from a CSV file of user,item,time, or generated.

    python -m examples.data.interactions generated.csv --items 1000000 --users 200000  # writes such a file

Generated data have what lets a recommender learn: items in clusters, a long tail of popularity in each, users
with a few tastes that drift to neighbouring clusters, fashions, items that follow one another. How well a
model does on them says little of how well it does on people.
"""

from __future__ import annotations

import argparse
import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Histories:
    """Every user's items in the order of time; a user's last is for the test, the one before for validation.

    Attributes:
        items: int32, one user's after the other's.
        indptr: ``(users + 1)`` int64: user u has ``items[indptr[u]:indptr[u + 1]]``, at least 4 of them.
        num_items: size of the catalogue.
    """

    items: np.ndarray
    indptr: np.ndarray
    num_items: int

    def counts(self) -> np.ndarray:
        """How often each item is an item of training, (num_items) int64."""
        kept = np.ones(len(self.items), dtype=bool)
        kept[self.indptr[1:] - 1] = kept[self.indptr[1:] - 2] = False
        return np.bincount(self.items[kept], minlength=self.num_items)

    def windows(self, users: np.ndarray, ends: np.ndarray, length: int) -> np.ndarray:
        """The last ``length`` items before ``ends``, positions in ``items``, of each user, (n, length) int64;
        where there are not so many, -1 follows them."""
        first = np.maximum(self.indptr[users], ends - length)
        wanted = first[:, None] + np.arange(length)
        found = self.items[np.minimum(wanted, len(self.items) - 1)].astype(np.int64)
        return np.where(wanted < ends[:, None], found, -1)


def histories_of(
    users: np.ndarray, items: np.ndarray, times: np.ndarray, num_items: int, *, shortest: int = 4
) -> Histories:
    """Histories of the users who have at least ``shortest`` items.

    Args:
        users: (n) integers from 0; items: (n), below ``num_items``; times: (n), any numbers. Equal times
            keep their order.

    Raises:
        ValueError: no user has so many items.
    """
    order = np.lexsort((times, users))
    users, items = users[order], items[order]
    kept = np.bincount(users)[users] >= shortest
    counts = np.bincount(users[kept])
    counts = counts[counts > 0]
    if not len(counts):
        raise ValueError(f"histories_of: expected users with at least {shortest} items, found none")
    indptr = np.concatenate(([0], np.cumsum(counts)))
    return Histories(items[kept].astype(np.int32), indptr, num_items)


def read_csv(path: Path) -> Histories:
    """Reads lines ``user,item,time``: the first two any text, the time a number; a first line whose time is
    none is a header.

    Raises:
        ValueError: a line is no such line; it is named.
    """
    numbers: tuple[dict[str, int], dict[str, int]] = ({}, {})
    users, items, times = [], [], []
    with open(path, newline="", encoding="utf-8") as file:
        for line, row in enumerate(csv.reader(file), start=1):
            if not row:
                continue
            try:
                user, item, time = row
                times.append(float(time))
            except ValueError:
                if line == 1 and len(row) == 3:
                    continue
                raise ValueError(
                    f"read_csv: {path}, line {line}: expected user,item,time with a number as the time, "
                    f"got {','.join(row)[:60]!r}"
                ) from None
            for name, of, column in zip((user, item), numbers, (users, items), strict=True):
                column.append(of.setdefault(name, len(of)))
    if not users:
        raise ValueError(f"read_csv: {path}: expected lines user,item,time, got none")
    return histories_of(np.array(users), np.array(items), np.array(times), len(numbers[1]))


def generate(num_items: int, num_users: int, *, mean_length: int = 30, seed: int = 0) -> Histories:
    """Histories of 5 items or more, of ``mean_length`` on average.

    Items form clusters of about 100, within which the r-th is taken in proportion to 1 / r. A user comes at
    some time with three tastes, clusters of Zipf-like popularity; which ones are popular moves on with time.
    Each step one of the tastes may move to the next cluster. One time in four the next item is the one that
    follows the last (the next in its cluster), else it is drawn from the cluster of the last item or, one
    time in four of those, from that of another taste.
    """
    draw = np.random.default_rng(seed)
    size = min(100, num_items)
    clusters = num_items // size  # the few items left over belong to no cluster: nobody takes them
    place = draw.permutation(num_items)  # numbers tell nothing
    in_cluster = np.cumsum(1 / np.arange(1, size + 1))
    of_cluster = np.cumsum(np.arange(1, clusters + 1) ** -0.6)

    def drawn(cumulated: np.ndarray, *shape: int) -> np.ndarray:
        found = np.searchsorted(cumulated, draw.random(shape) * cumulated[-1])
        return np.minimum(found, len(cumulated) - 1)

    shortest = 5
    lengths = shortest + draw.geometric(1 / max(1, mean_length - shortest + 1), num_users) - 1
    lengths = np.minimum(lengths, 10 * mean_length)
    indptr = np.concatenate(([0], np.cumsum(lengths)))
    items = np.empty(indptr[-1], dtype=np.int32)
    time = draw.random((num_users, 1))
    tastes = (drawn(of_cluster, num_users, 3) + (time * clusters / 4).astype(np.int64)) % clusters
    taste = np.zeros(num_users, dtype=np.int64)
    rank = drawn(in_cluster, num_users)
    for step in range(lengths.max()):
        going_on = np.flatnonzero(lengths > step)
        cluster = tastes[going_on, taste[going_on]]
        items[indptr[going_on] + step] = place[cluster * size + rank[going_on]]
        follows = draw.random(num_users) < 0.25
        taste = np.where(
            ~follows & (draw.random(num_users) < 0.25), draw.integers(0, 3, num_users), taste
        )
        drifts = ~follows & (draw.random(num_users) < 0.1)
        tastes[np.arange(num_users), taste] += drifts
        tastes %= clusters
        rank = np.where(follows, (rank + 1) % size, drawn(in_cluster, num_users))
    return Histories(items, indptr, num_items)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("csv", type=Path)
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--users", type=int, default=200_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if min(args.items, args.users) < 1:
        parser.error("--items and --users must be at least 1")
    histories = generate(args.items, args.users, seed=args.seed)
    counts = np.diff(histories.indptr)
    users = np.repeat(np.arange(len(counts)), counts)
    times = np.arange(len(users)) - np.repeat(histories.indptr[:-1], counts)
    table = np.stack([users, histories.items, times], axis=1)
    np.savetxt(args.csv, table, fmt="%d", delimiter=",", header="user,item,time", comments="")


if __name__ == "__main__":
    main()
