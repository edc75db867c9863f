"""The examples as commands, on tiny input."""

import os
import signal
import subprocess
import sys
import time
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


# --- runs that are stopped --------------------------------------------------------------------------

LONG = ("--epochs", 10, "--batch", 2, "--hidden", 16, "--lr", 0.05, "--threads", 1)

# the quickstart's own program on the tiny rows, without its download and its 234,908 places
TINY_QUICKSTART = f"""
import sys, types
sys.path.insert(0, {str(EXAMPLES)!r})
import places, quickstart
from slide_torch.data import read_xmc
train, test = read_xmc({TINY[0]!r}), read_xmc({TINY[1]!r}, num_features=30, num_labels=12)
places.load_places = lambda *_: types.SimpleNamespace(
    train=train, validation=test, test=test, num_features=train.num_features,
    num_labels=train.num_labels)
quickstart.main()
"""


def start(command, *arguments):
    return subprocess.Popen(
        [sys.executable, *map(str, (*command, *arguments))],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(path, process):
    for _ in range(60_000):
        if path.exists():
            return
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.001)
    raise AssertionError(f"{path} has not come")


def test_a_killed_run_goes_on_bit_for_bit(tmp_path):
    """SIGKILL at any moment, writing of the checkpoint included, and often: the result is the same."""
    xmc = (EXAMPLES / "xmc.py", *TINY, *LONG, "--plot", tmp_path / "plot.png")
    whole = start(xmc, "--save", tmp_path / "whole.pt")
    checkpoint = tmp_path / "run.pt"
    xmc = (
        *xmc,
        "--checkpoint",
        checkpoint,
        "--checkpoint-every",
        7,
        "--save",
        tmp_path / "parts.pt",
    )
    steps = [0]
    for pause in (0.0, 0.02, 0.05):
        process = start(xmc)
        old = checkpoint.stat().st_mtime_ns if checkpoint.exists() else None
        wait_for(checkpoint, process)
        while process.poll() is None and checkpoint.stat().st_mtime_ns == old:
            time.sleep(0.001)
        time.sleep(pause)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        steps.append(torch.load(checkpoint, weights_only=True)["run"]["steps"])
    assert steps == sorted(set(steps)) and steps[-1] < 10 * 30 and steps[-1] % 7 == 0
    last = start(xmc)
    stdout, stderr = last.communicate()
    assert last.returncode == 0, stderr
    assert f"going on after {steps[-1]:,} steps" in stdout
    _, stderr = whole.communicate()
    assert whole.returncode == 0, stderr
    one, other = (
        torch.load(tmp_path / f"{n}.pt", weights_only=True)["model"] for n in ("whole", "parts")
    )
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    # the finished run's checkpoint: nothing is left to train, and other settings do not fit
    again = run(xmc[0].name, *xmc[1:])
    assert again.returncode == 0 and "going on after 300 steps" in again.stdout
    other = run(xmc[0].name, *xmc[1:], "--lr", 0.01)
    assert other.returncode != 0 and "lr: expected 0.01" in other.stderr


def test_a_write_that_breaks_off_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import classifier

    path = tmp_path / "run.pt"
    classifier.save_checkpoint(path, {"steps": 1})

    def broken(content, file):
        file.write(b"half of it")
        raise OSError("no space left")

    monkeypatch.setattr(torch, "save", broken)
    with pytest.raises(OSError, match="no space"):
        classifier.save_checkpoint(path, {"steps": 2})
    assert torch.load(path, weights_only=True) == {"steps": 1}
    assert os.listdir(tmp_path) == ["run.pt"]


@pytest.mark.parametrize("script", ["xmc", "quickstart"])
def test_ctrl_c_ends_the_training_and_prints_the_table(script, tmp_path):
    command = (EXAMPLES / "xmc.py", *TINY) if script == "xmc" else ("-c", TINY_QUICKSTART)
    checkpoint = tmp_path / "run.pt"
    many = ("--epochs", 100_000, "--batch", 2, "--lr", 0.05, "--threads", 1, "--dense-seconds", 60)
    files = ("--checkpoint", checkpoint, "--checkpoint-every", 10, "--plot", tmp_path / "plot.png")
    process = start(command, *many, *files)
    wait_for(checkpoint, process)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate()
    assert process.returncode == 0, stderr
    assert "interrupted after" in stdout
    table = [line for line in stdout.splitlines() if line.startswith("|")]
    assert len(table) == 3 and table[2].startswith("| LSHLinear")


def test_quickstart_refuses_before_any_work(tmp_path):
    assert "--ask" in run("quickstart.py", "--help").stdout
    answer = run("quickstart.py", "--save", tmp_path / "none" / "m.pt")
    assert answer.returncode == 2 and "expected an existing folder" in answer.stderr
    answer = run("quickstart.py", "--save", tmp_path / "m.pt", "--ask", "Paris", "FR")
    assert answer.returncode != 0 and "needs a trained model" in answer.stderr
