"""The options that the examples of a contest have in common."""

from __future__ import annotations

import argparse
import ast
from pathlib import Path
from typing import Any

import torch

from slide_torch import LSHOptions

from .contest import CLOCKS
from .output import check_outputs

__all__ = ["contest_parser", "parse"]


def contest_parser(
    doc: str | None, *, steps: int, batch: int, lr: float, lsh: dict[str, Any], plot: str
) -> argparse.ArgumentParser:
    """The options that these examples have in common, with an example's own defaults."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--head", choices=("lsh", "dense", "both"), default="both")
    parser.add_argument("--steps", type=int, default=steps, help="most steps of the LSH model")
    parser.add_argument("--seconds", type=float, help="most seconds of the LSH model's training")
    parser.add_argument(
        "--dense-seconds", type=float, default=60.0, help="of the dense model's training"
    )
    parser.add_argument(
        "--equal",
        choices=("steps", "time", "none"),
        default="none",
        help="the dense model gets the steps, or the seconds, that the LSH model took; none: "
        "--dense-seconds",
    )
    parser.add_argument(
        "--clock",
        choices=tuple(CLOCKS),
        default="wall",
        help="what seconds are: cpu counts this process's own, on a machine shared with other work",
    )
    parser.add_argument("--batch", type=int, default=batch)
    parser.add_argument(
        "--lr",
        type=float,
        nargs="+",
        default=[lr],
        help="several: each is a whole run, of which the best on validation data counts",
    )
    parser.add_argument(
        "--dense-lr", type=float, nargs="+", help="of the dense model, in place of --lr"
    )
    parser.add_argument(
        "--lsh",
        nargs="*",
        default=[f"{name}={value}" for name, value in lsh.items()],
        metavar="NAME=VALUE",
        help="LSHOptions, in place of " + (" ".join(f"{n}={v}" for n, v in lsh.items()) or "none"),
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", type=Path, metavar="FILE", help="where the LSH model is kept")
    parser.add_argument(
        "--checkpoint",
        type=Path,
        metavar="FILE",
        help="keep the training's state here, one file a model; where it exists, go on from it",
    )
    parser.add_argument("--checkpoint-every", type=int, default=500, metavar="STEPS")
    parser.add_argument("--json", type=Path, help="where the table goes, too")
    parser.add_argument("--plot", type=Path, default=Path(plot))
    return parser


def parse(parser: argparse.ArgumentParser, *positive: str) -> argparse.Namespace:
    """Parsed and checked arguments, ``args.lsh`` as LSHOptions; ``positive``: an example's own counts."""
    args = parser.parse_args()
    for name in ("steps", "batch", "threads", "checkpoint_every", *positive):
        if getattr(args, name) < 1:
            parser.error(
                f"--{name.replace('_', '-')}: expected at least 1, got {getattr(args, name)}"
            )
    for name in ("lr", "dense_lr", "dense_seconds", "seconds"):
        value = getattr(args, name)
        for number in value if isinstance(value, list) else [value]:
            if number is not None and not number > 0:
                parser.error(f"--{name.replace('_', '-')}: expected more than 0, got {number}")
    if args.head == "dense" and args.equal == "time" and args.seconds is None:
        parser.error(
            "--equal time --head dense: expected --seconds, as no LSH model gives the time"
        )
    try:
        args.lsh = LSHOptions(**dict(_option(text) for text in args.lsh))
    except (TypeError, ValueError) as error:
        parser.error(f"--lsh: {error}")
    check_outputs(parser, args.save, args.checkpoint, args.json, args.plot)
    torch.set_num_threads(args.threads)
    return args


def _option(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"expected NAME=VALUE, as in tail=1024, got {text!r}")
    try:
        return name, ast.literal_eval(value)
    except (SyntaxError, ValueError):
        return name, value
