"""An output layer on several processes of one machine: ms a step, bytes sent a step, memory a rank.

    python -m benchmarks.speed.sharded --ranks 1 2 --json benchmarks/results/sharded.json

A step is forward, loss, backward and update of the layer; its batch is the same on all ranks, but for
``replicas``, where each rank has its part. The median leaves out the steps that rehash, the mean does not.
Contenders: ``sharded``, an LSHLinear whose rows lie on the ranks; ``replicas``, one on each rank, with
``allreduce_row_gradients``; ``dense``, nn.Linear by ``ColwiseParallel`` and ``loss_parallel``. Labels and
inputs are random. Bytes are counted as the collectives are called: what a rank sends in a ring, 2 (R - 1) / R
of an all-reduced tensor, R - 1 times a gathered one. (What ``loss_parallel`` sends inside of DTensor's
handlers, a few numbers a sample, escapes the count.) Contenders run one after the other; each rank has as
many threads as the most ranks leave it, so that the work of a rank can be compared.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, loss_parallel, parallelize_module
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.common.arguments import argument_parser, parse
from benchmarks.common.record import finish
from benchmarks.common.timing import median, milliseconds
from examples.common.machine import resident_gb
from examples.common.output import print_table
from slide_torch import LSHLinear
from slide_torch.distributed import allreduce_row_gradients, prepare, shard_
from slide_torch.optim import Adam

CONTENDERS = ("sharded", "replicas", "dense")


class SentBytes(TorchDispatchMode):
    """Counts the bytes that this rank sends."""

    def __init__(self, ranks: int) -> None:
        super().__init__()
        self.ranks, self.total = ranks, 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        if name.startswith(("c10d::", "_c10d_functional::")):
            self.total += self._sent(name, args)
        return func(*args, **(kwargs or {}))

    def _sent(self, name: str, args: tuple[Any, ...]) -> float:
        R = self.ranks
        if "allreduce" in name or "all_reduce" in name:
            return 2 * (R - 1) / R * _nbytes(args[0])
        if "allgather" in name or "all_gather" in name:
            own = args[1] if name.startswith("c10d::") else args[0]
            return (R - 1) * _nbytes(own)
        if "alltoall" in name or "all_to_all" in name:
            return (R - 1) / R * _nbytes(args[1] if name.startswith("c10d::") else args[0])
        if "reduce_scatter" in name:
            return (R - 1) / R * _nbytes(args[1] if name.startswith("c10d::") else args[0])
        return 0.0


def _nbytes(tensors: Any) -> int:
    if isinstance(tensors, torch.Tensor):
        return tensors.nbytes
    return sum(_nbytes(tensor) for tensor in tensors)


class Contender:
    """A layer with its optimizer, as this rank has it."""

    def __init__(self, name: str, args: argparse.Namespace, ranks: int) -> None:
        self.name, self.args, self.ranks = name, args, ranks
        mesh = init_device_mesh("cpu", (ranks,))
        dtype = torch.bfloat16 if args.bf16 else torch.float32
        if name == "dense":
            self.head: Any = nn.Linear(args.width, args.classes, dtype=dtype)
            plan = ColwiseParallel(use_local_output=False, input_layouts=Replicate())
            parallelize_module(self.head, mesh, plan)
            self.optimizer: Any = torch.optim.Adam(self.head.parameters(), lr=1e-3, foreach=False)
            return
        sharded = name == "sharded"
        device = "meta" if sharded else None
        head = LSHLinear(args.width, args.classes, sparse=True, device=device, dtype=dtype)
        self.head = shard_(head, mesh) if sharded else prepare(head)
        # (a bfloat16 weight is updated in step() in any case)
        fuse = sharded and not args.bf16
        self.optimizer = Adam(head.parameters(), lr=1e-3, fuse_backward=fuse)
        self.dtype = dtype

    def step(self) -> None:
        args = self.args
        x = torch.randn(args.batch, args.width, requires_grad=True)
        target = torch.randint(args.classes, (args.batch,))
        if self.name == "replicas":  # its part of the same batch
            own = slice(dist.get_rank(), None, self.ranks)
            x, target = x.detach()[own].clone().requires_grad_(), target[own]
        if args.bf16:
            x = x.bfloat16().detach().requires_grad_()
        self.optimizer.zero_grad()
        with loss_parallel() if self.name == "dense" else contextlib.nullcontext():
            F.cross_entropy(self.head(x), target).backward()
        if self.name == "replicas":
            allreduce_row_gradients(self.head)
        self.optimizer.step()


def steps_within(seconds: float, ms: float, most: int) -> int:
    """Steps of so many milliseconds that fit, the same number on all ranks; at least three."""
    count = torch.tensor(min(most, max(3, int(seconds * 1e3 / ms))))
    dist.all_reduce(count, dist.ReduceOp.MIN)
    return int(count)


def work(
    rank: int, file: str, result: str, name: str, args: argparse.Namespace, ranks: int
) -> None:
    torch.set_num_threads(max(1, args.threads // max(args.ranks)))
    limit = timedelta(minutes=10)
    dist.init_process_group("gloo", f"file://{file}", timeout=limit, rank=rank, world_size=ranks)
    torch.manual_seed(args.seed)
    base = resident_gb()
    contender = Contender(name, args, ranks)
    for _ in range(3):
        contender.step()
    with SentBytes(ranks) as sent:
        contender.step()
    dist.barrier()
    steps = steps_within(args.seconds, milliseconds(contender.step), args.steps)
    times = [milliseconds(contender.step) for _ in range(steps)]
    found = {"ms": median(times), "mean_ms": sum(times) / steps, "steps": steps}
    found |= {"bytes_sent": sent.total, "gb": resident_gb("VmHWM") - base}
    if name != "dense":
        found["active_rows"] = contender.head.stats()["union"]
    if rank == 0:
        torch.save(found, result)
    dist.barrier()
    dist.destroy_process_group()


def measured(name: str, args: argparse.Namespace, ranks: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        result = f"{folder}/result"
        mp.spawn(work, (f"{folder}/store", result, name, args, ranks), nprocs=ranks)
        return torch.load(result, weights_only=True)


def main(argv: list[str] | None = None) -> None:
    parser = argument_parser(__doc__, "small sizes, to see that it runs")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--classes", type=int, default=670_091)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=20.0, help="after which steps end earlier")
    parser.add_argument("--bf16", action="store_true", help="parameters and moments in bfloat16")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    args = parse(parser, argv)
    if args.quick:
        args.classes, args.batch, args.steps = 2_000, 16, 3
    points = []
    for ranks in args.ranks:
        for name in args.contenders:
            points.append({"contender": name, "ranks": ranks, **measured(name, args, ranks)})
    columns = ["contender", "ranks", "ms", "mean_ms", "bytes_sent", "gb"]
    rows = [
        [f"{p[c]:,.4g}" if isinstance(p[c], float) else str(p[c]) for c in columns] for p in points
    ]
    names = ["contender", "ranks", "median ms", "mean ms", "bytes sent", "GB a rank"]
    print_table(names, rows)
    floor = 2 * args.batch * args.width * 4 / 1e3
    print(f"one all-reduce of an input's gradient over 2 ranks: {floor / 2:.1f} kB sent by each")
    setting = {k: getattr(args, k) for k in ("classes", "width", "batch", "bf16")}
    finish(args, setting, {"points": points}, lambda axes: _paint(axes, points))


def _paint(axes: Any, points: list[dict[str, Any]]) -> None:
    for name in dict.fromkeys(p["contender"] for p in points):
        own = [p for p in points if p["contender"] == name]
        axes.plot([p["ranks"] for p in own], [p["ms"] for p in own], marker="o", label=name)
    axes.set(xlabel="processes", ylabel="ms a step", yscale="log")
    axes.legend()


if __name__ == "__main__":
    main()
