"""Held-out accuracy against seconds of training: LSHLinear, its rivals and dense torch on real problems.

    python benchmarks/time_to_accuracy.py --problem places --classes 60000 --tune 20 --seeds 3 \\
        --epochs 5 --json benchmarks/results/time_to_accuracy_places_60000.json
    python benchmarks/time_to_accuracy.py --problem lemmas --contender dense --epochs 8 --resume --json ...
    python benchmarks/time_to_accuracy.py --problem lemmas --contender wide=budget:64,tail:4096 --json ...
    python benchmarks/time_to_accuracy.py --xmc train.txt test.txt --propensity Amazon-670K --json ...

Model body, initial weights, batches and seed are the same for every contender; its output layer differs
(benchmarks/heads.py). Learning rate and schedule (constant, or linearly to 0) are chosen for each contender
on validation rows, by trials of --tune seconds. The clock runs in training steps, tables' upkeep
included; evaluation, by the exact logits, does not count: a fixed subset of the validation rows on the way,
all test rows at the end. Dense torch is the fastest here of three ways to compute the same loss. omikuji
(Parabel: Prabhu et al. 2018) is another kind of model, trained by its own defaults.

With --json the record keeps every contender trained so far: what is trained anew replaces its entry, the
others stay, so that records grow over several calls; --merge takes entries from other records. With
--resume, runs that the record has are not repeated, and each run's state is kept beside the record, from
where a killed run, or one with more --epochs at a constant rate, goes on.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import itertools
import json
import math
import os
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import (
    Worker,
    argument_parser,
    finish,
    machine,
    median,
    parse,
    print_table,
    reset_peak_memory,
    resident_gb,
    save_checkpoint,
)
from heads import CONTENDERS, Contender, DenseHead, make_head, parse_contender
from problems import PROBLEMS, Problem, SparseProblem, load_problem
from torch import nn

from slide_torch import load_sampler_state, metrics, sampler_state

TINY = Path(__file__).parents[1] / "examples" / "data"
RATES = (2e-3, 5e-3, 1e-2, 2e-2)
SCHEDULES = ("constant", "linear")
CHECKPOINT_SECONDS = 300
KEPT_OF_RUN = ("steps", "seconds", "step_ms", "curve", "peak_gb", "active")


def main() -> None:
    args = arguments()
    spec = problem_spec(args)
    setting = {"batch": args.batch, "seeds": args.seeds}
    about = in_process(describe, spec, args.threads)
    print(", ".join(f"{key} {value}" for key, value in about.items()), flush=True)
    record = {"problem": about, "contenders": []}
    for path in ([args.json] if args.json and args.json.exists() else []) + args.merge:
        add_record(record, path)
    contenders = [] if args.report else args.contender
    for contender in contenders:
        if contender.kind == "omikuji":
            if importlib.util.find_spec("omikuji") is None:
                print(f"{contender.name}: left out, the package omikuji is not installed")
                continue
            entry = new_entry(contender, args)
            if not (args.resume and finished(record, entry, 1)):
                run = in_process(train_omikuji, spec, args.threads, contender.options["trees"])
                add_entry(record, entry | {"runs": [run]})
                write(args.json, record)
            continue
        entry = prepare_entry(contender, spec, args, record)
        if args.resume:  # what was chosen is kept for the next call, however soon this one ends
            add_entry(record, entry)
            write(args.json, record)
        for seed in range(args.seed, args.seed + args.seeds):
            if any(run["seed"] == seed and not unfinished(run, entry) for run in entry["runs"]):
                continue
            run = in_process(
                train_seed,
                spec,
                args.threads,
                asdict(contender),
                entry,
                seed,
                kept_at(args, entry, seed),
            )
            others = [r for r in entry["runs"] if r["seed"] != seed]
            entry["runs"] = sorted([*others, run], key=lambda r: r["seed"])
            add_entry(record, entry)
            write(args.json, record)
    record["contenders"] = [entry for entry in record["contenders"] if entry["runs"]]
    if not record["contenders"]:
        raise SystemExit("nothing to report: no record, and no contender was trained")
    record["targets"] = targets(record)
    report(record)
    finish(args, setting, record, lambda axes: paint(axes, record), size=(8, 5))


def arguments() -> argparse.Namespace:
    quick = "the tiny files of examples/data, two epochs, short trials of two rates and no more"
    parser = argument_parser(__doc__, quick)
    add = parser.add_argument
    add("--problem", choices=PROBLEMS, default=None, help="places unless --xmc is given")
    add("--xmc", type=Path, nargs=2, metavar=("TRAIN", "TEST"), help="files of the XMC repository")
    add("--propensity", choices=metrics.PROPENSITY_CONSTANTS, help="constants of that data set")
    add("--classes", type=int, default=0, help="only the first so many classes; 0: all")
    add("--validation-rows", type=int, default=5_000)
    add("--data-dir", type=Path)
    names = ", ".join(CONTENDERS)
    add("--contender", action="append", help=f"{names}, or NAME=option:value,...; default: all")
    add("--epochs", type=float, default=1.0, help="length of a run")
    add("--seconds", type=float, help="a run has as many steps as fit in so many, at most --epochs")
    add("--batch", type=int, default=256)
    add("--seeds", type=int, default=1, help="runs of each contender, from --seed on")
    add("--lr", type=float, nargs="+", default=RATES, help="learning rates to choose from")
    add("--schedule", nargs="+", choices=SCHEDULES, default=SCHEDULES, help="to choose from")
    add("--tune", type=float, metavar="SECONDS", default=10.0, help="of one trial")
    add("--evaluations", type=int, default=25, help="of a run")
    add("--resume", action="store_true", help="keep states, go on from them")
    add("--merge", type=Path, nargs="+", default=[], help="records to take contenders from")
    add("--report", action="store_true", help="train nothing, show the record")
    args = parse(parser)
    positive = ("epochs", "batch", "seeds", "evaluations", "validation_rows", "tune", "seconds")
    for name in positive:
        if (value := getattr(args, name)) is not None and value <= 0:
            parser.error(f"--{name.replace('_', '-')}: expected a positive number, got {value}")
    if args.classes < 0 or min(args.lr) <= 0:
        parser.error("--classes must not be negative, --lr must be positive")
    if args.resume and args.json is None:
        parser.error("--resume: states are kept beside the record: give --json FILE")
    if args.quick and args.problem is None and args.xmc is None:
        args.xmc = [TINY / "tiny_train.txt", TINY / "tiny_test.txt"]
        args.epochs, args.batch, args.tune, args.evaluations = 2.0, 8, 0.05, 4
        args.lr = args.lr[:2]
    if args.xmc is not None and args.problem not in (None, "xmc"):
        parser.error(f"--xmc: expected no other --problem, got {args.problem}")
    args.problem = "xmc" if args.xmc is not None else args.problem or "places"
    if args.problem == "xmc" and args.xmc is None:
        parser.error("--problem xmc: give its files: --xmc TRAIN TEST")
    for path in [*(args.xmc or []), *args.merge]:
        if not path.exists():
            parser.error(f"{path}: expected a file, got none")
    try:
        args.contender = [parse_contender(text) for text in args.contender or CONTENDERS]
    except ValueError as error:
        parser.error(str(error))
    return args


def problem_spec(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of load_problem, for every process."""
    return {
        "name": args.problem,
        "files": args.xmc and tuple(args.xmc),
        "propensity": args.propensity,
        "data_dir": args.data_dir,
        "classes": args.classes,
        "validation_rows": args.validation_rows,
    }


def in_process(function, spec: dict[str, Any], threads: int, *arguments: Any) -> Any:
    """``function(problem, *arguments)`` in a process of its own, whose memory is its own."""
    worker = Worker(_target, function, spec, threads)
    try:
        return worker.run(*arguments)
    finally:
        worker.stop()


def _target(function, spec: dict[str, Any], threads: int):
    torch.set_num_threads(threads)
    problem = load_problem(**spec)
    return lambda *arguments: function(problem, *arguments)


def describe(problem: Problem) -> dict[str, Any]:
    return problem.description()


# --- training ---------------------------------------------------------------------------------------


class Training:
    """One contender's model, optimizers and batches, and what it has recorded."""

    def __init__(
        self, problem: Problem, contender: Contender, settings: dict[str, Any], seed: int
    ) -> None:
        self.problem, self.settings, self.seed = problem, settings, seed
        torch.manual_seed(seed)
        self.body = problem.body()
        linear = nn.Linear(problem.hidden, problem.num_labels)
        self.head = make_head(contender, linear, settings.get("variant"))
        self.optimizers = self.head.optimizers(self.body, settings["lr"])
        self.steps, self.seconds, self.peak_gb = 0, 0.0, 0.0
        self.step_ms: list[float] = []
        self.active: list[tuple[float, float]] = []
        self.curve: list[dict[str, float]] = []
        self.loss = math.nan

    def batches(self) -> Iterable[tuple[tuple[torch.Tensor, ...], torch.Tensor]]:
        """From where the training stands, without end."""
        epoch_steps = -(-self.problem.train_rows // self.settings["batch"])
        while True:
            epoch, skip = divmod(self.steps, epoch_steps)
            seed = 1_000 * self.seed + epoch
            yield from self.problem.batches(self.settings["batch"], seed=seed, skip=skip)

    def step(self, features: tuple[torch.Tensor, ...], labels: torch.Tensor) -> None:
        """One training step, timed."""
        left = 1.0
        if self.settings["schedule"] == "linear":
            left = 1 - self.steps / self.settings["steps"]
        started = time.perf_counter()
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.settings["lr"] * left
            optimizer.zero_grad()
        loss = self.head.loss(self.body(*features), labels)
        loss.backward()
        for optimizer in self.optimizers:
            optimizer.step()
        self.step_ms.append((time.perf_counter() - started) * 1e3)
        self.seconds += self.step_ms[-1] / 1e3
        self.steps += 1
        if self.steps % 20 == 1:
            self.active.append(self.head.classes())
            self.loss = loss.item()
            if not math.isfinite(self.loss):
                raise FloatingPointError(f"the loss is {self.loss} at step {self.steps}")

    def evaluate(self, part: str) -> dict[str, float]:
        weight, bias = self.head.linear.weight.detach(), self.head.linear.bias.detach()
        self.body.eval()
        with torch.no_grad():
            answer = self.problem.evaluate(self.body, weight, bias, part)
        self.body.train()
        return answer

    def state(self) -> dict[str, Any]:
        """All that the rest of the training depends on."""
        return {
            "run": {name: getattr(self, name) for name in KEPT_OF_RUN},
            "body": self.body.state_dict(),
            "head": self.head.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "sampler": sampler_state(self.head),
            "rng": torch.get_rng_state(),
        }

    def load(self, path: Path) -> None:
        state = torch.load(path, weights_only=True)
        self.body.load_state_dict(state["body"])
        self.head.load_state_dict(state["head"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        load_sampler_state(self.head, state["sampler"])
        torch.set_rng_state(state["rng"])
        for name, value in state["run"].items():
            setattr(self, name, value)


def train_seed(
    problem: Problem, contender: dict, entry: dict, seed: int, checkpoint: Path | None
) -> dict[str, Any]:
    """A whole run; goes on from ``checkpoint`` where that exists, and keeps its state there."""
    base = reset_peak_memory()
    settings = entry["settings"]
    training = Training(problem, Contender(**contender), settings, seed)
    name, steps = f"{entry['contender']}, seed {seed}", settings["steps"]
    if checkpoint is not None and checkpoint.exists():
        training.load(checkpoint)
        print(f"{checkpoint}: {name} goes on after {training.steps:,} steps", flush=True)
    count = entry["evaluations"]
    points = {
        math.ceil(steps * (i / count) ** 1.5) for i in range(1, count + 1)
    }  # early ones close
    saved_at = time.monotonic()
    for features, labels in training.batches():
        if training.steps >= steps:
            break
        training.step(features, labels)
        if training.steps in points:
            training.peak_gb = max(training.peak_gb, resident_gb("VmHWM") - base)
            found = training.evaluate("validation")
            at = {"step": training.steps, "seconds": training.seconds}
            training.curve.append(at | found)
            measured = ", ".join(f"{key} {value:.4f}" for key, value in found.items())
            print(
                f"{name}: step {training.steps:,} of {steps:,}, {training.seconds:.1f} s, "
                f"{median(training.step_ms[-200:]):.1f} ms/step, loss {training.loss:.3f}, {measured}",
                flush=True,
            )
            reset_peak_memory()
        late = time.monotonic() - saved_at > CHECKPOINT_SECONDS
        if checkpoint is not None and (late or training.steps == steps):
            save_checkpoint(checkpoint, training.state())
            saved_at = time.monotonic()
    union, active = np.mean(training.active, axis=0)
    return {
        "seed": seed,
        "steps": training.steps,
        "seconds": training.seconds,
        "ms_step": training.seconds * 1e3 / max(1, training.steps),
        "ms_step_median": median(training.step_ms),
        "classes_a_step": union,
        "classes_a_sample": active,
        "peak_gb": training.peak_gb,
        "curve": training.curve,
        "test": training.evaluate("test"),
    }


def time_variants(
    problem: Problem, contender: dict, batch: int, variants: list[str | None]
) -> dict[str | None, float]:
    """Milliseconds a step of each variant, on the first batches: medians of few steps, upkeep not met."""
    dense = contender["kind"] == "dense"
    warm, counted = (1, 3) if dense else (5, 20)
    found = {}
    for variant in variants:
        settings = {"lr": 1e-3, "schedule": "constant", "batch": batch, "variant": variant}
        training = Training(problem, Contender(**contender), settings, 0)
        for features, labels in training.batches():
            training.step(features, labels)
            if training.steps == warm + counted:
                break
        found[variant] = median(training.step_ms[warm:])
        del training
    return found


def try_settings(
    problem: Problem, contender: dict, settings: dict[str, Any], seed: int
) -> float | None:
    """The validation measure after a short training; None if it diverged."""
    training = Training(problem, Contender(**contender), settings, seed)
    try:
        for features, labels in training.batches():
            training.step(features, labels)
            if training.steps >= settings["steps"]:
                break
    except (FloatingPointError, ValueError) as error:  # LSHLinear refuses rows with NaN or Inf
        if isinstance(error, ValueError) and "NaN or Inf" not in str(error):
            raise
        return None
    return training.evaluate("validation")[problem.metric]


def prepare_entry(
    contender: Contender, spec: dict, args: argparse.Namespace, record: dict
) -> dict[str, Any]:
    """The contender's entry: settings chosen, or with --resume those of the record with its runs."""
    about = record["problem"]
    entry = new_entry(contender, args) | {"evaluations": args.evaluations}
    old = next((e for e in record["contenders"] if e["contender"] == contender.name), None)
    epoch_steps = -(-about["train_rows"] // args.batch)
    steps = max(1, math.ceil(args.epochs * epoch_steps))
    if args.resume and old is not None:
        check_same(old, entry, ("kind", "options", "evaluations"))
        settings = old["settings"]
        if settings["batch"] != args.batch:
            raise SystemExit(f"{contender.name}: the record's batch is {settings['batch']}")
        if args.seconds is None and steps != settings["steps"]:
            if settings["schedule"] != "constant" or steps < settings["steps"]:
                raise SystemExit(
                    f"{contender.name}: --resume: expected {settings['steps']:,} steps as in the record "
                    f"({settings['schedule']} rate), got {steps:,}: only runs at a constant rate go on"
                )
            settings["steps"] = steps
        return old
    dense = contender.kind == "dense"
    variants: list[str | None] = list(DenseHead.VARIANTS) if dense else [None]
    if args.quick and dense:
        variants.remove("compile")
    ms = in_process(time_variants, spec, args.threads, asdict(contender), args.batch, variants)
    variant = min(ms, key=ms.__getitem__)
    if dense:
        entry["variants_ms"] = ms
        shown = ", ".join(f"{name} {value:.1f}" for name, value in ms.items())
        print(f"{contender.name}: ms/step: {shown}; {variant} it is", flush=True)
    if args.seconds is not None:
        steps = max(1, min(steps, int(args.seconds * 1e3 / ms[variant])))
    settings = {"batch": args.batch, "steps": steps, "variant": variant}
    trial_steps = max(10, min(steps, int(args.tune * 1e3 / ms[variant])))
    entry["tuning"] = {"steps": trial_steps, "trials": []}
    lr, schedule = tune(contender, spec, args, about, settings | {"steps": trial_steps}, entry)
    entry["settings"] = settings | {"lr": lr, "schedule": schedule}
    print(f"{contender.name}: {entry['settings']}", flush=True)
    return entry | {"runs": []}


def tune(
    contender: Contender,
    spec: dict,
    args: argparse.Namespace,
    about: dict,
    settings: dict[str, Any],
    entry: dict,
) -> tuple[float, str]:
    """The best learning rate and schedule on validation rows; where the best is the first or last of the
    rates, more are tried on that side (not with --quick)."""
    if len(args.lr) == len(args.schedule) == 1:
        return args.lr[0], args.schedule[0]
    trials = entry["tuning"]["trials"]
    sign = 1 if about["larger_is_better"] else -1
    worker = Worker(_target, try_settings, spec, args.threads)

    def score(lr: float, schedule: str) -> float:
        answer = worker.run(
            asdict(contender), settings | {"lr": lr, "schedule": schedule}, args.seed
        )
        trials.append({"lr": lr, "schedule": schedule, about["metric"]: answer})
        shown = "diverged" if answer is None else f"{answer:.4f}"
        print(
            f"{contender.name}: trial of {settings['steps']:,} steps, lr {lr:g}, {schedule}: {shown}",
            flush=True,
        )
        return -math.inf if answer is None else sign * answer

    found = {}
    for schedule in args.schedule:
        own = {lr: score(lr, schedule) for lr in sorted(args.lr)}
        while not args.quick and len(args.lr) > 1 and min(own) > 1e-5 and max(own) < 1:
            best = max(own, key=own.__getitem__)
            if list(own.values()).count(own[best]) > 1:
                break
            if best == max(own):
                own[beyond(best, 1)] = score(beyond(best, 1), schedule)
            elif best == min(own):
                own[beyond(best, -1)] = score(beyond(best, -1), schedule)
            else:
                break
        found |= {(lr, schedule): value for lr, value in own.items()}
    worker.stop()
    best = max(found, key=found.__getitem__)
    if found[best] == -math.inf:
        raise SystemExit(f"{contender.name}: every trial diverged: give smaller --lr")
    return best


def beyond(lr: float, side: int) -> float:
    """The next of 1, 2, 5, 10, ... times a power of ten, above (1) or below (-1)."""
    grid = [digit * 10.0**power for power in range(-7, 3) for digit in (1, 2, 5)]
    others = [float(f"{x:.0e}") for x in grid if (x - lr) * side > 1e-3 * lr]
    return min(others) if side > 0 else max(others)


def train_omikuji(problem: Problem, trees: int) -> dict[str, Any]:
    """omikuji by its defaults, through a file of the training rows; its reading of that file counts."""
    import omikuji

    if not isinstance(problem, SparseProblem):
        raise SystemExit("omikuji: expected a problem of sparse rows")
    threads = torch.get_num_threads()
    hyper = omikuji.Model.default_hyper_param()
    hyper.n_trees = trees
    base = reset_peak_memory()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "train.txt"
        write_xmc(path, problem)
        started = time.perf_counter()
        model = omikuji.Model.train_on_data(str(path), hyper, threads)
        seconds = time.perf_counter() - started
    model.init_prediction_thread_pool(threads)
    peak = resident_gb("VmHWM") - base
    measured, predict_seconds = {}, 0.0
    for part in ("validation", "test"):
        rows, predicted = problem.parts[part], []
        started = time.perf_counter()
        starts = rows.feature_indptr.tolist()
        for start, end in itertools.pairwise(starts):
            pairs = zip(
                rows.feature_indices[start:end].tolist(),
                rows.feature_values[start:end].tolist(),
                strict=True,
            )
            found = [label for label, _ in model.predict(pairs, beam_size=10, top_k=5)]
            predicted.append(found + [-1] * (5 - len(found)))
        predict_seconds = time.perf_counter() - started
        measured[part] = problem.score(torch.tensor(predicted), part)
    point = {"step": 1, "seconds": seconds, **measured["validation"]}
    print(f"omikuji, {trees} trees: {point}", flush=True)
    return {
        "seed": None,  # it takes none
        "seconds": seconds,
        "predict_ms_row": predict_seconds * 1e3 / len(problem.parts["test"]),
        "peak_gb": peak,
        "curve": [point],
        "test": measured["test"],
    }


def write_xmc(path: Path, problem: SparseProblem) -> None:
    """The training rows in the format of the Extreme Classification Repository, but for those without
    features or labels, which omikuji does not read."""
    rows = problem.parts["train"]
    rows = rows.select(
        np.flatnonzero((np.diff(rows.feature_indptr) > 0) & (np.diff(rows.label_indptr) > 0))
    )
    features, labels = rows.feature_indptr.tolist(), rows.label_indptr.tolist()
    with open(path, "w") as file:
        file.write(f"{len(rows)} {problem.num_features} {problem.num_labels}\n")
        for row in range(len(rows)):
            own = slice(features[row], features[row + 1])
            names = rows.label_indices[labels[row] : labels[row + 1]].tolist()
            pairs = zip(
                rows.feature_indices[own].tolist(), rows.feature_values[own].tolist(), strict=True
            )
            text = " ".join(f"{index}:{value:.6g}" for index, value in pairs)
            file.write(f"{','.join(map(str, names))} {text}\n")


# --- records ----------------------------------------------------------------------------------------


def new_entry(contender: Contender, args: argparse.Namespace) -> dict[str, Any]:
    return {
        "contender": contender.name,
        "kind": contender.kind,
        "options": contender.options,
        "reference": contender.reference,
        "machine": machine() | {"threads": args.threads, "seed": args.seed},
    }


def check_same(old: dict, new: dict, keys: Iterable[str]) -> None:
    for key in keys:
        if old.get(key) != new.get(key):
            raise SystemExit(
                f"{new['contender']}: --resume: expected {key} {old.get(key)!r} as in the record, got "
                f"{new.get(key)!r}: name the contender anew, or leave out --resume"
            )


def finished(record: dict, entry: dict, runs: int) -> bool:
    return any(
        e["contender"] == entry["contender"] and len(e["runs"]) >= runs
        for e in record["contenders"]
    )


def unfinished(run: dict, entry: dict) -> bool:
    return run["steps"] < entry["settings"]["steps"]


def kept_at(args: argparse.Namespace, entry: dict, seed: int) -> Path | None:
    """Where the run's state is kept: a name that changes with all that it must not be resumed with."""
    if not args.resume:
        return None
    settings = dict(entry["settings"])
    if settings["schedule"] == "constant":
        settings.pop("steps")
    same = json.dumps([entry["options"], settings, args.classes], sort_keys=True)
    key = hashlib.sha256(same.encode()).hexdigest()[:8]
    return args.json.with_name(f"{args.json.stem}-{entry['contender']}-{seed}-{key}.pt")


def add_record(record: dict, path: Path) -> None:
    """Takes the entries of another record of the same problem."""
    other = json.loads(path.read_text())
    for key, value in record["problem"].items():
        if other["problem"].get(key) != value:
            raise SystemExit(
                f"{path}: problem {key}: expected {value!r}, got {other['problem'].get(key)!r}: "
                "only records of the same problem go together"
            )
    for entry in other["contenders"]:
        add_entry(record, entry)


def add_entry(record: dict, entry: dict) -> None:
    """Adds the entry in place of any of the same name; the table has CONTENDERS' order, then others."""
    entries = [e for e in record["contenders"] if e["contender"] != entry["contender"]] + [entry]
    order = {name: place for place, name in enumerate(CONTENDERS)}
    record["contenders"] = sorted(entries, key=lambda e: order.get(e["contender"], len(order)))


def write(path: Path | None, record: dict) -> None:
    """Keeps what is known so far; main's end adds the rest."""
    if path is not None:
        part = path.with_name(path.name + ".part")
        part.write_text(json.dumps({"machine": machine(), **record}, indent=1) + "\n")
        os.replace(part, path)


def best_of(entry: dict, problem: dict) -> float:
    """The best validation measure of each run's curve; their mean."""
    pick = max if problem["larger_is_better"] else min
    return float(
        np.mean([pick(p[problem["metric"]] for p in run["curve"]) for run in entry["runs"]])
    )


def targets(record: dict) -> list[dict[str, Any]]:
    """Accuracies worth timing: dense torch's best, and the best of the sampled rivals and omikuji, on
    validation rows; for each contender the median seconds of its runs to the first evaluation that shows
    so much, None if fewer than half the runs get there."""
    problem, entries = record["problem"], record["contenders"]
    groups = {
        "dense's best": [e for e in entries if e["kind"] == "dense"],
        "rivals' best": [
            e for e in entries if e["kind"] in ("sampled", "omikuji") and not e["reference"]
        ],
    }
    pick = max if problem["larger_is_better"] else min
    found = []
    for name, group in groups.items():
        if group:
            value = pick(best_of(entry, problem) for entry in group)
            seconds = {e["contender"]: seconds_to(e, value, problem) for e in entries}
            found.append({"target": name, problem["metric"]: value, "seconds": seconds})
    return found


def seconds_to(entry: dict, value: float, problem: dict) -> float | None:
    sign = 1 if problem["larger_is_better"] else -1
    times = []
    for run in entry["runs"]:
        reached = [p["seconds"] for p in run["curve"] if sign * (p[problem["metric"]] - value) >= 0]
        times.append(min(reached, default=math.inf))
    middle = median(times)
    return middle if math.isfinite(middle) else None


def table(record: dict) -> tuple[list[str], list[list[str]]]:
    """The record as columns and lines of text."""
    problem, goals = record["problem"], record["targets"]
    measures = list(record["contenders"][0]["runs"][0]["test"])
    columns = ["contender", *measures, "ms/step", "classes a step", "seconds", "peak GB"]
    columns += [f"s to {g['target']}, {g[problem['metric']]:.4f}" for g in goals]
    columns += ["learning rate"]
    lines = []
    for entry in record["contenders"]:
        runs = entry["runs"]

        def mean(key: str, form: str, runs=runs) -> str:
            return format(np.mean([run[key] for run in runs]), form) if key in runs[0] else ""

        line = [entry["contender"]]
        for measure in measures:
            values = [run["test"][measure] for run in runs]
            spread = f" ± {(max(values) - min(values)) / 2:.4f}" if len(values) > 1 else ""
            line.append(f"{np.mean(values):.4f}{spread}")
        line += [mean("ms_step", ".1f"), mean("classes_a_step", ",.0f")]
        line += [mean("seconds", ",.0f"), mean("peak_gb", ".1f")]
        for goal in goals:
            seconds = goal["seconds"].get(entry["contender"])
            line.append("not reached" if seconds is None else f"{seconds:,.1f}")
        settings = entry.get("settings")
        line.append(f"{settings['lr']:g}, {settings['schedule']}" if settings else "")
        lines.append(line)
    return columns, lines


def report(record: dict) -> None:
    print()
    print_table(*table(record))


def paint(axes: Any, record: dict) -> None:
    metric = record["problem"]["metric"]
    for number, entry in enumerate(record["contenders"]):
        for index, run in enumerate(entry["runs"]):
            seconds, values = ([p[key] for p in run["curve"]] for key in ("seconds", metric))
            axes.plot(
                seconds,
                values,
                color=f"C{number % 10}",
                linestyle=":" if entry["reference"] else "-",
                marker="*" if len(values) == 1 else ".",
                markersize=9 if len(values) == 1 else 3,
                linewidth=1,
                label=entry["contender"] if index == 0 else None,
            )
    axes.set_xscale("log")
    axes.set_xlabel("seconds of training, logarithmic")
    axes.set_ylabel(f"{metric}, validation rows")
    axes.set_title(f"{record['problem']['name']}, {record['problem']['num_labels']:,} classes")
    axes.legend(fontsize=8)


if __name__ == "__main__":
    main()
