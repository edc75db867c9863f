"""Does a random tail drawn by what the batch looks for estimate a softmax better than one by frequency?

    python -m benchmarks.accuracy.query_tails --classes 20000 --json benchmarks/results/query_tails.json

A model of the next word (next_word.py) is trained without candidates: the active set is the batch's labels
and a tail, corrected by inclusion probabilities. The tail of each batch is drawn from a mixture of
log-uniform shares and shares that follow the batch's hidden vectors:

- tables: a softmax over the buckets of k-means tables, the logit of a bucket being that of its mean row, its
  spread added as a normal distribution's, and within a bucket in proportion to exp(bias) (in the spirit of
  MIDX, arXiv:2501.08563);
- exact: the softmax itself, at the cost of all N: what the best tables could give.

Of the batch's distributions it is the root mean square, which minimises the mean relative variance of the
partition functions. Contenders are trained for --steps on the same batches, in turns; perplexity is exact, of
the test text. Then all samplers draw --repeats tails for held-out batches from the weights that the first
contender ended with, and errors are those of sampling.py. Milliseconds are CPU time of this process, and
those of the proposal are a part of a step's.
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common.arguments import argument_parser, parse
from benchmarks.common.record import finish
from examples.common.output import print_table
from slide_torch import HashTables, LSHLinear, LSHOptions
from slide_torch.tails.proposals import log_uniform_shares

from .contenders import Contender
from .load import load_problem
from .next_word import CONTEXT, NextWord
from .sampling import Errors, exact_of
from .training import Training

TURN = 50  # steps


class Sampler(NamedTuple):
    """``share`` is that of the distribution ``kind`` in the mixture, the rest is log-uniform."""

    kind: str
    share: float = 0.0
    trained: bool = False

    @property
    def name(self) -> str:
        return f"{self.share:g} {self.kind}" if self.share else self.kind


SAMPLERS = [
    Sampler("log-uniform", trained=True),
    Sampler("tables", 0.75, trained=True),
    Sampler("exact", 0.75, trained=True),
    Sampler("uniform"),
    Sampler("counts^0.75"),
    Sampler("tables", 0.1),
    Sampler("tables", 0.25),
    Sampler("tables", 0.5),
    Sampler("tables", 0.9),
]


class Proposal:
    """A sampler's shares of the classes, for one layer after the other as its weights move."""

    def __init__(self, sampler: Sampler, problem: NextWord) -> None:
        self.sampler = sampler
        self.tables: HashTables | None = None
        self.seconds = 0.0
        words = problem.num_labels
        self.log_uniform = torch.from_numpy(log_uniform_shares(words) / math.log(words + 1))
        self.fixed = {
            "log-uniform": self.log_uniform,
            "uniform": torch.ones(words, dtype=torch.float64),
            "counts^0.75": problem.log_frequency.double().mul(0.75).exp(),
        }.get(sampler.kind)

    def attach(self, layer: LSHLinear) -> None:
        """Makes the tail of ``layer`` follow each batch's hidden vectors."""
        if self.fixed is not None:
            layer.set_frequencies(self.fixed, power=1)
        else:
            layer.register_forward_pre_hook(self._before_forward)

    @torch.no_grad()
    def _before_forward(self, layer: LSHLinear, inputs: tuple[Tensor, ...]) -> None:
        started = time.process_time()
        weight, bias, hidden = layer.weight.detach(), layer.bias.detach(), inputs[0].detach()
        if self.sampler.kind == "exact":
            own = root_mean_square(F.linear(hidden, weight, bias))
        else:
            own = self._by_buckets(hidden, weight, bias)
        share = self.sampler.share
        mixed = share * own.double() / own.sum() + (1 - share) * self.log_uniform
        layer.set_frequencies(mixed, power=1)
        self.seconds += time.process_time() - started

    def _by_buckets(self, hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Shares by the buckets' mean rows, of which the last coordinate is the mean bias."""
        if self.tables is None:
            options = LSHOptions(family="kmeans", rerank=0)
            self.tables = HashTables(options, *weight.shape, has_bias=True)
        self.tables.maintain(weight, bias, advance=True, all_rows_move=True)
        family, codes = self.tables.family, self.tables.codes
        assert family is not None and codes is not None
        means, spread = family.buckets[0, :, :-2], family.buckets[0, :, -1]
        factors = (bias - bias.max()).exp()
        mass = torch.zeros(len(means)).index_add_(0, codes[0].long(), factors)
        variance = spread.clamp(min=0).square() / hidden.shape[1]
        logits = torch.addmm(mass.log(), hidden, means.T)
        logits.addr_(hidden.square().sum(1), variance, alpha=0.5)
        return (root_mean_square(logits) / mass)[codes[0].long()] * factors


def root_mean_square(logits: Tensor) -> Tensor:
    return logits.softmax(1).square_().mean(0).sqrt_()


@dataclass
class Run:
    """One contender's training, which takes turns with others."""

    sampler: Sampler
    draws: int
    training: Training
    proposal: Proposal
    random_state: Tensor
    seconds: float = 0.0
    rows: list[float] = field(default_factory=list)

    @staticmethod
    def of(problem: NextWord, sampler: Sampler, draws: int, seed: int, args) -> Run:
        contender = Contender(sampler.name, "lsh", options_of(draws))
        settings = {"steps": args.steps, "batch": args.batch, "lr": args.lr}
        training = Training(problem, contender, settings, seed)
        proposal = Proposal(sampler, problem)
        proposal.attach(training.output.linear)
        return Run(sampler, draws, training, proposal, torch.get_rng_state())

    def go_on(self) -> None:
        """A turn."""
        torch.set_rng_state(self.random_state)
        started = time.process_time()
        steps = min(TURN, self.training.settings["steps"] - self.training.steps)
        for _, (features, labels) in zip(range(steps), self.training.batches(), strict=False):
            self.training.step(features, labels)
        self.seconds += time.process_time() - started
        self.rows.append(self.training.output.classes()[0])
        self.random_state = torch.get_rng_state()


def options_of(draws: int) -> dict[str, Any]:
    shares = {"tail_distribution": "frequencies", "correction": "importance"}
    return {"budget": 0, "tail": draws, **shares}


def train_all(problem: NextWord, seed: int, args: argparse.Namespace) -> list[Run]:
    """Trains each contender with each number of draws."""
    trained = [sampler for sampler in SAMPLERS if sampler.trained]
    runs = [Run.of(problem, sampler, n, seed, args) for n in args.draws for sampler in trained]
    for step in range(0, args.steps, TURN):
        for run in runs:
            run.go_on()
        if step % (10 * TURN) == 0:
            print(
                f"seed {seed}: {min(step + TURN, args.steps):,} of {args.steps:,} steps", flush=True
            )
    return runs


def held_out(problem: NextWord, training: Training, args) -> list[tuple[Tensor, Tensor]]:
    """Batches of (hidden vectors, labels) of the test text."""
    windows = torch.from_numpy(problem.windows["test"])
    count = max(1, args.batch // CONTEXT)
    order = torch.from_numpy(np.random.default_rng(args.seed).permutation(len(windows)))
    with torch.no_grad():
        return [
            (training.body(windows[own, :-1]), windows[own, 1:].reshape(-1))
            for own in order.split(count)[: args.batches]
        ]


def errors_of(problem: NextWord, sampler: Sampler, draws: int, batches, linear, args) -> dict:
    """Means over ``batches`` of what sampling.py measures."""
    layer = LSHLinear(*linear.weight.T.shape, sparse=True, options=LSHOptions(**options_of(draws)))
    layer.load_state_dict(linear.state_dict())
    Proposal(sampler, problem).attach(layer)
    found = []
    for x, labels in batches:
        errors = Errors(exact_of(x, labels, layer.weight.detach(), layer.bias.detach()))
        for repeat in range(args.repeats):
            torch.manual_seed(1 + repeat)
            own = x.clone().requires_grad_()
            losses = F.cross_entropy(layer(own), labels, reduction="none")
            errors.add(losses.detach(), *torch.autograd.grad(losses.mean(), (own, layer.weight)))
        found.append(errors.result())
    return {key: sum(f[key] for f in found) / len(found) for key in found[0]}


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    problem = load_problem("words", text=args.text, classes=args.classes)
    assert isinstance(problem, NextWord)
    results: dict[tuple[str, int], dict[str, Any]] = {}
    last = None
    for seed in range(args.seed, args.seed + args.seeds):
        runs = train_all(problem, seed, args)
        last = last or runs[0].training
        for run in runs:
            empty = {"perplexity": [], "ms_step": [], "proposal_ms_step": [], "active_rows": []}
            found = results.setdefault((run.sampler.name, run.draws), empty)
            found["perplexity"].append(run.training.evaluate("test")["perplexity"])
            found["ms_step"].append(run.seconds * 1e3 / args.steps)
            found["proposal_ms_step"].append(run.proposal.seconds * 1e3 / args.steps)
            found["active_rows"].append(sum(run.rows) / len(run.rows))
            print(f"{run.sampler.name}, {run.draws}: {found}", flush=True)
    assert last is not None
    batches = held_out(problem, last, args)
    return [
        {
            "sampler": sampler.name,
            "draws": draws,
            **errors_of(problem, sampler, draws, batches, last.output.linear, args),
            **results.get((sampler.name, draws), {}),
        }
        for draws in args.draws
        for sampler in SAMPLERS
    ]


COLUMNS = [
    "sampler",
    "draws",
    "Z / exact",
    "its deviation",
    "loss - exact",
    "input gradient: error",
]
COLUMNS += ["weight gradient: error", "perplexity", "ms/step", "of the proposal"]


def lines(results: list[dict[str, Any]]) -> list[list[str]]:
    return [
        [
            r["sampler"],
            f"{r['draws']:,}",
            f"{r['z_mean']:.3f} ± {r['z_standard_error']:.3f}",
            f"{r['z_deviation']:.3f}",
            f"{r['loss_bias']:+.4f}",
            f"{r['input_gradient_rms']:.3f}",
            f"{r['weight_gradient_rms']:.3f}",
            *(
                " ".join(f"{value:.{digits}f}" for value in r.get(key, ()))
                for key, digits in (("perplexity", 2), ("ms_step", 1), ("proposal_ms_step", 1))
            ),
        ]
        for r in results
    ]


def paint(axes: Any, results: list[dict[str, Any]]) -> None:
    """Errors of the weight's gradient by the number of draws."""
    for name in dict.fromkeys(r["sampler"] for r in results):
        own = [r for r in results if r["sampler"] == name]
        axes.plot(
            [r["draws"] for r in own], [r["weight_gradient_rms"] for r in own], "o-", label=name
        )
    axes.set_xscale("log")
    axes.set_xlabel("draws")
    axes.set_ylabel("error of the weight's gradient")
    axes.legend(fontsize=7)


def main() -> None:
    parser = argument_parser(__doc__, "4 steps, two draws")
    add = parser.add_argument
    add("--text", type=Path, help="default: Wikipedia's introductions")
    add("--classes", type=int, default=0, help="only the most frequent words; 0: all")
    add("--steps", type=int, default=1500)
    add("--batch", type=int, default=512)
    add("--lr", type=float, default=1e-2, help="falls linearly to 0")
    add("--draws", type=int, nargs="+", default=[256, 1024], help="lengths of the tail")
    add("--seeds", type=int, default=1, help="runs of each contender, from --seed on")
    add("--batches", type=int, default=4, help="held-out batches that errors are of")
    add("--repeats", type=int, default=12, help="draws for each of them, at least 2")
    args = parse(parser)
    if args.quick:
        args.steps, args.batch, args.batches, args.repeats = 4, 64, 1, 2
    if args.repeats < 2:
        parser.error(f"--repeats: expected at least 2, got {args.repeats}")
    results = measure(args)
    print_table(COLUMNS, lines(results))
    names = ("classes", "steps", "batch", "lr", "seeds", "batches", "repeats")
    record = {"samplers": results, "columns": COLUMNS, "rows": lines(results)}
    setting = {name: getattr(args, name) for name in names}
    finish(args, setting, record, lambda axes: paint(axes, results))


if __name__ == "__main__":
    main()
