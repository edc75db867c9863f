"""Prepares a lemmatization problem: from a form of a Polish word to its dictionary form (lemma).

The source is the Polish dictionary of the PyPI package ``simplemma`` (version 2.0.0: 3,669,768 forms of
264,087 lemmas). simplemma itself is MIT-licensed; by its own account the lists in it derive from, in order
of importance, the lemmatization lists of Michal Měchura (Open Database License), Wiktionary as packaged
by kaikki.org (CC BY-SA), FreeLing, spaCy's lookups data, UniMorph and the Wikinflection corpus (CC BY 4.0).
None of it is part of this project.

A row is one form; its label is the lemma. Lemmas of fewer than 3 forms are left out, of the others at most
8 forms are kept, drawn at random. Features are the form's prefixes of 2 to 8 letters and the character
3-grams of the bounded form, weighted by tf-idf and scaled to unit length. Held-out forms are such that
their lemma has other forms in training. Labels are numbered in random order, so that the first so many are
a sample of all.

    lemmas = load_lemmas()
    for indices, offsets, values, labels in batches(lemmas.train, 256, seed=0):
        ...

``python -m examples.data.lemmas`` prepares the data, or loads it if it is there, and prints its size.
"""

from __future__ import annotations

import hashlib
import importlib.util
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from slide_torch.data import SparseRows

from .cache import cache_folder
from .held_out import hold_out
from .kept_splits import SPLITS, load_splits, save_splits
from .tf_idf import tf_idf

__all__ = ["Lemmas", "load_lemmas", "prepare"]

FORMAT_VERSION = 2
PARAMETERS = {
    "seed": 0,
    "test_fraction": 0.1,
    "validation_fraction": 0.02,
    "min_forms": 3,
    "max_forms": 8,
    "min_rows": 2,
}
PREFIXES = range(2, 9)


@dataclass(frozen=True)
class Lemmas:
    """The prepared data. Rows have sorted features of unit length and one label.

    Attributes:
        train: The forms to learn from; every lemma has at least one.
        validation: Held-out forms to choose settings with.
        test: Held-out forms to measure with.
        num_features: How many features there are: the rows of the embedding.
        names: Label to lemma.
    """

    train: SparseRows
    validation: SparseRows
    test: SparseRows
    num_features: int
    names: list[str]

    @property
    def num_labels(self) -> int:
        """How many lemmas there are: the rows of the output layer."""
        return len(self.names)


def prepare(
    dictionary: Mapping[str, str],
    *,
    seed: int = 0,
    test_fraction: float = 0.1,
    validation_fraction: float = 0.02,
    min_forms: int = 3,
    max_forms: int = 8,
    min_rows: int = 2,
) -> Lemmas:
    """Makes the data from a dictionary of forms.

    Args:
        dictionary: Form to lemma.
        seed: Chooses the forms that are kept and held out, and numbers the labels. The same seed and
            dictionary give the same data, in any order of the dictionary.
        test_fraction: The share of all rows held out as test. Less where the rule demands it that a
            lemma never loses its last training row.
        validation_fraction: The share of the remaining rows held out as validation, same rule.
        min_forms: Lemmas of fewer forms are left out.
        max_forms: So many forms of a lemma are kept.
        min_rows: A prefix or 3-gram is a feature if this many training rows hold it.

    Raises:
        ValueError: if no lemma has min_forms forms, or there are more than 255 distinct letters.
    """
    generator = np.random.default_rng(seed)
    forms_of: dict[str, list[str]] = {}
    for form, lemma in dictionary.items():
        forms_of.setdefault(lemma, []).append(form)
    names = sorted(lemma for lemma, forms in forms_of.items() if len(forms) >= min_forms)
    if not names:
        raise ValueError(f"prepare: expected a lemma of at least {min_forms} forms, got none")
    names = [names[i] for i in generator.permutation(len(names))]
    forms: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(names):
        own = sorted(forms_of[name])
        if len(own) > max_forms:
            own = [own[i] for i in np.sort(generator.permutation(len(own))[:max_forms])]
        forms += own
        labels += [label] * len(own)
    label_indptr, label_indices = np.arange(len(forms) + 1), np.array(labels, dtype=np.int32)
    part = hold_out(label_indptr, label_indices, seed, test_fraction, validation_fraction)

    row_of, token_of, tokens = tokenise(forms)
    features = tf_idf(row_of, token_of, tokens, part, min_rows)
    rows = SparseRows(
        features.indptr, features.indices, features.values, label_indptr, label_indices
    )
    splits = [rows.select(np.flatnonzero(part == which)) for which in range(3)]
    return Lemmas(*splits, num_features=features.count, names=names)


def tokenise(forms: list[str]) -> tuple[np.ndarray, np.ndarray, int]:
    """(row, token) of every occurrence of a prefix or 3-gram in ``<form>``, and how many tokens there are."""
    codes = np.frombuffer(f"<{'><'.join(forms)}>".encode("utf-32-le"), dtype=np.uint32)
    alphabet, letters = np.unique(codes, return_inverse=True)
    if len(alphabet) > 255:  # eight letters are packed into 64 bits, 0 for none
        raise ValueError(f"prepare: expected at most 255 distinct letters, got {len(alphabet)}")
    letters = letters.astype(np.uint64) + np.uint64(1)
    lengths = np.fromiter(map(len, forms), dtype=np.int64, count=len(forms))
    starts = np.cumsum(lengths + 2) - lengths - 1
    rows = np.arange(len(forms))

    key, prefix_rows, prefix_keys = letters[starts], [], []
    for length in PREFIXES:
        long = lengths >= length
        rows, starts, key = rows[long], starts[long], key[long]
        lengths = lengths[long]
        key = key | letters[starts + length - 1] << np.uint64(8 * (length - 1))
        prefix_rows.append(rows)
        prefix_keys.append(key)
    prefixes, prefix_of = np.unique(np.concatenate(prefix_keys), return_inverse=True)

    row_of_code = np.repeat(np.arange(len(forms)), [len(form) + 2 for form in forms])
    inside = row_of_code[:-2] == row_of_code[2:]
    packed = letters[:-2] | letters[1:-1] << np.uint64(8) | letters[2:] << np.uint64(16)
    grams, gram_of = np.unique(packed[inside], return_inverse=True)
    row_of = np.concatenate([*prefix_rows, row_of_code[:-2][inside]])
    token_of = np.concatenate([prefix_of, gram_of + len(prefixes)])
    return row_of, token_of, len(prefixes) + len(grams)


def load_lemmas(data_dir: Path | None = None) -> Lemmas:
    """Loads the data, preparing it the first time (or when its source has changed): about a minute.

    Args:
        data_dir: Where the prepared data is kept. By default ``slide_torch`` in the user's cache
            folder, ``$XDG_CACHE_HOME`` or ``~/.cache``.

    Raises:
        ModuleNotFoundError: if simplemma is not installed.
    """
    if data_dir is None:
        data_dir = cache_folder()
    spec = importlib.util.find_spec("simplemma")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(
            "load_lemmas: the forms of words come from the package simplemma, which is not installed; "
            'run: pip install --no-build-isolation ".[examples]"'
        )
    source = Path(spec.origin).parent / "strategies" / "dictionaries" / "data" / "pl.plzma"
    description = {
        "version": FORMAT_VERSION,
        "parameters": PARAMETERS,
        "source_sha256": hashlib.sha256(source.read_bytes()).hexdigest(),
    }
    path = data_dir / "lemmas.pt"
    if (kept := load_splits(path, description)) is not None:
        splits, rest = kept
        return Lemmas(**splits, num_features=rest["num_features"], names=rest["names"].split("\n"))
    from simplemma.strategies.dictionaries import DefaultDictionaryFactory

    print("Preparing lemmas: about a minute, once", flush=True)
    lemmas = prepare(DefaultDictionaryFactory().get_dictionary("pl"), **PARAMETERS)
    splits = {split: getattr(lemmas, split) for split in SPLITS}
    rest = {"num_features": lemmas.num_features, "names": "\n".join(lemmas.names)}
    save_splits(path, description, splits, rest)
    return lemmas


def main() -> None:
    """Prepares or loads the data and prints how much there is."""
    start = time.perf_counter()
    lemmas = load_lemmas()
    seconds = time.perf_counter() - start
    for name in SPLITS:
        split = getattr(lemmas, name)
        features = len(split.feature_indices) / len(split)
        print(f"{name:>10}: {len(split):>9,} rows, {features:.1f} features each")
    print(f"{lemmas.num_features:,} features, {lemmas.num_labels:,} lemmas, {seconds:.1f} s")


if __name__ == "__main__":
    main()
