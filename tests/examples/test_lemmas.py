"""The lemmatization problem: what is kept, held out and made a feature."""

import sys

import numpy as np
import pytest

from examples.data import lemmas as lemmas_module
from examples.data.lemmas import SPLITS, load_lemmas, prepare

ENDINGS = ["", "a", "u", "em", "ie", "y", "ów", "om", "ami", "ach"]


def make_dictionary(count=40):
    words = [
        f"{first}{middle}" for first in ("kot", "dom", "żaba", "las") for middle in "bcdfghjklm"
    ]
    return {word + end: word for word in words[:count] for end in ENDINGS} | {
        "ty": "ty",
        "cię": "ty",
    }


@pytest.fixture(scope="module")
def lemmas():
    return prepare(make_dictionary(), test_fraction=0.2, validation_fraction=0.2)


def test_rows_and_splits(lemmas):
    sizes = [len(getattr(lemmas, split)) for split in SPLITS]
    assert sum(sizes) == 40 * 8 and sizes[2] == 64 and sizes[1] == 51
    assert sorted(lemmas.names) == sorted(set(make_dictionary().values()) - {"ty"})
    assert lemmas.names != sorted(lemmas.names)  # a sample, however many are taken
    for split in SPLITS:
        rows = getattr(lemmas, split)
        assert (np.diff(rows.label_indptr) == 1).all()
        row_of = np.repeat(np.arange(len(rows)), np.diff(rows.feature_indptr))
        np.testing.assert_allclose(np.bincount(row_of, rows.feature_values**2), 1, rtol=1e-5)
        assert (np.diff(rows.feature_indices)[np.diff(row_of) == 0] > 0).all()
    trained = set(lemmas.train.label_indices.tolist())
    assert trained == set(range(40))


def test_features_are_prefixes_and_grams():
    row_of, token_of, tokens = lemmas_module.tokenise(["kota", "kot", "k"])
    found = [set(token_of[row_of == row].tolist()) for row in range(3)]
    # prefixes ko, kot, kota; 3-grams of <kota>, of <kot>, of <k>
    assert [len(own) for own in found] == [3 + 4, 2 + 3, 1]
    assert len(found[0] & found[1]) == 2 + 2  # ko, kot; <ko, kot
    assert set.union(*found) == set(range(tokens))


def test_same_seed_same_data(lemmas):
    shuffled = dict(sorted(make_dictionary().items(), reverse=True))
    again = prepare(shuffled, test_fraction=0.2, validation_fraction=0.2)
    for split in SPLITS:
        for field, array in vars(getattr(lemmas, split)).items():
            np.testing.assert_array_equal(array, getattr(getattr(again, split), field))
    assert again.names == lemmas.names
    other = prepare(make_dictionary(), seed=1, test_fraction=0.2, validation_fraction=0.2)
    assert other.names != lemmas.names


def test_refuses():
    with pytest.raises(ValueError, match="a lemma of at least 3 forms"):
        prepare({"ty": "ty", "cię": "ty"})
    with pytest.raises(ValueError, match="255 distinct letters"):
        prepare({chr(0x4E00 + i): "x" for i in range(300)}, max_forms=300)


def test_cache(tmp_path, monkeypatch):
    package = tmp_path / "site" / "simplemma" / "strategies" / "dictionaries"
    (package / "data").mkdir(parents=True)
    for folder in (package, package.parent, package.parents[1]):
        (folder / "__init__.py").touch()
    (package / "__init__.py").write_text(
        "class DefaultDictionaryFactory:\n"
        "    def get_dictionary(self, language):\n"
        f"        return {make_dictionary()!r} if language == 'pl' else None\n"
    )
    for name in [name for name in sys.modules if name.split(".")[0] == "simplemma"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(package.parents[2])
    prepared = []
    monkeypatch.setattr(
        lemmas_module, "prepare", lambda *a, **k: prepared.append(1) or prepare(*a, **k)
    )
    for source in (b"one", b"one", b"other"):
        (package / "data" / "pl.plzma").write_bytes(source)
        found = load_lemmas(tmp_path)
        assert found.num_labels == 40 and len(found.train) == 320 - len(found.test) - len(
            found.validation
        )
    assert len(prepared) == 2
    monkeypatch.setitem(sys.modules, "simplemma", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install --no-build-isolation"):
        load_lemmas(tmp_path)
