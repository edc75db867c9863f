"""Prediction: exact against torch.topk, approximate against exact."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from helpers import coded_lists

from slide_torch import LSHLinear, ops
from slide_torch.prediction.calibration import RADIUS_WEIGHTS
from slide_torch.prediction.partition import RowPartition

DTYPES = (torch.float32, torch.float64)


def layer_of(N, d, dtype=torch.float32, bias=True):
    return LSHLinear(d, N, bias=bias, dtype=dtype)


def reference(layer, x, k):
    """By a stable sort, so that equal values go by the smaller index; NaN comes first."""
    logits = F.linear(x, layer.weight, layer.bias).detach()
    values, indices = logits.sort(dim=-1, descending=True, stable=True)
    return values[..., :k], indices[..., :k]


def clustered(N=4000, d=24, clusters=60):
    """A layer whose rows form clusters, and inputs near some of them."""
    layer = layer_of(N, d)
    centers = torch.randn(clusters, d) * 2
    with torch.no_grad():
        layer.weight.copy_(centers[torch.randint(clusters, (N,))] + 0.3 * torch.randn(N, d))
        layer.bias.normal_()
    return layer, centers[torch.randint(clusters, (300,))] + 0.5 * torch.randn(300, d)


def share_found(found, wanted):
    return (found.unsqueeze(2) == wanted.unsqueeze(1)).any(2).float().mean().item()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("N", "d", "B", "k"),
    [
        (1, 1, 1, 1),
        (5, 3, 2, 5),  # all of them
        (301, 37, 1, 10),
        (301, 128, 3, 7),
        (1000, 16, 21, 300),
        (9001, 33, 37, 10),  # several ranges of rows
        (50, 5, 3000, 4),  # more samples than are packed at a time
        (5000, 700, 70, 3),  # ... likewise, and rows that are shared out
        (70, 5, 0, 2),
    ],
)
def test_exact_is_topk_of_the_logits(N, d, B, k, bias, dtype):
    layer, x = layer_of(N, d, dtype, bias), torch.randn(B, d, dtype=dtype)
    values, indices = layer.predict(x, k)
    logits = F.linear(x, layer.weight, layer.bias).detach()
    assert indices.dtype == torch.int64 and values.dtype == dtype
    assert values.shape == indices.shape == (B, k) and not values.requires_grad
    close = {"rtol": 0, "atol": 32 * torch.finfo(dtype).eps * max(1, d) ** 0.5}
    torch.testing.assert_close(values, logits.topk(k).values, **close)
    torch.testing.assert_close(logits.gather(1, indices), values, **close)
    assert (values.diff() <= 0).all()
    assert all(len(row.unique()) == k for row in indices)


@pytest.mark.parametrize("B", [1, 3, 5, 16, 40])
@pytest.mark.parametrize("dtype", DTYPES)
def test_ties_go_to_the_smaller_index(B, dtype):
    """Small integers: products are exact in any order, and hundreds are equal."""
    layer, x = layer_of(5000, 6, dtype), torch.randint(-1, 2, (B, 6)).to(dtype)
    with torch.no_grad():
        layer.weight.copy_(torch.randint(-1, 2, (5000, 6)))
        layer.bias.copy_(torch.randint(-1, 2, (5000,)))
    for k in (1, 2, 50):
        expected = reference(layer, x, k)
        assert all(map(torch.equal, layer.predict(x, k), expected))


@pytest.mark.parametrize("B", [1, 20])
def test_nan_is_largest_as_in_torch_and_infinities_have_their_place(B):
    layer, x = layer_of(400, 4, bias=True), torch.ones(B, 4)
    with torch.no_grad():
        layer.weight.copy_(torch.randint(-3, 4, (400, 4)))
        layer.bias.zero_()
        layer.bias[[7, 300]] = float("nan")
        layer.bias[12] = float("inf")
        layer.bias[13:300] = -float("inf")
    values, indices = layer.predict(x, 400)
    expected = reference(layer, x, 400)
    assert torch.equal(indices, expected[1])
    torch.testing.assert_close(values, expected[0], equal_nan=True, rtol=0, atol=0)
    assert indices[0, :3].tolist() == [7, 300, 12]
    x[0, 0] = float("nan")  # every logit of this input
    assert layer.predict(x, 3)[1][0].tolist() == [0, 1, 2]


def test_leading_dimensions_and_strides():
    layer = layer_of(200, 8)
    x = torch.randn(8, 3, 5).permute(2, 1, 0)
    assert not x.is_contiguous()
    values, indices = layer.predict(x, 4)
    flat = layer.predict(x.reshape(-1, 8), 4)
    assert values.shape == indices.shape == (5, 3, 4)
    assert torch.equal(indices.view(-1, 4), flat[1])
    assert layer.predict(x[0, 0], 4)[1].shape == (4,)
    layer.eval()
    assert torch.equal(layer.predict(x, 4)[1], indices)


@pytest.mark.parametrize("B", [1, 30, 700])
def test_exact_at_any_number_of_threads(both_thread_counts, B):
    def run():
        return layer_of(20_000, 24).predict(torch.randn(B, 24), 9)

    one, two = both_thread_counts(run)
    assert all(map(torch.equal, one, two))


def test_memory_does_not_grow_with_the_neurons():
    """(B, N) would be 800 MB here; the peak of the process may rise by a tenth of that."""
    layer, x = layer_of(200_000, 4), torch.randn(1000, 4)

    def peak():
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))

    try:
        with open("/proc/self/clear_refs", "w") as reset:
            reset.write("5")
        before = peak()
    except (OSError, StopIteration):
        pytest.skip("peak memory is read from Linux's /proc")
    layer.predict(x, 10)
    assert peak() - before < 80_000


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
    points = torch.cat([layer.weight, layer.bias.unsqueeze(1)], 1).detach()
    count = partition.offsets.diff()
    means = torch.zeros(partition.lists, 25).index_add_(0, list_of, points) / count.unsqueeze(1)
    torch.testing.assert_close(means[:, :24], partition.centers[:, :24])
    torch.testing.assert_close(means[:, 24], partition.center_bias)
    square = (points - means[list_of]).square().sum(1)
    radius = (torch.zeros(partition.lists).index_add_(0, list_of, square) / count).sqrt()
    torch.testing.assert_close(radius, partition.centers[:, 24])
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


@pytest.mark.parametrize(
    ("x", "k", "message"),
    [
        (torch.randn(3, 7), 2, r"input: expected a tensor with last dimension 8.*\(3, 7\)"),
        (torch.randn(()), 2, r"input: .*last dimension 8"),
        ([1.0] * 8, 2, "input: .*got list"),
        (torch.randn(3, 8).double(), 2, r"input: expected torch.float32 on cpu.*float64"),
        (torch.randn(3, 8), 0, "k: expected an int from 1 to 50.*got 0"),
        (torch.randn(3, 8), 51, "k: expected an int from 1 to 50.*got 51"),
        (torch.randn(3, 8), True, "k: expected an int.*got True"),
        (torch.randn(3, 8), 2.0, r"k: expected an int.*got 2\.0"),
    ],
)
def test_refusals(x, k, message):
    layer = layer_of(50, 8)
    for method in (layer.predict, layer.calibrate):
        with pytest.raises(ValueError, match=f"LSHLinear.{method.__name__}: {message}"):
            method(x, k)
    assert layer.calibration is None


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


def test_refusals_of_the_operators():
    x, w, b = torch.randn(2, 4), torch.randn(9, 4), torch.randn(9)
    offsets, rows = torch.tensor([0, 4, 9]), torch.arange(9, dtype=torch.int32)
    probes = torch.tensor([[0], [1]])
    for k in (0, 10):
        with pytest.raises(RuntimeError, match="k: expected 1 to 9"):
            ops.topk_linear(x, w, b, k)
    with pytest.raises(RuntimeError, match="bias: expected shape"):
        ops.topk_linear(x, w, b[:3], 1)
    coded = coded_lists(w, b, offsets, rows)[:2]

    def search(offsets=offsets, rows=rows, coded=coded, probes=probes, k=1, rescored=5):
        return ops.topk_lists(x, w, b, offsets, rows, *coded, probes, k, rescored)

    assert search()[1].tolist() == search(k=4)[1][:, :1].tolist()
    for wrong, message in (
        ({"k": 0}, "k: expected at least 1"),
        ({"k": 3, "rescored": 2}, "rescored: expected at least k"),
        ({"probes": probes + 1}, r"probes: expected values in \[-1, 2\), got 2"),
        ({"probes": probes - 2}, r"probes: expected values in \[-1, 2\), got -2"),
        ({"offsets": offsets + 1}, "list_offsets: expected non-decreasing"),
        ({"rows": rows + 1}, r"list_rows: expected values in \[0, 9\)"),
        ({"rows": rows - 1}, r"list_rows: expected values in \[0, 9\)"),
        ({"coded": (coded[0][:1], coded[1])}, "codes: expected at least 2 blocks"),
        ({"coded": (coded[0], coded[1][:1])}, "terms: expected shape"),
    ):
        with pytest.raises(RuntimeError, match=message):
            search(**wrong)
    with pytest.raises(RuntimeError, match="list_rows: expected values in"):
        coded_lists(w, b, offsets, rows + 1)
    with pytest.raises(RuntimeError, match="list_rows: expected values in"):
        ops.list_centers(w, b, offsets, rows + 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("d", "bias"), [(1, True), (7, False), (128, True), (701, True)])
def test_codes_of_rows(d, bias, dtype):
    """Rows are within half a code's unit of what was coded."""
    weight = torch.randn(60, d, dtype=dtype) * torch.rand(60, 1, dtype=dtype)
    weight[3] = 0
    shift = torch.randn(60, dtype=dtype) if bias else None
    rows = torch.randperm(60).int()
    offsets = torch.tensor([0, 16, 16, 33, 60])
    codes, terms, place = coded_lists(weight, shift, offsets, rows)
    codes, terms = codes[:5], terms[:5]
    assert codes.shape == (5, (d + 1) // 2, 16, 2) and codes.abs().max() == 127
    places = torch.cat([torch.arange(16), torch.arange(16, 33), torch.arange(48, 75)])
    coded = codes.permute(0, 2, 1, 3).reshape(80, -1)[places, :d]
    scale, found = terms.transpose(0, 1).reshape(2, 80)[:, places]
    error = (coded * scale.unsqueeze(1) - weight[rows.long()]).abs()
    assert (error <= 0.51 * scale.unsqueeze(1)).all()
    torch.testing.assert_close(found, shift[rows.long()].float() if bias else torch.zeros(60))
    assert torch.equal(place[rows.long()].long(), places)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
def test_recoded_rows_are_as_if_coded_anew(bias, dtype):
    weight, rows = torch.randn(50, 9, dtype=dtype), torch.randperm(50)[:45].int()
    shift = torch.randn(50, dtype=dtype) if bias else None
    offsets = torch.tensor([0, 20, 45])
    coded = coded_lists(weight, shift, offsets, rows)
    changed = rows[:12].long().sort().values
    weight[changed] *= -3
    if bias:
        shift[changed] += 1
    ops.recode_rows_(*coded, weight, shift, changed)
    for own, fresh in zip(coded, coded_lists(weight, shift, offsets, rows), strict=True):
        assert torch.equal(own, fresh)
    stray = (coded[2] < 0).nonzero().flatten()[:1]
    for wrong, message in ((stray, "places: expected values in"), (changed.flip(0), "increasing")):
        with pytest.raises(RuntimeError, match=message):
            ops.recode_rows_(*coded, weight, shift, wrong)


def test_lists_that_are_short_or_capped():
    """Where a sample's lists hold fewer than k rows the rest is -1; of a list longer than the cap only whole
    blocks are looked at, from any of them on, around the end."""
    weight, x = torch.randn(90, 6), torch.randn(3, 6)
    rows, offsets = torch.randperm(90).int(), torch.tensor([0, 3, 3, 90])
    coded = coded_lists(weight, None, offsets, rows)[:2]
    probes = torch.tensor([[0, 1], [1, -1], [-1, 0]])
    values, ids = ops.topk_lists(x, weight, None, offsets, rows, *coded, probes, 5, 9)
    assert (ids >= 0).sum(1).tolist() == [3, 0, 3] and (ids[:, 3:] == -1).all()
    assert (values[ids < 0] == -float("inf")).all()
    place = torch.empty(90, dtype=torch.int64)
    place[rows.long()] = torch.arange(90) - 3
    seen = set()
    for seed in range(30):
        lists = (offsets, rows, *coded, torch.full((3, 1), 2))
        _, ids = ops.topk_lists(x, weight, None, *lists, 90, 90, 20, seed)
        assert ((ids >= 0) == (ids[:1] >= 0)).all()
        blocks = place[ids[0][ids[0] >= 0]] // 16
        first = tuple(blocks.unique().tolist())
        assert len(first) == 2 and (first[1] - first[0]) in (1, 5)
        assert len(blocks) == sum(min(16, 87 - 16 * b) for b in first)
        seen.add(first)
    assert len(seen) == 6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [1, 2, 3, 9, 70])
def test_best_of_lists_where_all_are_rescored(batch, dtype):
    """Then codes decide nothing: the exact best of the lists' rows, in any list length."""
    N, d, k = 700, 33, 6
    weight, bias = torch.randn(N, d, dtype=dtype), torch.randn(N, dtype=dtype)
    x = torch.randn(batch, d, dtype=dtype)
    rows = torch.randperm(N).int()
    offsets = torch.tensor([0, 5, 5, 37, 100, N])  # the last is longer than what a thread takes
    probes = torch.stack([torch.randperm(5)[:4] for _ in range(batch)])
    coded = coded_lists(weight, bias, offsets, rows)[:2]
    values, indices = ops.topk_lists(x, weight, bias, offsets, rows, *coded, probes, k, N)
    list_of = torch.empty(N, dtype=torch.int64)
    list_of[rows.long()] = torch.arange(5).repeat_interleave(offsets.diff())
    allowed = (list_of.unsqueeze(0).unsqueeze(2) == probes.unsqueeze(1)).any(2)
    logits = F.linear(x, weight, bias).masked_fill(~allowed, -float("inf"))
    expected = logits.topk(k)
    torch.testing.assert_close(values, expected.values)
    assert torch.equal(indices, expected.indices)


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_scores_do_not_depend_on_what_else_is_scored(weight_dtype):
    """Which of the rescored rows stands where is left to chance between threads: the same bits, however
    many there are."""
    torch.manual_seed(0)
    N, d, B = 300, 37, 20
    dtype = torch.float64 if weight_dtype == torch.float64 else torch.float32
    x, weight = torch.randn(B, d, dtype=dtype), torch.randn(N, d).to(weight_dtype)
    offsets, rows = torch.tensor([0, N]), torch.randperm(N).int()
    codes, terms, _ = coded_lists(weight.to(dtype), None, offsets, rows)
    probes = torch.zeros(B, 1, dtype=torch.int64)
    arguments = (x, weight, None, offsets, rows, codes, terms, probes)
    values, ids = ops.topk_lists(*arguments, 4, N)
    for rescored in (29, 30, 31, 32, 33):  # all find the best four
        more, same = ops.topk_lists(*arguments, 4, rescored)
        assert torch.equal(same, ids) and torch.equal(more, values)


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


class Best(torch.nn.Module):
    def __init__(self, head, exact):
        super().__init__()
        self.head, self.exact = head, exact

    def forward(self, x):
        return self.head.predict(x, 5, exact=self.exact)


def test_export_of_predict():
    layer, x = clustered(N=300)
    model = Best(layer, True)
    program = torch.export.export(
        model, (x[:7],), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},)
    )
    assert set(program.state_dict) == {"head.weight", "head.bias"}
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    for module in (program.module(), torch.export.load(buffer).module()):
        for size in (2, 60):
            assert all(map(torch.equal, module(x[:size]), model(x[:size])))
    fixed = torch.export.export(model, (x[:1],)).module()
    assert all(map(torch.equal, fixed(x[:1]), model(x[:1])))


def test_compiled_predict():
    layer, x = clustered(N=300)
    compiled = torch.compile(Best(layer, True), fullgraph=True, backend="aot_eager")
    assert all(map(torch.equal, compiled(x), layer.predict(x, 5)))


def test_log_prob():
    layer = layer_of(60, 8)
    x = torch.randn(3, 2, 8, requires_grad=True)
    found = layer.log_prob(x)
    assert found.shape == (3, 2, 60)
    torch.testing.assert_close(found.exp().sum(-1), torch.ones(3, 2))
    expected = F.log_softmax(F.linear(x, layer.weight, layer.bias), -1)
    torch.testing.assert_close(found, expected)
    wanted, factors = [x, *layer.parameters()], torch.randn(3, 2, 60)
    gradients = (torch.autograd.grad((z * factors).sum(), wanted) for z in (found, expected))
    torch.testing.assert_close(*gradients)
    with pytest.raises(ValueError, match=r"LSHLinear\.log_prob: input"):
        layer.log_prob(torch.randn(3, 7))


@pytest.mark.parametrize("layer_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_log_prob_of_bfloat16_is_float32(layer_dtype, autocast):
    layer = layer_of(60, 8).to(layer_dtype)
    x = torch.randn(5, 8).bfloat16().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        found = layer.log_prob(x)
    exact = copy.deepcopy(layer).float()
    wanted = exact.log_prob(x.detach().float())
    assert found.dtype == torch.float32
    # only parameters in bfloat16 round the logits
    tolerance = (
        1e-6
        if layer_dtype == torch.float32
        else 2**-8 * exact.eval()(x.detach().float()).abs().max().item()
    )
    torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance)
    torch.testing.assert_close(found.exp().sum(-1), torch.ones(5))
    found[:, 0].sum().backward()
    assert x.grad.dtype == torch.bfloat16 and layer.weight.grad.dtype == layer_dtype


def test_prediction_under_autocast_is_that_without():
    layer, x = clustered(N=300)
    narrow = x.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = layer.predict(narrow, 5)
        assert torch.equal(layer.log_prob(x), layer.log_prob(x.double()))
    assert all(map(torch.equal, found, layer.predict(narrow.float(), 5)))
    with pytest.raises(ValueError, match=r"log_prob: input: expected torch\.float32"):
        layer.log_prob(x.double())
