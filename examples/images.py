"""Reads a number off an image, one of 100,000 classes: convolutions with an LSH head beside a dense one.

    python examples/images.py                            # dense makes as many steps as LSHLinear
    python examples/images.py --digits 6                 # a million classes
    python examples/images.py --checkpoint run.pt        # killed? the same command goes on

An image is five handwritten digits side by side, of scikit-learn's 1,797 (8x8, from the UCI repository's
"Optical Recognition of Handwritten Digits", CC BY 4.0); its class is the number they make. Digits are
real, their arrangement is not. Numbers of validation and test are composed of digit images that training
never shows.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.contest import LSH, compete
from common.contest_options import contest_parser, parse
from common.contest_output import show
from common.run import Run
from slide_torch.metrics import recall_at_k

VALIDATION_IMAGES, BLOCK = 1_000, 256


def load_digits(
    seed: int,
) -> tuple[list[list[np.ndarray]], list[list[np.ndarray]], list[list[np.ndarray]]]:
    """Images of training, validation and test: each a list with, for each digit, its images (8, 8) float32,
    70, 10 and 20 of a hundred.

    Raises:
        ModuleNotFoundError: scikit-learn is missing.
    """
    try:
        from sklearn import datasets
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "load_digits: the images come from the package scikit-learn, which is not installed; "
            'run: pip install --no-build-isolation ".[examples]"'
        ) from None
    digits = datasets.load_digits()
    images = digits.images.astype(np.float32) / 16
    parts: tuple[list, list, list] = ([], [], [])
    draw = np.random.default_rng(seed)
    for digit in range(10):
        own = draw.permutation(images[digits.target == digit])
        cuts = [int(0.7 * len(own)), int(0.8 * len(own))]
        for part, some in zip(parts, np.split(own, cuts), strict=True):
            part.append(list(some))
    return parts


class Reader(nn.Module):
    """Convolutions over the strip of digits -> one vector -> one logit a number."""

    def __init__(self, make_head: Callable[[int, int], nn.Module], digits: int, width: int) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
        )
        self.narrow = nn.Linear(32 * 2 * 2 * digits, width)
        self.head: Any = make_head(width, 10**digits)

    def hidden(self, images: Tensor) -> Tensor:
        """(B, 1, 8, 8 digits) -> (B, width), each of length sqrt(width)."""
        return F.layer_norm(self.narrow(self.convolutions(images)), (self.narrow.out_features,))

    def forward(self, images: Tensor) -> Any:
        return self.head(self.hidden(images))


class ReadNumber:
    """Numbers drawn evenly, each digit written by an image drawn from its part of the data."""

    columns = ["accuracy", "in top 5"]  # noqa: RUF012
    measure = "accuracy on validation images"
    larger_is_better = True

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.rows = args, args.batch
        self.train, self.validation, self.tests = load_digits(args.seed)
        self.title = f"images -> {10**args.digits:,} numbers"
        self.settings = {"digits": args.digits, "width": args.width}

    def compose(
        self, part: list[list[np.ndarray]], count: int, *seed: int
    ) -> tuple[Tensor, Tensor]:
        """``count`` images (n, 1, 8, 8 digits) and the numbers on them (n)."""
        draw = np.random.default_rng([self.args.seed, *seed])
        digits = draw.integers(0, 10, (count, self.args.digits))
        which = draw.random(digits.shape)
        written = [
            np.concatenate(
                [part[d][int(w * len(part[d]))] for d, w in zip(row, chance, strict=True)], axis=1
            )
            for row, chance in zip(digits.tolist(), which.tolist(), strict=True)
        ]
        numbers = digits @ 10 ** np.arange(self.args.digits)[::-1]
        return torch.from_numpy(np.stack(written)).unsqueeze(1), torch.from_numpy(numbers)

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        return self.compose(self.train, self.rows, 0, step)

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, numbers = batch
        return F.cross_entropy(model(images), numbers)

    @torch.no_grad()
    def shares(self, model: nn.Module, images: Tensor, numbers: Tensor, *ks: int) -> list[float]:
        """Of images whose number is among the k best of all classes; exact, in blocks of images."""
        best = torch.cat([model(some).topk(max(ks), dim=1).indices for some in images.split(BLOCK)])
        return [recall_at_k(best, numbers.unsqueeze(1), k) for k in ks]

    def validate(self, model: nn.Module) -> float:
        return self.shares(model, *self.compose(self.validation, VALIDATION_IMAGES, 1), 1)[0]

    def test(self, model: nn.Module, run: Run) -> list[str]:
        images = self.compose(self.tests, self.args.test_images, 2)
        return [f"{share:.4f}" for share in self.shares(model, *images, 1, 5)]


def arguments() -> argparse.Namespace:
    parser = contest_parser(__doc__, steps=2000, batch=256, lr=5e-3, lsh={}, plot="images.png")
    parser.set_defaults(equal="steps")
    parser.add_argument("--digits", type=int, default=5, help="of a number: 10^digits classes")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--test-images", type=int, default=5_000)
    args = parse(parser, "digits", "width", "test_images")
    if args.digits > 8:
        parser.error(f"--digits: expected at most 8, got {args.digits}")
    return args


def main() -> None:
    args = arguments()
    try:
        task = ReadNumber(args)
    except ModuleNotFoundError as error:
        raise SystemExit(str(error)) from None
    results = compete(
        args,
        task,
        lambda make_head: Reader(make_head, args.digits, args.width),
        {LSH: args.lsh},
    )
    note = (
        f"{10**args.digits:,} numbers; {args.test_images:,} test images, of digit images held out"
    )
    show(args, task, results, note)


if __name__ == "__main__":
    main()
