"""Adam on row-sparse gradients, and the sum of duplicate rows, against torch's.

Contenders take turns, medians are printed; GB/s counts each touched number's traffic once: gradient
read, parameter and moments read and written. The bare pass adds the same gradient to the same rows
of two such arrays without square root or division: what the memory gives.

    python benchmarks/optim.py --csv benchmarks/results/optim.csv
"""

from __future__ import annotations

import argparse
import csv
import platform
import statistics
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from slide_torch import optim, optim_ops


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def alternate(contenders: dict, repeats: int) -> dict[str, list[float]]:
    """Milliseconds of every contender, in turns, the first turn left out."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(repeats + 1):
        for name, work in contenders.items():
            started = time.perf_counter()
            work()
            if turn > 0:
                times[name].append((time.perf_counter() - started) * 1e3)
    return times


def make_param(neurons: int, width: int, huge: bool) -> nn.Parameter:
    weight = torch.empty(neurons, width)
    if huge:
        optim_ops.advise_hugepages_(weight)
    return nn.Parameter(weight.normal_())


def adam_contenders(neurons: int, width: int, grad: Tensor) -> dict:
    def stepper(optimizer: torch.optim.Optimizer, param: nn.Parameter):
        param.grad = grad
        return optimizer.step

    plain, states, huge, torchs, bare = (
        make_param(neurons, width, huge) for huge in (False, False, True, False, True)
    )
    without_advice = optim.Adam([plain])
    without_advice.state[plain] |= {
        key: torch.zeros_like(plain) for key in ("exp_avg", "exp_avg_sq")
    }
    buffer = optim._zeros_like(bare)
    rows, values = grad._indices()[0].contiguous(), grad._values()
    options = {
        "lr": 0.0,
        "momentum": 1.0,
        "weight_decay": 0.0,
        "nesterov": False,
        "maximize": False,
    }
    return {
        "torch SparseAdam": stepper(torch.optim.SparseAdam([torchs]), torchs),
        "Adam, ordinary pages": stepper(without_advice, plain),
        "Adam, huge pages: moments": stepper(optim.Adam([states]), states),
        "Adam, huge pages: all": stepper(optim.Adam([huge]), huge),
        "bare pass": lambda: optim_ops.sgd_rows_(bare, buffer, rows, values, **options),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--neurons", type=int, default=670_091)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--rows", type=int, default=300_000, help="touched rows")
    parser.add_argument("--entries", type=int, nargs="*", default=[3_000, 300_000])
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    level = torch.ops.slide_torch.instruction_set()
    print(f"{cpu_name()}, {args.threads} threads, {level}, torch {torch.__version__}", end=", ")
    print(f"seed {args.seed}, {args.neurons} x {args.width}")

    rows = torch.randperm(args.neurons)[: args.rows].sort().values
    shape, values = (args.neurons, args.width), torch.randn(args.rows, args.width)
    grad = torch.sparse_coo_tensor(
        rows[None], values, shape, is_coalesced=True, check_invariants=False
    )
    table = []
    for name, times in alternate(adam_contenders(*shape, grad), args.repeats).items():
        arrays = 5 if name == "bare pass" else 7
        table.append((f"{name} ({args.rows} rows)", arrays * values.nbytes / 1e6, times))
    for entries in args.entries:
        indices = torch.randint(args.neurons, (1, entries))
        indices[:, 1::4] = indices[:, :-1:4]  # a quarter are duplicates
        values = torch.randn(entries, args.width)
        loose = torch.sparse_coo_tensor(indices, values, shape, check_invariants=False)
        contenders = {
            "torch coalesce": loose.coalesce,
            "coalesce_rows": lambda i=indices[0], v=values: optim_ops.coalesce_rows(i, v, shape[0]),
        }
        for name, times in alternate(contenders, args.repeats).items():
            table.append((f"{name} ({entries} entries)", 1.75 * values.nbytes / 1e6, times))

    print(f"{'':44}{'median ms':>10}{'10%':>9}{'90%':>9}{'GB/s':>8}")
    head = ["contender", "ms_median", "ms_10", "ms_90", "gb_s"]
    head += ["neurons", "width", "cpu", "threads", "isa", "torch", "seed"]
    setting = (*shape, cpu_name(), args.threads, level, torch.__version__, args.seed)
    records = []
    for name, megabytes, times in table:
        ordered, median = sorted(times), statistics.median(times)
        low, high = ordered[len(ordered) // 10], ordered[-1 - len(ordered) // 10]
        rate = megabytes / median
        print(f"{name:44}{median:10.2f}{low:9.2f}{high:9.2f}{rate:8.1f}")
        figures = (f"{median:.3f}", f"{low:.3f}", f"{high:.3f}", f"{rate:.1f}")
        records.append((name, *figures, *setting))
    if args.csv:
        args.csv.parent.mkdir(parents=True, exist_ok=True)
        with args.csv.open("w", newline="") as file:
            csv.writer(file).writerows([head, *records])


if __name__ == "__main__":
    main()
