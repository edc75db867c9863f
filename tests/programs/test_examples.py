"""The examples as commands, on tiny input."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from example_programs import EXAMPLES, start, wait_for
from torch import nn

from examples.common import classifier, recipe
from examples.common.checkpoint import save_checkpoint
from examples.common.run import Run
from slide_torch import LSHLinear, optim
from slide_torch.data import batches, read_xmc

TINY = [str(EXAMPLES / "data" / "tiny_train.txt"), str(EXAMPLES / "data" / "tiny_test.txt")]


def run(script, *arguments):
    command = [sys.executable, str(EXAMPLES / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_xmc_trains_both_heads_and_saves(tmp_path):
    model = tmp_path / "model.pt"
    answer = run(
        *("xmc.py", *TINY, "--epochs", 30, "--batch", 8, "--hidden", 16, "--lr", 0.05),
        *("--decay", 0, "--dense-seconds", 0.2, "--propensity", "Amazon-670K", "--threads", 1),
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


def test_xmc_chooses_its_rate_and_predicts_a_file(tmp_path):
    model, checkpoint = tmp_path / "model.pt", tmp_path / "run.pt"
    rest = ("--epochs", 8, "--batch", 8, "--hidden", 16, "--threads", 1, "--validation", 0.2)
    files = ("--save", model, "--checkpoint", checkpoint, "--plot", tmp_path / "plot.png")
    answer = run("xmc.py", *TINY, *rest, *files)
    assert answer.returncode == 0, answer.stderr
    chosen = re.search(r"chosen by 12 validation rows: --lr (\S+) --decay (\S+)", answer.stdout)
    assert float(chosen[1]) in recipe.RATES and float(chosen[2]) in recipe.DECAYS
    settings = torch.load(checkpoint, weights_only=True)["settings"]
    assert (settings["lr"], settings["decay"]) == (float(chosen[1]), float(chosen[2]))
    # what is gone on from has chosen
    again = run("xmc.py", *TINY, *rest, *files)
    assert again.returncode == 0 and "chosen" not in again.stdout and "going on" in again.stdout

    answer = run("xmc.py", "--predict", TINY[1], "--save", model)
    assert answer.returncode == 0, answer.stderr
    found = [list(map(int, line.split(","))) for line in answer.stdout.splitlines()]
    test = read_xmc(TINY[1])
    assert len(found) == len(test) and all(len(set(row)) == 5 for row in found)
    hits = sum(
        found[i][0] in test.label_indices[test.label_indptr[i] : test.label_indptr[i + 1]]
        for i in range(len(test))
    )
    assert hits / len(test) > 0.5


def test_recipe_starts_and_falls(tmp_path):
    """Before the first step the start predicts already, and the last step's rate is nearly 0."""
    data = read_xmc(TINY[0])
    torch.manual_seed(0)
    model = classifier.Classifier(
        data.num_features, 16, LSHLinear(16, data.num_labels, sparse=True)
    )
    dense = classifier.Classifier(data.num_features, 16, nn.Linear(16, data.num_labels))
    recipe.warm_start_(model, data, 0, progress=False)
    recipe.warm_start_(dense, data, 0, progress=False)
    labels = classifier.labels_of(data)
    assert classifier.precision_at_1(classifier.predict(model, data, 1), labels) > 0.4
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), dense.parameters(), strict=True)
    )
    losses = [
        classifier.loss_of(m(*features), own)
        for m in (model.eval(), dense)
        for *features, own in batches(data, len(data))
    ]
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-5)
    rates = []

    def recorded(kind, step):
        def run_step(self, *arguments):
            rates.extend((kind, group["lr"]) for group in self.param_groups)
            return step(self, *arguments)

        return run_step

    with pytest.MonkeyPatch.context() as patch:
        for kind in (optim.Adam, optim.Adagrad):
            patch.setattr(kind, "step", recorded(kind, kind.step))
        how = recipe.Recipe(batch=8, lr=0.1, decay=0.0, seed=0, epochs=1)
        recipe.train(Run("falling"), model.train(), data, data, how, progress=False)
    steps = -(-len(data) // 8)
    falling = [pytest.approx(0.1 * (1 - i / steps)) for i in range(steps)]
    assert [rate for kind, rate in rates if kind is optim.Adam] == falling
    of_head = [rate / recipe.head_rate(0.1) for kind, rate in rates if kind is optim.Adagrad]
    relative = [pytest.approx(1 - i / steps) for i in range(steps)]
    assert of_head[::2] == of_head[1::2] == relative  # of the weight, and of the bias


@pytest.mark.parametrize(
    "arguments,message",
    [
        ([], "expected the files train and test"),
        ([*TINY, "--predict", TINY[1]], "goes with --save MODEL alone"),
        (["--predict", TINY[1], "--save", "none.pt"], "expected a trained model"),
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


@pytest.mark.parametrize("name", ["quickstart", "xmc", "language_model", "recommender", "images"])
def test_help_shows_the_command(example, capsys, name):
    with pytest.raises(SystemExit) as end:
        example(name, capsys, "--help")
    assert end.value.code == 0 and f"python examples/{name}.py" in capsys.readouterr().out


# --- runs that are stopped --------------------------------------------------------------------------

LONG = ("--epochs", 10, "--batch", 2, "--hidden", 16, "--lr", 0.05, "--decay", 0, "--threads", 1)

# the quickstart's own program on the tiny rows, without its download and its 234,908 places
TINY_QUICKSTART = f"""
import types
import quickstart
from data import places
from slide_torch.data import read_xmc
train, test = read_xmc({TINY[0]!r}), read_xmc({TINY[1]!r}, num_features=30, num_labels=12)
places.load_places = lambda *_: types.SimpleNamespace(
    train=train, validation=test, test=test, num_features=train.num_features,
    num_labels=train.num_labels)
quickstart.main()
"""


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
    path = tmp_path / "run.pt"
    save_checkpoint(path, {"steps": 1})

    def broken(content, file):
        file.write(b"half of it")
        raise OSError("no space left")

    monkeypatch.setattr(torch, "save", broken)
    with pytest.raises(OSError, match="no space"):
        save_checkpoint(path, {"steps": 2})
    assert torch.load(path, weights_only=True) == {"steps": 1}
    assert os.listdir(tmp_path) == ["run.pt"]


@pytest.mark.parametrize("numbers", [10_000, 10_000_000])
def test_a_full_disk_is_named_and_leaves_the_old_checkpoint(numbers, tmp_path):
    """A limit on the size of files stands for the end of the disk."""
    program = f"""
import resource, signal, sys
from pathlib import Path
sys.path.insert(0, {str(EXAMPLES.parent)!r})
import torch
from examples.common.checkpoint import save_checkpoint
path = Path("run.pt")
save_checkpoint(path, {{"steps": 1}})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
save_checkpoint(path, {{"steps": 2, "weight": torch.zeros({numbers})}})
"""
    found = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True
    )
    assert found.returncode == 1
    expected = "OSError: [Errno 27] File too large (nothing was replaced): 'run.pt'"
    assert found.stderr.strip().splitlines()[-1] == expected
    assert torch.load(tmp_path / "run.pt", weights_only=True) == {"steps": 1}
    assert os.listdir(tmp_path) == ["run.pt"]


@pytest.mark.parametrize("script", ["xmc", "quickstart"])
def test_ctrl_c_ends_the_training_and_prints_the_table(script, tmp_path):
    command = (EXAMPLES / "xmc.py", *TINY) if script == "xmc" else ("-c", TINY_QUICKSTART)
    checkpoint = tmp_path / "run.pt"
    many = ("--epochs", 100_000, "--batch", 2, "--lr", 0.05, "--decay", 0, "--threads", 1)
    many = (*many, "--dense-seconds", 60)
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


def test_sharded_over_two_processes(tmp_path):
    record = tmp_path / "record.json"
    arguments = ("--classes", 500, "--steps", 60, "--batch", 64, "--test-rows", 256)
    answer = subprocess.run(
        [
            *(
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--nproc-per-node",
                "2",
                "--standalone",
            ),
            str(EXAMPLES / "sharded.py"),
            *map(str, (*arguments, "--threads", 1, "--json", record)),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert answer.returncode == 0, answer.stderr
    found = json.loads(record.read_text())
    assert found["ranks"] == 2 and found["steps"] == 60
    assert found["P@1"] > 0.5  # most samples are of few classes
