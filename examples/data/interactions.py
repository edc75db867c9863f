"""Who took which item, in what order: read from a CSV file of user,item,time, or generated.

    python -m examples.data.interactions generated.csv --items 1000000 --users 200000  # writes such a file

Generated data have what lets a recommender learn: items in clusters, a long tail of popularity in each, users
with a few tastes that drift to neighbouring clusters, items that follow one another. They are for measuring
speed: how well a model does on them says nothing of how well it does on people.
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

    def training_positions(self) -> np.ndarray:
        """Where in ``items`` the targets of training stand: all but a user's first and last two."""
        inside = np.ones(len(self.items), dtype=bool)
        for held_out in (self.indptr[:-1], self.indptr[1:] - 1, self.indptr[1:] - 2):
            inside[held_out] = False
        return np.flatnonzero(inside)

    def before(self, positions: np.ndarray, length: int) -> np.ndarray:
        """The last ``length`` items of the same user before each position, (n, length) int64; the most
        recent in the last column, -1 where there were not so many."""
        first = self.indptr[np.searchsorted(self.indptr, positions, side="right") - 1]
        wanted = positions[:, None] - np.arange(length, 0, -1)
        found = self.items[np.maximum(wanted, 0)].astype(np.int64)
        return np.where(wanted >= first[:, None], found, -1)


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


def generate(num_items: int, num_users: int, length: int = 20, *, seed: int = 0) -> Histories:
    """Histories of ``length`` items each.

    Items form clusters of about 100, within which the r-th is taken in proportion to 1 / r. A user has three
    tastes, clusters of Zipf-like popularity; each step one of them may move to the next cluster. One time in
    four the next item is the one that follows the last (the next in its cluster), else it is drawn from the
    cluster of the last item or, one time in four of those, from that of another taste.
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

    everyone = np.arange(num_users)
    tastes = drawn(of_cluster, num_users, 3)
    taste = np.zeros(num_users, dtype=np.int64)
    rank = drawn(in_cluster, num_users)
    items = np.empty((num_users, length), dtype=np.int32)
    for step in range(length):
        items[:, step] = place[tastes[everyone, taste] * size + rank]
        follows = draw.random(num_users) < 0.25
        taste = np.where(
            ~follows & (draw.random(num_users) < 0.25), draw.integers(0, 3, num_users), taste
        )
        drifts = ~follows & (draw.random(num_users) < 0.1)
        tastes[everyone, taste] = (tastes[everyone, taste] + drifts) % clusters
        rank = np.where(follows, (rank + 1) % size, drawn(in_cluster, num_users))
    return Histories(items.reshape(-1), np.arange(num_users + 1) * length, num_items)


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
