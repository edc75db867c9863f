import math

import numpy as np
import pytest
import torch

from slide_torch import metrics

AT_K = (metrics.precision_at_k, metrics.recall_at_k, metrics.ndcg_at_k)


def reference(predicted, targets, k, label_propensities):
    """The metrics by their definitions, a row at a time."""
    precision = recall = ndcg = attained = best = 0.0
    for ranked, padded in zip(predicted.tolist(), targets.tolist(), strict=True):
        labels = {label for label in padded if label >= 0}
        hits = [label in labels for label in ranked[:k]]
        precision += sum(hits) / k
        if labels:
            recall += sum(hits) / len(labels)
            gain = sum(hit / math.log2(rank + 2) for rank, hit in enumerate(hits))
            ndcg += gain / sum(1 / math.log2(rank + 2) for rank in range(min(k, len(labels))))
        scores = [1 / label_propensities[label].item() for label in ranked[:k] if label in labels]
        attained += sum(scores)
        scores = sorted((1 / label_propensities[label].item() for label in labels), reverse=True)
        best += sum(scores[:k])
    rows = len(predicted)
    return precision / rows, recall / rows, ndcg / rows, attained / best if best else 0.0


def test_values_by_hand():
    predicted = torch.tensor([[3, 1, 2], [0, 4, 5]])
    targets = torch.tensor([[1, 3, 9, 7], [5, -100, -1, -100]])
    assert metrics.precision_at_k(predicted, targets, 1) == pytest.approx(0.5)
    assert metrics.precision_at_k(predicted, targets, 3) == pytest.approx((2 / 3 + 1 / 3) / 2)
    assert metrics.recall_at_k(predicted, targets, 3) == pytest.approx((2 / 4 + 1) / 2)
    first = (1 + 1 / math.log2(3)) / (1 + 1 / math.log2(3) + 1 / 2)
    assert metrics.ndcg_at_k(predicted, targets, 3) == pytest.approx((first + 1 / 2) / 2)
    label_propensities = torch.full((10,), 0.5)
    label_propensities[9] = 0.1
    # Row 0 could score 10 + 2 + 2 at k = 3 and gets 2 + 2; row 1 gets the 2 it could.
    value = metrics.psp_at_k(predicted, targets, 3, label_propensities)
    assert value == pytest.approx((4 + 2) / (14 + 2))
    assert isinstance(value, float)


def test_propensities_by_hand():
    counts = torch.tensor([0, 1, 10, 1000])
    scale = (math.log(5000) - 1) * 3.6**0.6
    expected = [1 / (1 + scale * (count + 2.6) ** -0.6) for count in counts.tolist()]
    value = metrics.propensities(counts, 5000, *metrics.PROPENSITY_CONSTANTS["Amazon-670K"])
    assert value.tolist() == pytest.approx(expected)
    assert value.dtype == torch.float64
    assert value.diff().min() > 0
    # A label seen once has p = 1 / log(num_rows), whatever A and B are.
    assert metrics.propensities(counts, 5000)[1].item() == pytest.approx(1 / math.log(5000))


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("k", [1, 3, 5])
def test_agrees_with_reference_on_random_input(seed, k):
    generator = torch.Generator().manual_seed(seed)
    num_labels = 12
    shape = (40, num_labels)
    predicted = torch.rand(shape, generator=generator).argsort(1)[:, : 5 + seed % 3]
    # Padding anywhere in a row, repeated labels, rows without labels, and ranks without a find.
    targets = torch.randint(-4, num_labels, (40, 1 + seed), generator=generator)
    targets[:3] = -100
    predicted[torch.rand(predicted.shape, generator=generator) < 0.1] = -1
    counts = torch.randint(0, 50, (num_labels,), generator=generator)
    label_propensities = metrics.propensities(counts, 500)
    got = [function(predicted, targets, k) for function in AT_K]
    got.append(metrics.psp_at_k(predicted, targets, k, label_propensities))
    assert got == pytest.approx(reference(predicted, targets, k, label_propensities), abs=1e-12)


def test_rows_without_labels_count_as_zero():
    predicted = torch.tensor([[0, 1], [0, 1]])
    targets = torch.tensor([[0, 1], [-100, -100]])
    for function in AT_K:
        assert function(predicted, targets, 2) == pytest.approx(0.5)
    label_propensities = torch.full((2,), 0.5)
    assert metrics.psp_at_k(predicted, targets, 2, label_propensities) == pytest.approx(1.0)
    for width in (0, 2):
        empty = torch.full((2, width), -100)
        for function in AT_K:
            assert function(predicted, empty, 2) == 0.0
        assert metrics.psp_at_k(predicted, empty, 2, label_propensities) == 0.0


def test_int32_and_non_contiguous_input():
    predicted = torch.tensor([[3, 0], [1, 4]], dtype=torch.int32).T
    targets = torch.tensor([[3, -1], [2, 4]], dtype=torch.int32)
    assert metrics.precision_at_k(predicted, targets, 2) == pytest.approx(0.5)


@pytest.mark.parametrize("function", AT_K)
def test_errors_name_function_and_argument(function):
    good = torch.tensor([[0, 1]])
    for arguments, error, words in (
        ((good.float(), good, 1), TypeError, "predicted: expected an integer dtype"),
        ((good, good > 0, 1), TypeError, "targets: expected an integer dtype"),
        ((good, good[0], 1), ValueError, "targets: expected 2 dimensions"),
        ((good, good.repeat(2, 1), 1), ValueError, "as many rows as predicted"),
        ((good[:0], good[:0], 1), ValueError, "at least 1"),
        ((good, good, 3), ValueError, "k: expected 1 to 2"),
        ((good, good, 0), ValueError, "k: expected 1 to 2"),
        ((good, good, 1.0), TypeError, "k: expected an int"),
        ((good * 0, good, 2), ValueError, "predicted: expected distinct labels"),
    ):
        with pytest.raises(error, match=f"{function.__name__}: .*{words}"):
            function(*arguments)


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.uint16])
def test_numpy_arrays_and_integers_count_as_tensors(dtype):
    predicted, targets = torch.tensor([[3, 1, 2], [0, 4, 5]]), torch.tensor([[1, 3], [5, 5]])
    counts = torch.tensor([1, 2, 3, 4, 5, 6])
    label_propensities = metrics.propensities(counts, 500)
    theirs = metrics.propensities(counts.numpy(), np.int64(500))
    assert torch.equal(theirs, label_propensities)
    arrays = [tensor.numpy().astype(dtype) for tensor in (predicted, targets)]
    arrays[0].flags.writeable = False
    k = np.int64(2)
    for function in AT_K:
        assert function(*arrays, k) == function(predicted, targets, 2)
    assert metrics.psp_at_k(*arrays, k, theirs.numpy()) == metrics.psp_at_k(
        predicted, targets, 2, label_propensities
    )


def test_other_things_are_refused():
    good = torch.tensor([[0, 1]])
    for function in AT_K:
        for wrong, got in (
            ([[0, 1]], "list"),
            (None, "NoneType"),
            (np.array([["a"]]), "array of <U"),
        ):
            with pytest.raises(TypeError, match=f"{function.__name__}: predicted: expected.*{got}"):
                function(wrong, good, 1)
            with pytest.raises(TypeError, match=f"{function.__name__}: targets: expected.*{got}"):
                function(good, wrong, 1)
        with pytest.raises(TypeError, match="predicted: expected an integer dtype"):
            function(np.zeros((1, 2)), good, 1)
        with pytest.raises(TypeError, match="k: expected an int, got bool"):
            function(good, good, True)
    with pytest.raises(TypeError, match=r"propensities: label_counts: expected.*got list"):
        metrics.propensities([1, 2], 500)
    with pytest.raises(TypeError, match=r"psp_at_k: label_propensities: expected.*got list"):
        metrics.psp_at_k(good, good, 1, [0.5, 0.5])


def test_errors_of_propensities():
    good = torch.tensor([[0, 1]])
    with pytest.raises(TypeError, match="psp_at_k: label_propensities: expected a floating"):
        metrics.psp_at_k(good, good, 1, torch.ones(2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"psp_at_k: label_propensities: expected .N. positive"):
        metrics.psp_at_k(good, good, 1, torch.zeros(2))
    with pytest.raises(ValueError, match="got 1 entries and label 1"):
        metrics.psp_at_k(good, good, 2, torch.ones(1))
    with pytest.raises(ValueError, match="label_counts: expected"):
        metrics.propensities(torch.tensor([-1]), 100)
    with pytest.raises(ValueError, match="num_rows: expected at least 3"):
        metrics.propensities(torch.tensor([1]), 2)
    with pytest.raises(ValueError, match="B: expected a number above 0"):
        metrics.propensities(torch.tensor([1]), 100, B=0.0)
