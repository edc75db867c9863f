"""Every operator against the bytes that it must move and the arithmetic that it must do.

    python benchmarks/kernels.py --json benchmarks/results/kernels.json

Amazon-670K's shape: 670,091 neurons of width 128, a batch of 128. Rows lie around random centres, 64 to each;
inputs around centres drawn at random. The per-sample pattern takes 3,840 active neurons a sample from
tables over these rows; the shared one the layer's defaults. Codes and table build: K=6, L=50.

One process an instruction set (SLIDE_TORCH_ISA); in every round each level takes its turn with one
thread and with --threads. Medians. The bound of an operator is the longer of two times: its bytes at
the rates that the memory gives in the same rounds, and its arithmetic at the rate of torch's float32
matrix product. Where torch has the operation too, it is measured beside.

To add an operator: a function below, marked with @case.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from common import (
    HIDDEN,
    LABELS,
    Memory,
    Worker,
    argument_parser,
    best_rates,
    bound_ms,
    finish,
    median,
    milliseconds,
    parse,
    print_rates,
    print_table,
)
from torch import Tensor, nn

from slide_torch import LSHOptions, instruction_set, ops, optim
from slide_torch.active_set import SampleActiveSets, SharedActiveSet
from slide_torch.sampling.draw import draw_active_set
from slide_torch.sampling.targets import as_labels
from slide_torch.tables.hash_tables import HashTables

LEVELS = ("baseline", "avx2", "avx512")


@dataclass
class Case:
    """One operator on the problem.

    Attributes:
        run: calls it.
        traffic: bytes that it must move, by kind (see common.Memory); what a cache holds does not count.
        flops: arithmetic that it must do, a multiplication and an addition being two.
        peer: the same by torch, or None.
    """

    run: Callable[[], object]
    traffic: dict[str, float] = field(default_factory=dict)
    flops: float = 0.0
    peer: Callable[[], object] | None = None


class Problem:
    """What the operators work on, made from a seed."""

    def __init__(self, neurons: int, width: int, batch: int, active: int, seed: int) -> None:
        torch.manual_seed(seed)
        self.neurons, self.width, self.batch = neurons, width, batch
        centres = torch.randn(max(1, neurons // 64), width)
        self.weight = ops.advise_hugepages_(torch.empty(neurons, width)).normal_()
        self.weight.mul_(0.7).add_(centres[torch.arange(neurons) * len(centres) // neurons])
        self.weight.mul_(width**-0.5)
        self.bias = torch.zeros(neurons)
        cluster = torch.randint(len(centres), (batch,))
        self.input = centres[cluster] + 0.7 * torch.randn(batch, width)
        first = (cluster * neurons) // len(centres)
        target = (first[:, None] + torch.randint(64, (batch, 5))).clamp(max=neurons - 1)
        self.labels = as_labels(
            target, torch.Size([batch]), neurons, torch.float32, ignore_index=-100
        )
        budget = min(active, neurons // 2)
        self.sample_tables = self._tables(
            LSHOptions(pattern="per_sample", budget=budget, tail=0, L=50)
        )
        self.sample = draw_active_set(self.sample_tables, self.input, self.labels)
        self.shared = draw_active_set(
            self._tables(LSHOptions(family="simhash")), self.input, self.labels
        )
        assert isinstance(self.sample, SampleActiveSets) and isinstance(
            self.shared, SharedActiveSet
        )

    def _tables(self, options: LSHOptions) -> HashTables:
        tables = HashTables(options, self.neurons, self.width, has_bias=True)
        tables.rebuild(self.weight, self.bias)
        return tables

    def row_bytes(self, rows: Tensor) -> int:
        return 4 * self.width * rows.numel()

    def codes(self, family: str, **options) -> Callable[[], Tensor]:
        """Hashes every row with the bias, centred, K=6 L=50."""
        chosen = LSHOptions(family=family, K=6, L=50, **options)
        tables = HashTables(chosen, self.neurons, self.width, has_bias=True)
        tables.rebuild(self.weight, self.bias)
        return lambda: tables.family.row_codes(self.weight, self.bias)

    def describe(self) -> dict[str, float]:
        return {
            "active_per_sample": self.sample.active_per_sample,
            "union": self.sample.rows.numel(),
            "ids_read_per_sample": self.sample.ids_read / self.batch,
            "shared_union": self.shared.rows.numel(),
        }


CASES: dict[str, Callable[[Problem], Case]] = {}


def case(make: Callable[[Problem], Case]) -> Callable[[Problem], Case]:
    CASES[make.__name__] = make
    return make


# --- hashing and tables ------------------------------------------------------------------------------


@case
def simhash_hadamard(p: Problem) -> Case:
    size = 1 << (p.width - 1).bit_length()
    rotations = -(-6 * 50 // size)
    additions = 3 * rotations * size * (size.bit_length() - 1)  # three fast transforms a rotation
    traffic = {"read": p.weight.nbytes, "write": 2 * 50 * p.neurons}
    return Case(p.codes("simhash", projection="hadamard"), traffic, additions * p.neurons)


@case
def simhash_dense(p: Problem) -> Case:
    traffic = {"read": p.weight.nbytes, "write": 2 * 50 * p.neurons}
    flops = 2 * 6 * 50 * (p.width + 1) * p.neurons
    return Case(p.codes("simhash", projection="gaussian"), traffic, flops)


@case
def dwta(p: Problem) -> Case:
    comparisons = 6 * 50 * 8 * p.neurons
    return Case(
        p.codes("dwta"), {"read": p.weight.nbytes, "write": 4 * 50 * p.neurons}, comparisons
    )


@case
def build_tables(p: Problem) -> Case:
    codes = p.codes("simhash")()
    traffic = {"read": codes.nbytes, "write": 4 * codes.numel()}
    return Case(lambda: ops.build_tables(codes, 6), traffic)


@case
def update_codes_(p: Problem) -> Case:
    codes, rows = p.codes("simhash")(), p.sample.rows
    fresh = codes[:, rows].contiguous()
    traffic = {"read": fresh.nbytes, "update": 2 * fresh.nbytes}
    return Case(lambda: ops.update_codes_(codes, rows, fresh), traffic)


# --- active sets -------------------------------------------------------------------------------------


@case
def retrieve(p: Problem) -> Case:
    tables, labels = p.sample_tables, p.labels
    codes = tables.family.query_codes(p.input)
    ids, no_tail = labels.ids.int(), torch.empty(0, dtype=torch.int32)
    options = tables.options
    traffic = {"read": 4 * p.sample.ids_read, "write": p.sample.active.nbytes}
    return Case(
        lambda: ops.retrieve(
            codes, tables.offsets, tables.ids, labels.offsets, ids, no_tail,
            options.budget, options.bucket_cap, 0,
        ),
        traffic,
    )  # fmt: skip


@case
def topk_lists(p: Problem) -> Case:
    tables = p._tables(LSHOptions())
    options, offsets = tables.options, tables.offsets[0].long()
    probes = tables.family.query_codes(p.input, options.probes).T.long().contiguous()
    sizes = offsets.diff()
    return Case(
        lambda: ops.topk_lists(
            p.input, p.weight, p.bias, offsets, tables.ids[0], tables.row_codes, tables.row_terms,
            probes, options.budget, 2 * options.budget,
        ),
        {"row_read": (p.width + 8) * sizes[probes.unique()].sum().item()},
        2 * p.width * sizes[probes].sum().item(),
    )  # fmt: skip


@case
def transpose_active(p: Problem) -> Case:
    s = p.sample
    traffic = {"read": s.active.nbytes, "write": 2 * s.active.nbytes + 16 * s.rows.numel()}
    return Case(lambda: ops.transpose_active(s.offsets, s.active, p.neurons), traffic)


@case
def union_active(p: Problem) -> Case:
    tail = ops.sample_tail(min(1024, p.neurons // 4), p.neurons, 0)
    traffic = {"read": p.sample.active.nbytes, "write": 9 * p.sample.rows.numel()}
    return Case(lambda: ops.union_active(p.sample.active, tail, p.neurons), traffic)


# --- cross entropy -----------------------------------------------------------------------------------


def shared_arguments(p: Problem) -> tuple:
    places = p.labels.offsets, p.shared.label_places, p.labels.probabilities
    return p.input, p.weight, p.bias, p.shared.rows, None, *places, 1.0, True


def sample_arguments(p: Problem) -> tuple:
    s = p.sample
    places = p.labels.offsets, s.label_places, p.labels.probabilities
    active = s.rows, s.offsets, s.pair_offsets, s.pair_positions, s.pair_samples
    return p.input, p.weight, p.bias, *active, None, *places, 1.0, True


@case
def shared_cross_entropy(p: Problem) -> Case:
    pairs, arguments = p.shared.rows.numel() * p.batch, shared_arguments(p)
    return Case(
        lambda: torch.ops.slide_torch.shared_cross_entropy(*arguments),
        {"row_read": p.row_bytes(p.shared.rows)},
        2 * pairs * p.width,
    )


@case
def shared_cross_entropy_backward(p: Problem) -> Case:
    x, weight, _, rows, _, *places, _, _ = arguments = shared_arguments(p)
    _, *kept = torch.ops.slide_torch.shared_cross_entropy(*arguments)
    grad_loss = torch.full((p.batch,), 1 / p.batch)
    backward = torch.ops.slide_torch.shared_cross_entropy_backward
    return Case(
        lambda: backward(grad_loss, x, weight, rows, *places, *kept, True, True),
        {"row_read": p.row_bytes(rows), "write": p.row_bytes(rows)},
        4 * rows.numel() * p.batch * p.width,
    )


@case
def sample_cross_entropy(p: Problem) -> Case:
    arguments = sample_arguments(p)
    return Case(
        lambda: torch.ops.slide_torch.sample_cross_entropy(*arguments),
        {"row_read": p.row_bytes(p.sample.rows)},
        2 * p.sample.active.numel() * p.width,
    )


@case
def sample_cross_entropy_backward(p: Problem) -> Case:
    x, weight, _, rows, *active, _, _, _, _, _, _ = arguments = sample_arguments(p)
    places = arguments[-5:-2]
    _, *kept = torch.ops.slide_torch.sample_cross_entropy(*arguments)
    grad_loss = torch.full((p.batch,), 1 / p.batch)
    backward = torch.ops.slide_torch.sample_cross_entropy_backward
    return Case(
        lambda: backward(grad_loss, x, weight, rows, *active, *places, *kept, True, True),
        {"row_read": p.row_bytes(rows), "write": p.row_bytes(rows)},
        4 * p.sample.active.numel() * p.width,
    )


@case
def sample_cross_entropy_backward_adam_(p: Problem) -> Case:
    x, weight, _, rows, *active, _, _, _, _, _, _ = arguments = sample_arguments(p)
    places = arguments[-5:-2]
    _, *kept = torch.ops.slide_torch.sample_cross_entropy(*arguments)
    grad_loss = torch.full((p.batch,), 1 / p.batch)
    backward = torch.ops.slide_torch.sample_cross_entropy_backward_adam_
    adam = torch.zeros_like(weight), torch.zeros_like(weight), 1e-9, 0.9, 0.999, 1e-8, 0.0, 5, False
    return Case(
        lambda: backward(grad_loss, x, weight, rows, *active, *places, *kept, True, *adam),
        {"row_update": 6 * p.row_bytes(rows)},
        4 * p.sample.active.numel() * p.width,
    )


# --- gradients and optimizers ------------------------------------------------------------------------


def row_gradient(p: Problem) -> Tensor:
    rows, shape = p.sample.rows, p.weight.shape
    values = 1e-3 * torch.randn(rows.numel(), p.width)
    return torch.sparse_coo_tensor(
        rows[None], values, shape, is_coalesced=True, check_invariants=False
    )


def stepper(make: Callable, param: Tensor, grad: Tensor) -> Callable[[], object]:
    parameter = nn.Parameter(param)
    parameter.grad = grad
    return make([parameter], lr=1e-9).step


@case
def adam_rows_(p: Problem) -> Case:
    grad, touched = row_gradient(p), p.row_bytes(p.sample.rows)
    ours = stepper(optim.Adam, p.weight, grad)
    theirs = stepper(torch.optim.SparseAdam, p.weight.clone(), grad)
    return Case(ours, {"row_update": 6 * touched, "read": touched}, peer=theirs)


@case
def adam_rows_on_ordinary_pages(p: Problem) -> Case:
    param = nn.Parameter(torch.zeros_like(p.weight))
    param.grad = row_gradient(p)
    optimizer = optim.Adam([param], lr=1e-9)
    optimizer.state[param] |= {key: torch.zeros_like(param) for key in ("exp_avg", "exp_avg_sq")}
    touched = p.row_bytes(p.sample.rows)
    return Case(optimizer.step, {"row_update": 6 * touched, "read": touched})


@case
def sgd_rows_(p: Problem) -> Case:
    grad, touched = row_gradient(p), p.row_bytes(p.sample.rows)
    ours = stepper(optim.SGD, p.weight, grad)
    theirs = stepper(torch.optim.SGD, p.weight.clone(), grad)
    return Case(ours, {"row_update": 2 * touched, "read": touched}, peer=theirs)


@case
def adagrad_rows_(p: Problem) -> Case:
    grad, touched = row_gradient(p), p.row_bytes(p.sample.rows)
    ours = stepper(optim.Adagrad, p.weight, grad)
    theirs = stepper(torch.optim.Adagrad, p.weight.clone(), grad)
    return Case(ours, {"row_update": 4 * touched, "read": touched}, peer=theirs)


@case
def rows_to_dense(p: Problem) -> Case:
    grad = row_gradient(p)
    rows, values = grad._indices()[0], grad._values()
    traffic = {"read": values.nbytes, "write": p.weight.nbytes}
    return Case(lambda: ops.rows_to_dense(rows, values, p.neurons), traffic, peer=grad.to_dense)


@case
def coalesce_rows(p: Problem) -> Case:
    """As many entries as the active rows; a quarter of them are duplicates."""
    entries = p.sample.rows.numel()
    indices = torch.randint(p.neurons, (1, entries))
    indices[:, 1::4] = indices[:, :-1:4][:, : indices[:, 1::4].shape[1]]
    values = torch.randn(entries, p.width)
    distinct = indices.unique().numel()
    loose = torch.sparse_coo_tensor(indices, values, p.weight.shape, check_invariants=False)
    return Case(
        lambda: ops.coalesce_rows(indices[0], values, p.neurons),
        {"row_read": values.nbytes, "write": 4 * p.width * distinct},
        peer=loose.coalesce,
    )


# --- measuring ---------------------------------------------------------------------------------------


def level_worker(neurons: int, active: int, seed: int):
    """One instruction set: describes and measures one case after another."""
    problem = Problem(neurons, HIDDEN, min(128, neurons), active, seed)
    now: dict[str, Case] = {}

    def command(what: str, name: str = "", threads: int = 1):
        if what == "level":
            return instruction_set()
        if what == "problem":
            return problem.describe()
        if what == "prepare":
            now.clear()  # its memory makes room
            now["case"] = made = CASES[name](problem)
            return made.traffic, made.flops, made.peer is not None
        torch.set_num_threads(threads)
        run = now["case"].run if what == "run" else now["case"].peer
        assert run is not None
        return milliseconds(run)

    return command


def meter(neurons: int, seed: int):
    """Measures the memory and torch's matrix product; GB/s and GFLOP/s."""
    torch.manual_seed(seed)
    memory = Memory(neurons)
    a, b = torch.randn(2, 1536, 1536)

    def turn(threads: int):
        torch.set_num_threads(threads)
        return memory.turn(), 2 * 1536**3 / milliseconds(lambda: a @ b) / 1e6

    return turn


def start_levels(levels: list[str], *arguments) -> tuple[dict[str, Worker], dict[str, str]]:
    """A worker for each level that this machine has, and why the others have none."""
    workers, missing = {}, {}
    for level in levels:
        try:
            workers[level] = Worker(
                level_worker, *arguments, environment={"SLIDE_TORCH_ISA": level}
            )
        except RuntimeError as error:
            missing[level] = str(error).strip().splitlines()[-1]
            print(f"{level}: {missing[level]}")
    return workers, missing


def main() -> None:
    parser = argument_parser(__doc__, "4,000 neurons, one round")
    parser.add_argument("--neurons", type=int, default=LABELS)
    parser.add_argument("--active", type=int, default=3_840, help="per sample")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--levels", nargs="*", default=list(LEVELS), choices=LEVELS)
    parser.add_argument("--only", nargs="*", default=list(CASES), choices=list(CASES))
    args = parse(parser)
    if args.quick:
        args.neurons, args.active, args.rounds = 4_000, 50, 1
    workers, missing = start_levels(args.levels, args.neurons, args.active, args.seed)
    if not workers:
        raise SystemExit("no level to measure")
    best = next(reversed(workers))  # the widest: torch's peers run beside it
    measure = Worker(meter, args.neurons, args.seed)
    counts = sorted({1, args.threads})
    turns: dict[int, list] = {threads: [] for threads in counts}
    described, times = {}, {}
    for name in args.only:
        started = time.perf_counter()
        for worker in workers.values():
            described[name] = worker.run("prepare", name)
        keys = [(level, threads) for level in workers for threads in counts]
        times[name] = {key: [] for key in keys}
        if described[name][2]:
            times[name]["torch", args.threads] = []
        for turn in range(args.rounds + 1):  # the first warms up
            for (level, threads), found in times[name].items():
                what, at = ("peer", best) if level == "torch" else ("run", level)
                found.append(workers[at].run(what, "", threads))
            for threads in counts if turn % 4 == 0 else ():
                turns[threads].append(measure.run(threads))
        for found in times[name].values():
            del found[0]
        print(f"{name}: {time.perf_counter() - started:.0f} s", flush=True)
    problem = workers[best].run("problem")
    for worker in (measure, *workers.values()):
        worker.stop()
    rates = {threads: best_rates(memory for memory, _ in turns[threads]) for threads in counts}
    peak = {threads: median(gflops for _, gflops in turns[threads]) for threads in counts}
    results = [
        entry(name, level, times[name], described[name], counts, rates, peak)
        for name in args.only
        for level in workers
    ]
    report(results, counts, rates, peak, problem)

    def paint(axes) -> None:
        for offset, level in enumerate(workers):
            own = [r for r in results if r["level"] == level][::-1]
            places = [i + 0.8 * (len(workers) - offset) / len(workers) for i in range(len(own))]
            axes.barh(places, [r["bound_share"] for r in own], 0.8 / len(workers), label=level)
            axes.set_yticks([i + 0.6 for i in range(len(own))], [r["operator"] for r in own])
        axes.axvline(1.0, color="black", linewidth=1)
        axes.set_xlabel(f"bound / time, {args.threads} threads (1: at the bound)")
        axes.set_title("operators against the bytes and the arithmetic that they need")
        axes.legend()

    finish(
        args,
        {"neurons": args.neurons, "width": HIDDEN, "batch": min(128, args.neurons)},
        {
            "problem": problem,
            "memory": rates,
            "matrix_product_gflops": peak,
            "operators": results,
            "missing_levels": missing,
        },
        paint,
        (8, 8),
    )


def entry(name, level, times, described, counts, rates, peak) -> dict:
    """One line of the table."""
    traffic, flops, _ = described
    most = counts[-1]
    ms = {threads: median(times[level, threads]) for threads in counts}
    memory, arithmetic = bound_ms(traffic, rates[most]), flops / peak[most] / 1e6
    bound = max(memory, arithmetic)
    found = {
        "operator": name,
        "level": level,
        "ms": ms,
        "speedup": ms[1] / ms[most],
        "megabytes": sum(traffic.values()) / 1e6,
        "gflop": flops / 1e9,
        "bound_ms": bound,
        "bound_by": "memory" if memory >= arithmetic else "arithmetic",
        "bound_share": bound / ms[most],
    }
    if ("torch", most) in times:
        found["torch_ms"] = median(times["torch", most])
    return found


def report(results, counts, rates, peak, problem) -> None:
    print()
    most = counts[-1]
    print_table(
        ["operator", "level", *(f"ms, {n} threads" for n in counts), "speedup", "bound, ms", "bound by",
         "bound / ms", "torch, ms"],
        [
            [
                r["operator"],
                r["level"],
                *(f"{r['ms'][n]:.2f}" for n in counts),
                f"{r['speedup']:.2f}",
                f"{r['bound_ms']:.2f}",
                r["bound_by"],
                f"{r['bound_share']:.2f}",
                f"{r['torch_ms']:.2f}" if "torch_ms" in r else "",
            ]
            for r in results
        ],
    )  # fmt: skip
    print()
    print_rates(rates[most])
    print(f"\nmatrix product {peak[most]:.0f} GFLOP/s; bounds and torch: {most} threads")
    print(", ".join(f"{key} {value:,.0f}" for key, value in problem.items()))


if __name__ == "__main__":
    main()
