"""Bias and variance of the sampled softmax, for each sampler at one size of the active set.

    python -m benchmarks.accuracy.sampling --json benchmarks/results/sampling.json

The layer is the quickstart's (234,908 places, trained for --steps steps: benchmarks/common/places_model.py),
its classes renumbered by decreasing frequency, which log-uniform draws presume. A batch is held-out test
names and their labels. Each sampler draws --repeats active sets for the same batch, of about --active rows
each (what is certain, and a tail as long as that leaves room for); losses and gradients are held against
those of the exact softmax:

- Z / exact: the mean estimate of a sample's partition function over the exact one (1 is unbiased), with its
  standard error, and the standard deviation of single estimates (the median of samples);
- loss: mean of the estimated loss less the exact one;
- gradient: root mean square distance of the batch's gradient from the exact one, over the length of
  the exact one; and the same of the mean over all draws, which for an unbiased estimate falls with
  the root of their number. Of the input, and of the weight.

ms a step is draw, loss and backward without an optimizer, samplers taking turns; upkeep is tables or sums
built once, spread over the 50 steps that they first serve.
"""

from __future__ import annotations

import math
import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common.arguments import argument_parser, parse
from benchmarks.common.places_model import draw_rows, hidden_of, kept_model
from benchmarks.common.record import finish
from benchmarks.common.timing import median
from examples.common.output import print_table
from examples.data import places
from slide_torch import HashTables, LSHOptions
from slide_torch.functional import lsh_linear_cross_entropy
from slide_torch.sampling.step import StepRequest, draw_step
from slide_torch.sampling.targets import as_labels

UNCORRECTED = ("in-batch alone", "uniform", "SimHash + uniform")


def samplers() -> dict[str, tuple[dict[str, Any], float]]:
    """name -> options besides tail and correction, and the power of the counts."""
    counts = "frequencies"
    return {
        "in-batch alone": ({"budget": 0, "tail": 0}, 1.0),
        "uniform": ({"budget": 0}, 1.0),
        "log-uniform": ({"budget": 0, "tail_distribution": "log_uniform"}, 1.0),
        "counts": ({"budget": 0, "tail_distribution": counts}, 1.0),
        "counts^0.75": ({"budget": 0, "tail_distribution": counts}, 0.75),
        "uniform, counts": ({"budget": 0, "tail_distribution": ("uniform", counts)}, 1.0),
        "SimHash + uniform": ({"budget": 8}, 1.0),
        "k-means + uniform": ({"budget": 8, "family": "kmeans"}, 1.0),
        "exact top + uniform": ({"budget": 8, "family": "exact"}, 1.0),
        "exact top + counts": (
            {"budget": 8, "family": "exact", "tail_distribution": counts},
            1.0,
        ),
    }


def problem(args) -> tuple[Tensor, Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
    """Weight, bias, counts of the classes in their order, and batches of (hidden vectors, labels)."""
    if args.quick:
        counts = 1 + 10_000 / torch.arange(1.0, 2001)
        weight, bias = torch.randn(2000, 16) / 4, counts.log()
        labels = torch.multinomial(counts, args.batch * args.batches, replacement=True)
        hidden = weight[labels] * 2 + torch.randn(len(labels), 16)
        labels = labels.unsqueeze(1)
    else:
        data = places.load_places()
        model = kept_model(data, args.steps, args.seed)
        ids = torch.from_numpy(data.train.label_indices).long()
        counts = torch.bincount(ids, minlength=data.num_labels).clamp(min=1)
        order = counts.argsort(descending=True, stable=True)
        rows = draw_rows(data.test, args.batch * args.batches, args.seed)
        hidden, labels = hidden_of(model, rows)
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order))
        labels = torch.where(labels < 0, labels, place[labels.clamp(min=0)])
        counts = counts[order]
        weight, bias = model.head.weight.detach()[order], model.head.bias.detach()[order]
    batches = zip(hidden.split(args.batch), labels.split(args.batch), strict=True)
    return weight.contiguous(), bias.contiguous(), counts, list(batches)


def exact_of(x: Tensor, labels: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    """Losses (B), and gradients of their mean with respect to input and weight."""
    own = as_labels(labels, x.shape[:1], len(weight), x.dtype, -100)
    sample = torch.arange(len(x)).repeat_interleave(own.offsets.diff())
    logits = F.linear(x, weight, bias)
    normaliser = logits.logsumexp(1)
    target = own.probabilities * logits[sample, own.ids]
    losses = normaliser - torch.zeros(len(x)).index_add_(0, sample, target)
    share = logits.sub_(normaliser.unsqueeze(1)).exp_().div_(len(x))
    share.index_put_((sample, own.ids), -own.probabilities / len(x), accumulate=True)
    return losses, share @ weight, share.T @ x


class Contender:
    """One sampler over the problem, its tail as long as the active set leaves room for."""

    def __init__(self, args, weight: Tensor, bias: Tensor, counts: Tensor, batch, spec) -> None:
        options, power = spec["options"], spec["power"]
        self.weight = weight.detach().requires_grad_()
        self.bias = bias.detach().requires_grad_()
        self.correction = spec["correction"]
        tail = options.get("tail")
        for _ in range(3 if tail is None else 1):
            chosen = {**options, "tail": args.active // 2 if tail is None else tail}
            self.tables = HashTables(
                LSHOptions(**chosen, correction=spec["correction"]), *weight.shape, has_bias=True
            )
            if "frequencies" in self.tables.options.tail_parts:
                self.tables.set_frequencies(counts, power)
            rows = self.draw(batch).rows.shape[0]
            if "tail" in options:
                break
            tail = chosen["tail"] + args.active - rows
        self.upkeep_ms = self.tables.schedule.upkeep_seconds * 1e3 / 50

    def draw(self, batch):
        x, labels = batch
        request = StepRequest.of(
            "draw",
            self.tables,
            x,
            self.weight,
            self.bias,
            labels,
            training=False,
            sparse=True,
            generator=torch.Generator().manual_seed(0),
        )
        return draw_step(request)[1]

    def run(self, batch, seed: int) -> tuple[Tensor, Tensor, Tensor, float]:
        """Losses, gradients of input and weight (row-sparse), milliseconds."""
        x, labels = batch[0].requires_grad_(), batch[1]
        started = time.perf_counter()
        losses = lsh_linear_cross_entropy(
            x,
            self.weight,
            labels,
            linear_bias=self.bias,
            tables=self.tables,
            reduction="none",
            sparse=True,
            training=False,
            generator=torch.Generator().manual_seed(seed),
        )
        grads = torch.autograd.grad(losses.mean(), (x, self.weight))
        taken = (time.perf_counter() - started) * 1e3
        return losses.detach(), *grads, taken


class Errors:
    """Of one sampler on one batch, over its draws."""

    def __init__(self, exact: tuple[Tensor, ...]) -> None:
        self.losses, self.input, self.weight = exact
        self.weight_square = self.weight.square().sum().item()
        self.ratios: list[Tensor] = []
        self.square_input = self.square_weight = 0.0
        self.mean_input, self.mean_weight = (
            torch.zeros_like(self.input),
            torch.zeros_like(self.weight),
        )

    def add(self, losses: Tensor, input: Tensor, weight: Tensor) -> None:
        self.ratios.append((losses - self.losses).double())
        self.square_input += (input - self.input).square().sum().item()
        rows, values = weight._indices()[0], weight._values()
        own = self.weight[rows]
        change = (values - own).square().sum().item() - own.square().sum().item()
        self.square_weight += self.weight_square + change
        self.mean_input += input
        self.mean_weight[rows] += values

    def result(self) -> dict[str, float]:
        logs = torch.stack(self.ratios)
        ratios, count = logs.exp(), len(logs)
        means = ratios.mean(1)  # of a draw, over the samples
        input, weight = self.input.norm().item(), math.sqrt(self.weight_square)
        return {
            "z_mean": means.mean().item(),
            "z_standard_error": means.std().item() / math.sqrt(count),
            "z_deviation": ratios.std(0).median().item(),
            "loss_bias": logs.mean().item(),
            "input_gradient_rms": math.sqrt(self.square_input / count) / input,
            "input_gradient_of_mean": (self.mean_input / count - self.input).norm().item() / input,
            "weight_gradient_rms": math.sqrt(self.square_weight / count) / weight,
            "weight_gradient_of_mean": (
                (self.mean_weight / count - self.weight).norm().item() / weight
            ),
        }


def measure(args) -> list[dict[str, Any]]:
    weight, bias, counts, batches = problem(args)
    specs = []
    for name, (options, power) in samplers().items():
        for correction in ("importance", "none"):
            if correction == "none" and name not in UNCORRECTED:
                continue
            if correction == "importance" and options.get("tail") == 0:
                continue
            spec = {"name": name, "options": options, "power": power, "correction": correction}
            specs.append(spec)
    contenders = [Contender(args, weight, bias, counts, batches[0], spec) for spec in specs]
    found: list[list[dict[str, float]]] = [[] for _ in specs]
    times: list[list[float]] = [[] for _ in specs]
    rows = [0.0] * len(specs)
    for b, batch in enumerate(batches):
        exact = exact_of(*batch, weight, bias)
        errors = [Errors(exact) for _ in specs]
        for repeat in range(args.repeats):
            for i, contender in enumerate(contenders):
                *estimate, taken = contender.run(batch, 1 + repeat + b * args.repeats)
                errors[i].add(*estimate)
                times[i].append(taken)
                rows[i] += estimate[2]._nnz() / (args.repeats * len(batches))
        for i, error in enumerate(errors):
            found[i].append(error.result())
        print(f"batch {b + 1} of {len(batches)}", flush=True)
    return [
        {
            "sampler": spec["name"],
            "correction": spec["correction"],
            "tail": contender.tables.options.tail,
            "active_rows": active,
            # standard errors of independent batches add up as squares
            **{
                key: math.sqrt(sum(f[key] ** 2 for f in own)) / len(own)
                if key == "z_standard_error"
                else sum(f[key] for f in own) / len(own)
                for key in own[0]
            },
            "ms_step": median(taken),
            "upkeep_ms_step": contender.upkeep_ms,
        }
        for spec, contender, own, taken, active in zip(
            specs, contenders, found, times, rows, strict=True
        )
    ]


COLUMNS = [
    "sampler",
    "correction",
    "active rows",
    "Z / exact",
    "its deviation",
    "loss - exact",
    "input gradient: error",
    "of its mean",
    "weight gradient: error",
    "ms/step",
    "upkeep",
]


def lines(results: list[dict[str, Any]]) -> list[list[str]]:
    return [
        [
            r["sampler"],
            r["correction"],
            f"{r['active_rows']:,.0f}",
            f"{r['z_mean']:.3f} ± {r['z_standard_error']:.3f}",
            f"{r['z_deviation']:.3f}",
            f"{r['loss_bias']:+.3f}",
            f"{r['input_gradient_rms']:.3f}",
            f"{r['input_gradient_of_mean']:.3f}",
            f"{r['weight_gradient_rms']:.3f}",
            f"{r['ms_step']:.1f}",
            f"{r['upkeep_ms_step']:.1f}",
        ]
        for r in results
    ]


def paint(axes: Any, results: list[dict[str, Any]]) -> None:
    """Errors of the gradients of every corrected sampler."""
    corrected = [r for r in results if r["correction"] == "importance"]
    corrected.sort(key=lambda r: -r["weight_gradient_rms"])
    names = [r["sampler"] for r in corrected]
    for key, color in (("input_gradient_rms", "tab:blue"), ("weight_gradient_rms", "tab:orange")):
        axes.plot([r[key] for r in corrected], names, "o", color=color, label=key.replace("_", " "))
    axes.set_xscale("log")
    axes.set_xlabel("distance from the exact gradient over its length")
    axes.legend(fontsize=7)


def main() -> None:
    parser = argument_parser(__doc__, "2,000 random classes, 150 active rows, one batch of 16")
    parser.add_argument("--steps", type=int, default=3000, help="training steps of the layer")
    parser.add_argument("--active", type=int, default=4096, help="rows of an active set, about")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--batches", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=20, help="draws for each batch, at least 2")
    args = parse(parser)
    if args.quick:
        args.active, args.batch, args.batches, args.repeats = 300, 16, 1, 4
    if args.repeats < 2:
        parser.error(f"--repeats: expected at least 2, got {args.repeats}")
    results = measure(args)
    print_table(COLUMNS, lines(results))

    setting = {"steps": args.steps, "batch": args.batch, "batches": args.batches}
    record = {"samplers": results, "columns": COLUMNS, "rows": lines(results)}
    finish(args, setting | {"repeats": args.repeats}, record, lambda axes: paint(axes, results))


if __name__ == "__main__":
    main()
