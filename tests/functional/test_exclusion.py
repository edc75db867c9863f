"""Neurons that do not compete in the loss of a row, in both patterns, losses and corrections."""

import math

import loss_problems as problems
import pytest
import reference
import torch
import torch.nn.functional as F
from loss_problems import (
    ALL_ACTIVE,
    LISTS,
    PATTERNS,
    assert_same,
    binary,
    dense_active_set,
    gradients,
    padded,
    sampled,
    small_layer,
    z_scores,
)
from refusals import B, D, N, make, refused

import slide_torch
from slide_torch import LSHLinear, LSHOptions
from slide_torch.sampling import step
from slide_torch.sampling.draw import draw_active_set
from slide_torch.sampling.targets import as_labels

CORRECTIONS = ["none", "importance"]


def excluded_lists(target, neurons, count=5, seed=3):
    """Lists with padding and repetitions, without the row's labels, and their mask (B, N)."""
    batch = target.shape[0]
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(neurons, (batch, count), generator=generator)
    ids[:, 1] = ids[:, 0]
    ids[torch.rand(batch, count, generator=generator) < 0.2] = -100
    labels = target.view(batch, -1)
    ids[(ids[:, :, None] == labels[:, None]).any(2)] = -100
    ids[2] = -100
    mask = torch.zeros(batch, neurons, dtype=torch.bool)
    for row, excluded in enumerate(ids.tolist()):
        mask[row, [i for i in excluded if i >= 0]] = True
    return ids, mask


def sampled_problem(pattern, correction, neurons, batch):
    """A case with some neurons active, and several labels a row, of which one row has none."""
    options = dict(pattern=pattern, correction=correction, budget=8, tail=60, K=3, L=6)
    case = problems.make(neurons, 16, batch, **options)
    case.tables.rebuild(case.weight, case.bias)
    lists = torch.stack([case.y, (case.y + 3) % neurons, case.y.flip(0)], 1)
    lists[3] = -100
    return case, lists


@pytest.mark.parametrize("kind", ALL_ACTIVE)
def test_equals_torch_without_these_classes(kind):
    case = problems.make(**ALL_ACTIVE[kind])
    target = case.y.clone()
    target[4] = -100
    ids, mask = excluded_lists(target, 40)
    logits = F.linear(case.x, case.weight, case.bias)
    weight = torch.rand(40, dtype=torch.float64) + 0.5
    for how in ({}, {"weight": weight}, {"reduction": "sum"}, {"reduction": "none"}):
        theirs = F.cross_entropy(logits.masked_fill(mask, -math.inf), target, **how)
        assert_same(sampled(case, target, exclude=ids, **how), theirs, case)
    nothing = torch.full((9,), -100)
    assert sampled(case, nothing, exclude=ids).isnan()
    assert all((g == 0).all() for g in gradients(sampled(case, nothing, exclude=ids), case))

    lists = padded(LISTS, 4)
    ids, mask = excluded_lists(lists, 40)
    ones = torch.zeros(9, 40, dtype=torch.float64)
    for row, labels in enumerate(LISTS):
        ones[row, labels] = 1
    positive = torch.rand(40, dtype=torch.float64) + 0.5
    for how in (
        {},
        {"weight": weight},
        {"pos_weight": positive},
        {"weight": weight, "pos_weight": positive},
    ):
        each = F.binary_cross_entropy_with_logits(logits, ones, reduction="none", **how)
        ours = binary(case, lists, exclude=ids, **how)
        assert_same(ours, each.masked_fill(mask, 0).mean(), case)


@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_equals_reference_over_the_set(pattern, correction):
    neurons, batch = 200, 9
    case, lists = sampled_problem(pattern, correction, neurons, batch)
    logits = F.linear(case.x, case.weight, case.bias)
    negatives = torch.arange(20, 30)
    for target in (case.y, lists):
        ids, mask = excluded_lists(target, neurons, count=60)
        labels = as_labels(target, torch.Size([batch]), neurons, torch.float64, -100)
        active = draw_active_set(case.tables, case.x, labels, negatives=negatives[None], seed=7)
        found, log_weight, share = dense_active_set(active, labels, batch, neurons, torch.float64)
        assert (mask & found).any() and (mask & ~found).any() and (mask[:, 20:30]).any()
        corrected = (logits + log_weight).masked_fill(~found | mask, -math.inf)
        how = dict(exclude=ids, negatives=negatives)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(step, "draw_seed", lambda source: 7)  # the seed of the set above
            decoupled = sampled(case, target, reduction="none", decoupled=True, **how)
            assert_same(
                decoupled, reference.decoupled_cross_entropy(corrected, share, share > 0), case
            )
            if target is case.y:
                one = sampled(case, target, reduction="none", **how)
                assert_same(one, F.cross_entropy(corrected, target, reduction="none"), case)
            each = F.binary_cross_entropy_with_logits(
                logits, (share > 0).double(), reduction="none"
            )
            theirs = (each * log_weight.exp() * (found & ~mask)).sum()
            assert_same(binary(case, target, reduction="sum", **how), theirs, case)


@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_margin_excludes_what_scores_above_the_label(pattern, correction):
    """As the same classes in ``exclude``, beside others there."""
    neurons, batch = 200, 9
    case, lists = sampled_problem(pattern, correction, neurons, batch)
    lists[4, 1:] = -100
    logits = F.linear(case.x, case.weight, case.bias).detach() * 0.5
    for target, how in ((case.y, {}), (lists, {"decoupled": True})):
        labels = torch.zeros(batch, neurons + 1, dtype=torch.bool)
        labels.scatter_(1, target.view(batch, -1) % (neurons + 1), True)  # padding: the last column
        labels = labels[:, :neurons] & (target.view(batch, -1) >= 0).any(1, keepdim=True)
        best = logits.masked_fill(~labels, -math.inf).amax(1, keepdim=True)
        above = (logits > best + 0.05) & ~labels & best.isfinite()
        ids, mask = excluded_lists(target, neurons)
        both = above | mask
        rows = [row.nonzero().flatten().tolist() for row in both]
        assert above.sum() > 20 and (mask & ~above).any()
        exclude = padded(rows, max(map(len, rows)))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(step, "draw_seed", lambda source: 7)
            how = dict(how, reduction="none", scale=0.5)
            ours = sampled(case, target, margin=0.05, exclude=ids, **how)
            assert_same(ours, sampled(case, target, exclude=exclude, **how), case)
            alone = sampled(case, target, margin=0.05, **how)
            plain = sampled(case, target, **how)
            assert (alone <= plain).all() and (alone < plain).any()
            assert torch.equal(sampled(case, target, margin=1e6, **how), plain)


@pytest.mark.parametrize("margin", [math.nan, math.inf, "1", True])
def test_a_margin_is_a_finite_number(margin):
    case = problems.make()
    with pytest.raises(ValueError, match=r"margin: expected a finite number"):
        sampled(case, case.y, margin=margin)
    with pytest.raises(NotImplementedError, match=r"label_smoothing: .*margin"):
        sampled(case, case.y, margin=0.0, label_smoothing=0.1)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_importance_correction_estimates_the_other_classes(pattern):
    """The sum over classes that are neither excluded nor the label is estimated without bias."""
    case = small_layer(pattern, 1.5, correction="importance")
    logits = F.linear(case.x, case.weight, case.bias).detach()
    own = logits.gather(1, case.y[:, None])
    ids = logits.topk(12).indices
    ids[ids == case.y[:, None]] = -100
    left = logits.clone()
    for row, excluded in enumerate(ids.tolist()):
        left[row, [i for i in excluded if i >= 0]] = -math.inf
    left.scatter_(1, case.y[:, None], -math.inf)
    losses = []
    for seed in range(1000):
        generator = torch.Generator().manual_seed(seed)
        loss = sampled(case, case.y, reduction="none", exclude=ids, generator=generator)
        losses.append(loss.detach())
    z = z_scores(torch.stack(losses).expm1(), (left.logsumexp(1) - own[:, 0]).exp())
    assert (z.abs() < 3.5).all() and (z**2).mean() < 3


@pytest.mark.parametrize("pattern", PATTERNS)
def test_same_bits_at_any_number_of_threads(pattern):
    options = dict(pattern=pattern, correction="importance", budget=12, tail=30, K=3, L=6)
    case = problems.make(300, 16, 70, dtype=torch.float32, **options)
    ids, _ = excluded_lists(case.y, 300, count=60)
    case.tables.rebuild(case.weight, case.bias)
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results = []
        for loss in (sampled, binary):
            generator = torch.Generator().manual_seed(7)
            value = loss(case, case.y, exclude=ids, generator=generator, training=False)
            results += [value, *gradients(value, case)]
        found.append(results)
    torch.set_num_threads(1)
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_nothing_excluded_changes_nothing(pattern):
    """Nor do lists of neurons that are not active: bits of the softmax."""
    layer, x, y = make(pattern=pattern, correction="importance")
    losses = []
    for exclude in (None, torch.full((B, 2), -100), y[:, None][:, :0]):
        torch.manual_seed(0)
        losses.append(F.cross_entropy(layer(x, exclude=exclude), y))
    assert all(torch.equal(losses[0], loss) for loss in losses)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_layers(pattern):
    """Lists follow views of the logits; active logits lack what is excluded; fused updates take them."""
    layer, *_ = make(pattern=pattern)
    x, y = torch.randn(2, 3, D), torch.randint(N, (2, 3))
    ids, mask = excluded_lists(y.view(6), N, count=9)
    ids = ids.view(2, 3, 9)
    found = []
    for logits, labels in (
        (layer(x, exclude=ids)[:, 1], y[:, 1]),
        (layer(x[:, 1], exclude=ids[:, 1]), y[:, 1]),
    ):
        torch.manual_seed(1)
        found.append(F.cross_entropy(logits, labels))
    assert torch.equal(*found)
    dense = layer(x.view(6, D), exclude=ids.view(6, 9)).to_dense()
    assert (dense[mask] == -math.inf).all() and dense.isfinite().any()
    chances = layer(x.view(6, D), exclude=ids.view(6, 9)).softmax(-1)
    assert (chances[mask] == 0).all()
    one = layer(x, exclude=ids)[1, 2].unsqueeze(0)
    torch.manual_seed(1)
    loss = F.cross_entropy(one, y[1, 2:])
    torch.manual_seed(1)
    assert torch.equal(loss, F.cross_entropy(layer(x[1, 2:], exclude=ids[1, 2:]), y[1, 2:]))


def test_fused_updates():
    weights = []
    for fuse in (False, True):
        torch.manual_seed(0)
        layer = LSHLinear(D, N, sparse=True, options=LSHOptions(budget=8, tail=9, K=2, L=3))
        optimizer = slide_torch.optim.Adam(layer.parameters(), lr=0.1, fuse_backward=fuse)
        x, y = torch.randn(B, D), torch.randint(N, (B,))
        ids, _ = excluded_lists(y, N, count=9)
        F.cross_entropy(layer(x, exclude=ids), y).backward()
        optimizer.step()
        weights.append(layer.weight.detach())
    torch.testing.assert_close(*weights)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_refusals(pattern):
    layer, x, y = make(pattern=pattern, correction="importance")
    wrong = [
        (y[:, None], ValueError, r"exclude: expected no label of the row itself, .* of row 0 \(6 "),
        (torch.tensor([3]), ValueError, r"exclude: expected shape \(6, 'M'\) padded .* got \(1,\)"),
        (torch.full((B, 1), N), ValueError, r"exclude: expected class indices in \[0, 50\)"),
        (torch.zeros(B, 1), ValueError, r"exclude: expected int64 class indices, got torch.float32"),
    ]  # fmt: skip
    for ids, error, message in wrong:
        refused(layer, lambda: F.cross_entropy(layer(x, exclude=ids), y), error, message)  # noqa: B023
        refused(
            layer,
            lambda: F.binary_cross_entropy_with_logits(layer(x, exclude=ids), y),  # noqa: B023
            error,
            message,
        )
    ids = ((y + 1) % N)[:, None]
    lists = torch.stack([y, (y + 2) % N], 1)
    refused(
        layer,
        lambda: F.cross_entropy(layer(x, exclude=ids), lists),
        NotImplementedError,
        "exclude, margin: expected at most one label a row with decoupled=False, got 2: use decoupled=True",
    )
    refused(
        layer,
        lambda: F.cross_entropy(layer(x, exclude=ids), y, label_smoothing=0.1),
        NotImplementedError,
        "label_smoothing: expected 0.0 with exclude",
    )
    hidden = LSHLinear(D, N, output="dense")
    with pytest.raises(NotImplementedError, match=r"exclude: expected None with output='dense'"):
        hidden(x, exclude=ids)


def test_compiled_graphs_refuse():
    layer, x, y = make()
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x, ids: F.cross_entropy(layer(x, exclude=ids), y), fullgraph=True, backend="eager"
    )
    with pytest.raises(Exception, match=r"exclude: expected None under torch\.compile"):
        compiled(x, ((y + 1) % N)[:, None])
    torch._dynamo.reset()
