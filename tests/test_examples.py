"""The examples as commands, on tiny input."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "examples"
TINY = [str(EXAMPLES / "data" / "tiny_train.txt"), str(EXAMPLES / "data" / "tiny_test.txt")]


def run(script, *arguments):
    command = [sys.executable, str(EXAMPLES / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_xmc_trains_both_heads_and_saves(tmp_path):
    model = tmp_path / "model.pt"
    answer = run(
        *("xmc.py", *TINY, "--epochs", 30, "--batch", 8, "--hidden", 16, "--lr", 0.05),
        *("--dense-seconds", 0.2, "--propensity", "Amazon-670K", "--threads", 1),
        *("--save", model, "--plot", tmp_path / "plot.png"),
    )
    assert answer.returncode == 0, answer.stderr
    rows = [line.split("|")[1:-1] for line in answer.stdout.splitlines() if line.startswith("|")]
    header, _, lsh, dense = [[cell.strip() for cell in row] for row in rows]
    assert header[:10] == ["head", *(f"{m}@{k}" for m in ("P", "nDCG", "PSP") for k in (1, 3, 5))]
    assert lsh[0] == "LSHLinear" and dense[0] == "dense torch"
    assert float(lsh[1]) > 0.5  # the tiny problem is learnt; guessing gives about 0.15
    state = torch.load(model, weights_only=True)["model"]
    assert state["head.weight"].shape == (12, 16)


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["missing.txt", TINY[1]], "missing.txt"),
        ([*TINY, "--batch", 0], "must be at least 1"),
        ([*TINY, "--propensity", "Nobody"], "expected one of"),
        ([*TINY, "--save", "no/such/folder/m.pt"], "expected an existing folder"),
    ],
)
def test_xmc_refuses(arguments, message):
    answer = run("xmc.py", *arguments)
    assert answer.returncode != 0 and message in answer.stderr
    assert "Traceback" not in answer.stderr


def test_quickstart_refuses_before_any_work(tmp_path):
    assert "--ask" in run("quickstart.py", "--help").stdout
    answer = run("quickstart.py", "--save", tmp_path / "none" / "m.pt")
    assert answer.returncode == 2 and "expected an existing folder" in answer.stderr
    answer = run("quickstart.py", "--save", tmp_path / "m.pt", "--ask", "Paris", "FR")
    assert answer.returncode != 0 and "needs a trained model" in answer.stderr
