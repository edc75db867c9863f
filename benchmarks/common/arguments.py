"""The options that every benchmark has."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from examples.common.output import check_outputs

__all__ = ["argument_parser", "parse"]


def argument_parser(description: str | None, quick: str) -> argparse.ArgumentParser:
    """The options that every benchmark has; ``quick`` says what --quick does."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--json", type=Path, help="where the record goes; the picture, beside it")
    return parser


def parse(parser: argparse.ArgumentParser, argv: list[str] | None = None) -> argparse.Namespace:
    """Parsed arguments; threads and seed are set."""
    args = parser.parse_args(argv)
    if args.threads < 1:
        parser.error(f"--threads: expected at least 1, got {args.threads}")
    check_outputs(parser, args.json)
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    return args
