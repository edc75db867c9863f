"""Approximate prediction: calibration, and the recall that it reaches."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from helpers import coded_lists, rounded_rows
from predicted_layers import clustered, layer_of

from slide_torch import LSHLinear
from slide_torch.prediction.calibration import RADIUS_WEIGHTS
from slide_torch.prediction.partition import RowPartition


def share_found(found, wanted):
    return (found.unsqueeze(2) == wanted.unsqueeze(1)).any(2).float().mean().item()


@pytest.mark.parametrize("recall", [0.5, 0.95, 1.0])
@pytest.mark.parametrize("bias", [True, False])
def test_recall_asked_for_is_reached(recall, bias):
    layer, x = clustered()
    if not bias:
        layer.bias = None
        layer = LSHLinear.from_linear(layer, options=layer.options)
    measured = layer.calibrate(x, 10, recall)
    assert measured >= recall - 1e-6
    values, indices = layer.predict(x, 10, exact=False)
    exact = layer.predict(x, 10)
    found = share_found(indices, exact[1])
    # more where the lists of some input held too few rows, so that more were searched
    assert found == pytest.approx(measured, abs=1e-5)
    logits = F.linear(x, layer.weight, layer.bias)
    torch.testing.assert_close(logits.gather(1, indices), values)
    assert (values.diff() <= 0).all()
    calibration = layer.calibration
    if recall < 1:  # far from all rows are looked at
        assert calibration.probes < calibration.partition.lists / 4
    partition, probes, rescored = calibration.partition, calibration.probes, calibration.rescored
    spread = calibration.radius_weight
    if probes > partition.lists_holding(10):  # and no fewer lists would do, but for what codes lose
        _, fewer = partition.topk(x, layer.weight, layer.bias, 10, probes - 1, spread, rescored)
        assert share_found(fewer, exact[1]) < recall + (1 - recall) / 10


def test_calibration_finds_how_much_a_spread_must_say():
    """Most rows are short and alike; a list's mean hides the few long ones among them, which are the best."""
    torch.manual_seed(3)
    N, d = 4000, 16
    direction = F.normalize(torch.randn(1, d))
    weight = direction * 2 + torch.randn(N, d) * 0.3
    long = torch.arange(0, N, 8)
    weight[long] += torch.randn(len(long), d) * 2.5
    layer = LSHLinear(d, N)
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.zero_()
    x = weight[long[torch.randperm(len(long))[:200]]] - direction * 2
    measured = layer.calibrate(x, 10, 0.9)
    calibration = layer.calibration
    assert measured >= 0.9 - 1e-6
    best = layer.predict(x, 10)[1]

    def rows_read(spread):
        held, read = calibration.partition.held(x, best, spread)
        return read[int((held < 0.9 - 1e-6).sum())].item()

    own = rows_read(calibration.radius_weight)
    assert own == min(rows_read(spread) for spread in RADIUS_WEIGHTS)
    assert own < rows_read(0.0)


def test_other_inputs_get_about_the_recall():
    layer, x = clustered()
    layer.calibrate(x[:150], 10, 0.95)
    rest = x[150:]
    assert share_found(layer.predict(rest, 10, exact=False)[1], layer.predict(rest, 10)[1]) > 0.9


def test_approximate_of_more_neurons_than_the_lists_hold():
    layer, x = clustered(N=200)
    layer.calibrate(x, 1, 0.1)
    values, indices = layer.predict(x[:9], 200, exact=False)
    assert torch.equal(indices.sort(1).values, torch.arange(200).expand(9, 200))
    torch.testing.assert_close(values, layer.predict(x[:9], 200)[0])


@pytest.mark.parametrize("N", [1, 3, 17])
def test_tiny_layers(N):
    layer, x = layer_of(N, 4), torch.randn(6, 4)
    assert layer.calibrate(x, N, 1.0) == 1.0
    torch.testing.assert_close(layer.predict(x, N, exact=False), layer.predict(x, N))


def test_equal_rows():
    layer = layer_of(500, 4)
    with torch.no_grad():
        layer.weight.fill_(1)
        layer.bias.fill_(0)
    assert layer.calibrate(torch.ones(3, 4), 5, 1.0) == 1.0
    assert layer.predict(torch.ones(4), 5, exact=False)[1].tolist() == [0, 1, 2, 3, 4]


def test_partition_holds_every_row_once_near_its_center():
    layer, _ = clustered()
    partition = RowPartition.build(layer.weight.detach(), layer.bias.detach(), seed=3)
    assert torch.equal(partition.rows.sort().values, torch.arange(4000, dtype=torch.int32))
    assert partition.offsets[-1] == 4000 and (partition.offsets.diff() > 0).all()
    list_of = torch.empty(4000, dtype=torch.int64)
    list_of[partition.rows.long()] = torch.arange(partition.lists).repeat_interleave(
        partition.offsets.diff()
    )
    layer_rows = layer.weight.detach(), layer.bias.detach()
    codes, terms, places = coded_lists(*layer_rows, partition.offsets, partition.rows)
    assert torch.equal(codes[: len(partition.codes)], partition.codes)
    rounded = rounded_rows(codes, terms, places, 24)
    points = torch.cat([rounded, layer.bias.detach().unsqueeze(1)], 1)
    count = partition.offsets.diff()
    means = torch.zeros(partition.lists, 25).index_add_(0, list_of, points) / count.unsqueeze(1)
    torch.testing.assert_close(means[:, :24], partition.centers[:, :24], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(means[:, 24], partition.center_bias)
    square = (points - means[list_of]).square().sum(1)
    radius = (torch.zeros(partition.lists).index_add_(0, list_of, square) / count).sqrt()
    rounding = 1e-6 * points.square().sum(1).max().item()  # of a difference of mean squares
    found = partition.centers[:, 24].square()
    torch.testing.assert_close(found, radius.square(), rtol=1e-5, atol=rounding)
    assert square.mean() < 0.2 * (points - points.mean(0)).square().sum(1).mean()
    each = (
        24 + 12
    )  # codes, scale, bias, place; lists of 32 rows fill their blocks of 16 by three quarters
    assert each * 4000 < partition.memory_bytes() < 2 * each * 4000


def test_approximate_at_any_number_of_threads(both_thread_counts):
    def run():
        layer, x = clustered()
        measured = layer.calibrate(x, 10, 0.9)
        return torch.tensor(measured), *layer.predict(x, 10, exact=False)

    one, two = both_thread_counts(run)
    assert all(map(torch.equal, one, two))


def test_generator_decides_the_partition():
    layer, x = clustered()
    rows = []
    for seed in (1, 1, 2):
        layer.calibration = None
        layer.calibrate(x, 10, generator=torch.Generator().manual_seed(seed))
        rows.append(layer.calibration.partition.rows)
    assert torch.equal(rows[0], rows[1]) and not torch.equal(rows[0], rows[2])


def test_partition_is_kept_for_another_recall_and_remade_for_other_weights():
    layer, x = clustered()
    layer.calibrate(x, 10, 0.8)
    first = layer.calibration.partition
    layer.calibrate(x, 5, 0.99)
    assert layer.calibration.partition is first
    with torch.no_grad():
        layer.weight.add_(1)
    layer.calibrate(x, 5, 0.99)
    assert layer.calibration.partition is not first


def optimizer_step(layer):
    from slide_torch.optim import SGD

    layer.train()
    F.cross_entropy(layer(torch.randn(4, 24)), torch.tensor([1, 2, 3, 4])).backward()
    SGD(layer.parameters(), lr=0.1).step()


CHANGES = {
    "weight": lambda layer: layer.weight.data_ptr() and layer.weight.detach().add_(1),
    "bias": lambda layer: layer.bias.detach().add_(1),
    "parameter": lambda layer: setattr(
        layer, "weight", torch.nn.Parameter(layer.weight.detach().clone())
    ),
    "load_state_dict": lambda layer: layer.load_state_dict(layer.state_dict()),
    "reset_parameters": lambda layer: layer.reset_parameters(),
    "optimizer": optimizer_step,
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_weights_need_another_calibration(change):
    layer, x = clustered()
    layer.calibrate(x, 10)
    layer.predict(x, 10, exact=False)
    CHANGES[change](layer)
    with pytest.raises(RuntimeError, match="weights have changed since"):
        layer.predict(x, 10, exact=False)
    layer.predict(x, 10)
    layer.calibrate(x, 10)
    layer.predict(x, 10, exact=False)


def test_copies_and_state_dicts_go_without_the_calibration():
    layer, x = clustered()
    names = set(layer.state_dict())
    layer.calibrate(x, 10)
    assert set(layer.state_dict()) == names
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    copies = (
        copy.copy(layer),
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        torch.load(buffer, weights_only=False),
    )
    for other in copies:
        with pytest.raises(RuntimeError, match=r"call layer\.calibrate"):
            other.predict(x, 10, exact=False)
        assert torch.equal(other.predict(x, 10)[1], layer.predict(x, 10)[1])
    layer.predict(x, 10, exact=False)  # the original keeps its own


def test_refusals_of_calibrate():
    layer, x = layer_of(50, 8), torch.randn(5, 8)
    for recall in (0, -1, 1.5, float("nan"), True):
        with pytest.raises(ValueError, match="recall: expected a number above 0 and at most 1"):
            layer.calibrate(x, 2, recall)
    with pytest.raises(ValueError, match="input: expected at least one"):
        layer.calibrate(x[:0], 2)
    with pytest.raises(ValueError, match="input: expected finite"):
        layer.calibrate(x / 0, 2)
    with torch.no_grad():
        layer.weight[3, 3] = float("nan")
    with pytest.raises(ValueError, match="weight: expected finite rows"):
        layer.calibrate(x, 2)
    assert layer.calibration is None


def test_few_rescored_rows_find_nearly_all():
    layer, x = clustered()
    layer.calibrate(x, 10, 1.0)
    partition = layer.calibration.partition
    exact = layer.predict(x, 10)[1]
    _, found = partition.topk(x, layer.weight, layer.bias, 10, partition.lists, 0.2, 20)
    assert share_found(found, exact) > 0.99


def test_inputs_of_any_size_and_no_numbers():
    layer, x = clustered()
    layer.calibrate(x, 5, 1.0)
    for factor in (1e-30, 1e-42, 1e15, 0.0):
        values, indices = layer.predict(x[:4] * factor, 5, exact=False)
        assert torch.isfinite(values).all() and indices.min() >= 0
        if factor == 1e15:
            assert share_found(indices, layer.predict(x[:4] * factor, 5)[1]) > 0.9
    for wrong in (float("nan"), float("inf")):
        bad = x[:2].clone()
        bad[0, 0] = wrong
        values, indices = layer.predict(bad, 5, exact=False)
        assert indices.min() >= 0 and indices.max() < 4000  # whichever, but no harm
        torch.testing.assert_close(values[1], layer.predict(x[1], 5)[0])
