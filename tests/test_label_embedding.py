"""label_embedding: features at the mean code of the labels that they occur with."""

import dataclasses

import numpy as np
import pytest
import torch
from helpers import ROOT

from slide_torch.data import SparseRows, batches, label_embedding, read_xmc

FEATURES, LABELS = 30, 7


def make_rows(count=50, features=FEATURES, labels=LABELS, seed=0):
    """Rows of up to six features, some listed twice and some negative, and up to three labels."""
    rng = np.random.default_rng(seed)

    def indptr(most):
        return np.concatenate([[0], np.cumsum(rng.integers(0, most + 1, count))])

    feature_indptr, label_indptr = indptr(6), indptr(3)
    return SparseRows(
        feature_indptr,
        rng.integers(0, features - 2, feature_indptr[-1]).astype(np.int32),
        rng.normal(size=feature_indptr[-1]).astype(np.float32),
        label_indptr,
        rng.integers(0, labels, label_indptr[-1]).astype(np.int32),
    )


def dense(rows, features=FEATURES, labels=LABELS):
    """(values, absolute values) of features and the counts of labels, a row each."""
    x, size, y = (np.zeros((len(rows), width)) for width in (features, features, labels))
    for i in range(len(rows)):
        own = slice(*rows.feature_indptr[i : i + 2])
        np.add.at(x[i], rows.feature_indices[own], rows.feature_values[own])
        np.add.at(size[i], rows.feature_indices[own], np.abs(rows.feature_values[own]))
        np.add.at(y[i], rows.label_indices[slice(*rows.label_indptr[i : i + 2])], 1)
    return x, size, y


def expected(rows, codes, rms):
    x, size, y = dense(rows)
    embedding = (x.T @ y @ codes) / np.maximum(size.sum(0), 1e-12)[:, None]
    occurs = size.sum(0) > 0
    embedding[~occurs] = 0
    return embedding * rms / np.sqrt(np.square(embedding[occurs]).mean())


@pytest.mark.parametrize("dim", [1, 32, 40])
def test_mean_codes_of_labels(dim):
    rows, generator = make_rows(), torch.Generator().manual_seed(3)
    found = label_embedding(rows, dim, num_features=FEATURES, rms=0.2, generator=generator)
    generator.manual_seed(3)
    codes = [
        torch.randn(LABELS, min(32, dim - begin), generator=generator)
        for begin in range(0, dim, 32)
    ]
    assert found.dtype == torch.float32 and found.shape == (FEATURES, dim)
    np.testing.assert_allclose(
        found.numpy(), expected(rows, torch.cat(codes, 1).double().numpy(), 0.2), atol=1e-6
    )
    assert found[-2:].abs().max() == 0  # features that never occur


def test_root_mean_square_of_what_occurs():
    rows = make_rows()
    occurs = np.unique(rows.feature_indices)
    for features in (FEATURES, 10 * FEATURES):
        found = label_embedding(rows, 16, num_features=features)[occurs]
        assert found.square().mean().sqrt().item() == pytest.approx(0.1, rel=1e-5)


def test_features_of_the_same_labels_are_near():
    """Two features that only occur with one label are at its code, and far from those of another."""
    rows = SparseRows(
        np.array([0, 2, 4, 5, 6]),
        np.array([0, 1, 0, 1, 2, 3], dtype=np.int32),
        np.array([1, 2, 3, 4, 5, 6], dtype=np.float32),
        np.arange(5),
        np.array([0, 0, 1, 2], dtype=np.int32),
    )
    one, same, other, another = label_embedding(rows, 64, num_features=4)
    torch.testing.assert_close(one, same)
    assert torch.cosine_similarity(one, other, 0).abs() < 0.5
    assert torch.cosine_similarity(other, another, 0).abs() < 0.5


def test_sizes_are_those_of_a_file():
    data = read_xmc(ROOT / "examples" / "data" / "tiny_train.txt")
    torch.manual_seed(5)
    found = label_embedding(data, 8)
    torch.manual_seed(5)  # torch's global generator governs it
    again = label_embedding(data, 8, num_features=np.int64(data.num_features))
    assert found.shape == (data.num_features, 8) and torch.equal(found, again)
    assert not torch.equal(found, label_embedding(data, 8))
    embedding = torch.nn.EmbeddingBag(*found.shape, mode="sum", include_last_offset=True)
    embedding.load_state_dict({"weight": found})
    indices, offsets, values, _ = next(batches(data, 16))
    assert embedding(indices, offsets, per_sample_weights=values).isfinite().all()


def test_the_same_bits_at_any_number_of_threads(both_thread_counts):
    rows = make_rows(20_000, 5_000, 3_000)

    def run():
        return label_embedding(
            rows, 48, num_features=5_000, generator=torch.Generator().manual_seed(0)
        )

    one, two = both_thread_counts(run)
    assert torch.equal(one, two)


def test_rows_without_anything():
    sizes = ((4, "i8"), (0, "i4"), (0, "f4"), (4, "i8"), (0, "i4"))
    empty = SparseRows(*(np.zeros(size, dtype=dtype) for size, dtype in sizes))
    assert torch.equal(label_embedding(empty, 3, num_features=5), torch.zeros(5, 3))
    rows = make_rows()
    unlabelled = dataclasses.replace(
        rows,
        label_indptr=np.zeros(len(rows) + 1, dtype=np.int64),
        label_indices=rows.label_indices[:0],
    )
    assert label_embedding(unlabelled, 3, num_features=FEATURES).abs().max() == 0


def test_progress(capsys):
    label_embedding(make_rows(), 4, num_features=FEATURES, progress=True)
    assert "Label embedding: 100%" in capsys.readouterr().err


ROWS = make_rows()


def with_(**arrays):
    return dataclasses.replace(ROWS, **arrays)


@pytest.mark.parametrize(
    ("rows", "arguments", "message"),
    [
        ([1, 2], {}, "rows: expected SparseRows, got list"),
        (ROWS, dict(dim=0), "dim: expected an int of at least 1, got 0"),
        (ROWS, dict(num_features=None), "num_features: expected an int for rows that do not tell"),
        (ROWS, dict(num_features=-1), "num_features: expected an int of at least 0"),
        (ROWS, dict(num_features=5), r"rows: features: expected indices in \[0, 5\)"),
        (ROWS, dict(rms=0.0), "rms: expected a positive finite number, got 0.0"),
        (ROWS, dict(rms=float("nan")), "rms: expected a positive"),
        (with_(label_indices=ROWS.label_indices - 1), {}, "rows: labels: expected indices in"),
        (
            with_(feature_values=ROWS.feature_values * np.nan),
            {},
            "rows: feature_values: expected finite",
        ),
    ],
)
def test_refused(rows, arguments, message):
    rng = torch.get_rng_state()
    with pytest.raises(ValueError, match=f"label_embedding: {message}"):
        label_embedding(rows, **{"dim": 4, "num_features": FEATURES, **arguments})
    assert torch.equal(rng, torch.get_rng_state())
