"""``SparseRows.from_scipy`` and ``to_scipy`` against scipy's own arithmetic."""

import sys

import numpy as np
import pytest
import torch

from slide_torch.data import SparseRows, XMCData, batches

N, NUM_FEATURES, NUM_LABELS = 40, 30, 12
FIELDS = tuple(SparseRows.__dataclass_fields__)
INDICES = (np.int32, np.int64)


@pytest.fixture
def sparse():
    return pytest.importorskip("scipy.sparse")


def matrices(sparse, *, seed=0, index=np.int32, dtype=np.float64):
    """Features and labels in CSR whose rows are neither sorted nor without repeated indices."""
    generator = np.random.default_rng(seed)
    found = []
    for columns, most in ((NUM_FEATURES, 9), (NUM_LABELS, 4)):
        indptr = np.concatenate([[0], np.cumsum(generator.integers(0, most, N))])
        indices = generator.integers(0, columns, indptr[-1])
        values = generator.integers(1, 100, indptr[-1])
        matrix = sparse.csr_array((N, columns))
        matrix.indptr, matrix.indices = indptr.astype(index), indices.astype(index)
        matrix.data = values.astype(dtype)
        found.append(matrix)
    return found


def csr(sparse, *rows, columns=4):
    return sparse.csr_array(np.array(rows, dtype=np.float32).reshape(-1, columns))


def assert_same(first, second):
    for field in FIELDS:
        array, other = getattr(first, field), getattr(second, field)
        assert array.dtype == other.dtype, field
        np.testing.assert_array_equal(array, other, err_msg=field)


@pytest.mark.parametrize("index", INDICES)
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.int8, np.uint64, ">f4"])
def test_rows_are_those_of_the_matrix(sparse, index, dtype):
    X, Y = matrices(sparse, index=index, dtype=dtype)
    rows = SparseRows.from_scipy(X, Y)
    assert type(rows) is XMCData and len(rows) == N
    assert (rows.num_features, rows.num_labels) == (NUM_FEATURES, NUM_LABELS)
    types = {field: getattr(rows, field).dtype for field in FIELDS}
    assert types == {
        **dict.fromkeys(("feature_indptr", "label_indptr"), np.int64),
        **dict.fromkeys(("feature_indices", "label_indices"), np.int32),
        "feature_values": np.float32,
    }
    # in the matrix's order, with what it repeats
    np.testing.assert_array_equal(rows.feature_indptr, X.indptr)
    np.testing.assert_array_equal(rows.feature_indices, X.indices)
    np.testing.assert_array_equal(rows.feature_values, X.data.astype(np.float32))
    np.testing.assert_array_equal(rows.label_indptr, Y.indptr)
    np.testing.assert_array_equal(rows.label_indices, Y.indices)


def test_a_batch_is_a_product(sparse):
    """An embedding bag of the batches is scipy's product with the embedding."""
    X, Y = matrices(sparse)
    table = torch.randn(NUM_FEATURES, 5, dtype=torch.float32)
    bags = [
        torch.nn.functional.embedding_bag(
            indices, table, offsets, mode="sum", per_sample_weights=values, include_last_offset=True
        )
        for indices, offsets, values, _ in batches(SparseRows.from_scipy(X, Y), 16)
    ]
    np.testing.assert_allclose(torch.cat(bags).numpy(), X @ table.numpy(), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("index", INDICES)
def test_there_and_back(sparse, index):
    rows = SparseRows.from_scipy(*matrices(sparse, index=index))
    X, Y = rows.to_scipy()
    assert X.shape == (N, NUM_FEATURES) and Y.shape == (N, NUM_LABELS)
    assert X.dtype == Y.dtype == np.float32
    assert_same(SparseRows.from_scipy(X, Y), rows)
    plain = SparseRows(*(getattr(rows, field) for field in FIELDS))
    X, Y = plain.to_scipy()
    assert X.shape == (N, rows.feature_indices.max() + 1)
    assert Y.shape == (N, rows.label_indices.max() + 1)


def test_other_formats(sparse):
    X, Y = (matrix.tocoo().tocsr() for matrix in matrices(sparse))  # sorted and merged
    expected = SparseRows.from_scipy(X, Y)
    for format in ("coo", "csc", "lil", "dok", "bsr"):
        assert_same(SparseRows.from_scipy(X.asformat(format), Y.asformat(format)), expected)
    assert_same(SparseRows.from_scipy(sparse.csr_matrix(X), sparse.csr_matrix(Y)), expected)


def test_room_behind_the_last_row_is_left_out(sparse):
    X = csr(sparse, [0, 1, 0, 2], [0, 0, 3, 0])
    X.indices = np.append(X.indices, [99, -1]).astype(np.int32)
    X.data = np.append(X.data, [np.nan, 1]).astype(np.float32)
    assert SparseRows.from_scipy(X).feature_indices.tolist() == [1, 3, 2]


def test_labels_of_zero_are_none(sparse):
    Y = csr(sparse, [1, 1, 0, 0], [0, 1, 1, 1], [0, 0, 0, 1])
    Y.data[[0, 3, 5]] = 0
    rows = SparseRows.from_scipy(csr(sparse, [0] * 4, [0] * 4, [0] * 4), Y)
    assert rows.label_indptr.tolist() == [0, 1, 3, 3]
    assert rows.label_indices.tolist() == [1, 1, 3]
    true = SparseRows.from_scipy(Y, Y.astype(bool))
    assert_same(true, SparseRows.from_scipy(Y, Y))


def test_without_labels_or_rows(sparse):
    rows = SparseRows.from_scipy(csr(sparse, [0, 1, 0, 2]))
    assert rows.num_labels == 0 and rows.label_indptr.tolist() == [0, 0]
    empty = SparseRows.from_scipy(sparse.csr_array((0, 3)), sparse.csr_array((0, 5)))
    assert len(empty) == 0
    assert [matrix.shape for matrix in empty.to_scipy()] == [(0, 3), (0, 5)]
    plain = SparseRows(*(getattr(empty, field) for field in FIELDS))
    assert [matrix.shape for matrix in plain.to_scipy()] == [(0, 0), (0, 0)]


@pytest.mark.parametrize("index", INDICES)
def test_no_memory_is_shared(sparse, index):
    """Scipy sorts and merges in place."""
    X, Y = matrices(sparse, index=index, dtype=np.float32)
    rows, again = SparseRows.from_scipy(X, Y), SparseRows.from_scipy(X, Y)
    for matrix in (X, Y, *rows.to_scipy()):
        matrix.sum_duplicates()
        matrix.data[:] = 7
        assert_same(rows, again)


def damaged(matrix, **arrays):
    for name, array in arrays.items():
        setattr(matrix, name, np.array(array, dtype=getattr(matrix, name).dtype))
    return matrix


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda s: np.eye(3), r"two dimensions, got ndarray of shape \(3, 3\): make one by"),
        (lambda s: [[1, 2]], r"two dimensions, got list: make one by"),
        (lambda s: s.coo_array(np.ones(3)), r"got coo_array of shape \(3,\)"),
        (lambda s: csr(s, [1] * 4).astype(complex), "expected real numbers, got dtype complex128"),
        (lambda s: s.coo_array((1, 2**31 + 1)), "at most 2147483648 columns, got 2147483649"),
        (lambda s: damaged(csr(s, [1] * 4), indices=[0, 1, 2, 4]), r"in \[0, 4\), got 0 to 4"),
        (lambda s: damaged(csr(s, [1] * 4), indices=[-1, 1, 2, 3]), r"in \[0, 4\), got -1 to 3"),
        (lambda s: damaged(csr(s, [1] * 4), indptr=[0, 5]), "expected 4 entries at most, got 5"),
        (lambda s: damaged(csr(s, [1] * 4), data=[1, 2]), "expected 2 entries at most, got 4"),
        (lambda s: damaged(csr(s, [1] * 4), indptr=[1, 4]), "2 row pointers that begin with 0"),
        (lambda s: damaged(csr(s, [1] * 4), indptr=[0, 2, 4]), "2 row pointers that begin"),
        (lambda s: damaged(csr(s, [1] * 4, [0] * 4), indptr=[0, 4, 2]), "do not fall"),
    ],
)
def test_matrices_that_raise(sparse, make, message):
    good = csr(sparse, [1] * 4)
    with pytest.raises(ValueError, match=r"SparseRows.from_scipy: features: .*" + message):
        SparseRows.from_scipy(make(sparse))
    with pytest.raises(ValueError, match=r"SparseRows.from_scipy: labels: .*" + message):
        SparseRows.from_scipy(good, make(sparse))


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e39])
def test_values_that_are_not_finite(sparse, value):
    X = sparse.csr_array(np.array([[1, value]]))
    with pytest.raises(ValueError, match="features: expected values that are finite as float32"):
        SparseRows.from_scipy(X)


def test_numbers_of_rows_that_differ(sparse):
    with pytest.raises(ValueError, match="labels: expected 1 rows, as many as of features, got 2"):
        SparseRows.from_scipy(csr(sparse, [1] * 4), csr(sparse, [1] * 4, [1] * 4))


def test_rows_out_of_range(sparse):
    rows = SparseRows.from_scipy(csr(sparse, [1, 0, 0, 1]))
    wrong = XMCData(**{**vars(rows), "num_features": 3})
    with pytest.raises(ValueError, match=r"to_scipy: feature_indices: .*\[0, 3\), got 0 to 3"):
        wrong.to_scipy()


def test_without_scipy(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy", None)
    monkeypatch.setitem(sys.modules, "scipy.sparse", None)
    sizes = ((3, np.int64), (0, np.int32), (0, np.float32), (3, np.int64), (0, np.int32))
    rows = SparseRows(*(np.zeros(size, dtype) for size, dtype in sizes))
    with pytest.raises(ImportError, match=r"SparseRows.to_scipy: expected scipy .* pip install"):
        rows.to_scipy()
    with pytest.raises(ImportError, match=r"SparseRows.from_scipy: features: expected scipy"):
        SparseRows.from_scipy(np.eye(2))
