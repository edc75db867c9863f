"""Seeded cases for as long as there is time: SLIDE_TORCH_FUZZ_SECONDS (8) a test, from the seed
SLIDE_TORCH_FUZZ_SEED (0) on."""

import itertools
import random
import time

import pytest
import torch
from helpers import FUZZ_SECONDS, FUZZ_SEED

LEAST_CASES = 25


@pytest.fixture
def fuzz():
    """Calls a check with a ``random.Random`` for each seed, by which torch and the case itself draw too; at
    least LEAST_CASES times, however slow the machine."""

    def run(check):
        end = time.monotonic() + FUZZ_SECONDS
        for case, seed in enumerate(itertools.count(FUZZ_SEED), 1):
            torch.manual_seed(seed)
            try:
                check(random.Random(seed))
            except Exception as error:
                again = f"SLIDE_TORCH_FUZZ_SEED={seed} begins with it"
                raise AssertionError(f"case {seed} ({again}): {error}") from error
            if case >= LEAST_CASES and time.monotonic() > end:
                break

    return run
