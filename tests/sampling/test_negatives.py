"""Negatives of the caller's own: always active, in both patterns, losses and corrections."""

import copy
import math
from functools import partial

import loss_problems as problems
import pytest
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
from torch import nn

import slide_torch
from slide_torch import LSHLinear, LSHOptions
from slide_torch.sampling import step
from slide_torch.sampling.draw import draw_active_set
from slide_torch.sampling.targets import as_labels

TABLES = {
    "no_tables": {"budget": 0},
    "simhash": {"family": "simhash", "K": 3, "L": 6},
    "reranked": {"family": "simhash", "K": 3, "L": 6, "rerank": 40},
    "kmeans_searched": {"family": "kmeans", "K": 5, "L": 1, "probes": 2, "rerank": 40},
    "exact_candidates": {"family": "exact"},
    "batch_budget": {"family": "simhash", "K": 3, "L": 6, "batch_budget": 10},
}


def own_negatives(shape, neurons, seed=5):
    """Lists with padding, repetitions and an empty row."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(neurons, shape, generator=generator)
    ids[torch.rand(shape, generator=generator) < 0.3] = -100
    if len(shape) > 1 and shape[0] > 1:
        ids[..., 1] = ids[..., 0]
        ids[-1] = -100
    return ids


def mask_of(negatives, batch, neurons, pattern):
    """Which neurons they make active for which sample, (B, N)."""
    mask = torch.zeros(batch, neurons, dtype=torch.bool)
    for row, ids in enumerate(negatives.expand(batch, -1).tolist()):
        mask[row, [i for i in ids if i >= 0]] = True
    return mask if pattern == "per_sample" else mask.any(0).expand(batch, -1)


@pytest.mark.parametrize("kind", ALL_ACTIVE)
def test_nothing_changes_where_every_neuron_is_active(kind):
    case = problems.make(**ALL_ACTIVE[kind])
    target = padded(LISTS, 4)
    for shape in ((6,), (len(LISTS), 6)):
        negatives = own_negatives(shape, 40)
        for loss in (sampled, binary):
            assert_same(loss(case, target, negatives=negatives), loss(case, target), case)


@pytest.mark.parametrize("correction", ["none", "importance"])
@pytest.mark.parametrize("tail", ["uniform", "log_uniform"])
@pytest.mark.parametrize("tables", TABLES)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_active_sets_hold_them_on_top(pattern, tables, tail, correction):
    """The set is the union of what it is without them with them; the tail's weights follow from what is
    active for certain."""
    if pattern == "per_sample" and tables == "batch_budget":
        pytest.skip("an option of the shared pattern")
    neurons, batch, drawn = 200, 9, 30
    how = dict(pattern=pattern, **{"budget": 8, **TABLES[tables]})
    tailed = dict(tail=drawn, tail_distribution=tail, correction=correction)
    case = problems.make(neurons, 16, batch, **how, **tailed)
    without_tail = problems.make(neurons, 16, batch, **how, tail=0)
    for problem in (case, without_tail):
        problem.tables.rebuild(case.weight, case.bias, generator=torch.Generator().manual_seed(0))
    target = torch.stack([case.y, case.y.flip(0), case.y], 1)
    target[3] = -100
    labels = as_labels(target, torch.Size([batch]), neurons, torch.float64, -100)

    def masks(problem, **more):
        active = draw_active_set(
            problem.tables, case.x, labels, weight=case.weight, bias=case.bias, seed=7, **more
        )
        at_labels = active.rows if pattern == "shared" else active.active
        assert torch.equal(at_labels[active.label_places].long(), labels.ids)
        return dense_active_set(active, labels, batch, neurons, torch.float64)[:2]

    for shape in ((1, 12), (batch, 12)):
        negatives = own_negatives(shape, neurons)
        theirs = mask_of(negatives, batch, neurons, pattern)
        found, log_weight = masks(case, negatives=negatives)
        certain, _ = masks(without_tail, negatives=negatives)
        assert torch.equal(found, masks(case)[0] | theirs)
        assert torch.equal(certain, masks(without_tail)[0] | theirs)
        assert (theirs & ~masks(case)[0]).any() and not found.all()
        in_tail = found & ~certain
        assert (log_weight[~in_tail] == 0).all()
        if correction == "none":
            assert (log_weight == 0).all()
        elif tail == "uniform":
            stands_for = (neurons - certain.sum(1)) / in_tail.sum(1)
            expected = stands_for.double().log()[:, None].expand_as(log_weight)
            torch.testing.assert_close(log_weight[in_tail], expected[in_tail])
        else:
            _, plain = masks(case)
            both = in_tail & (plain != 0)
            assert both.any() and torch.equal(log_weight[both], plain[both])


@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize("correction", ["none", "importance"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_losses_equal_those_over_the_set(pattern, correction, by_row):
    neurons, batch = 200, 9
    options = dict(pattern=pattern, correction=correction, budget=8, tail=20, K=3, L=6)
    case = problems.make(neurons, 16, batch, **options)
    case.tables.rebuild(case.weight, case.bias)
    negatives = own_negatives((batch, 12) if by_row else (12,), neurons)
    labels = as_labels(case.y, torch.Size([batch]), neurons, torch.float64, -100)
    active = draw_active_set(case.tables, case.x, labels, negatives=negatives.view(-1, 12), seed=7)
    mask, log_weight, target = dense_active_set(active, labels, batch, neurons, torch.float64)
    logits = F.linear(case.x, case.weight, case.bias)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step, "draw_seed", lambda source: 7)  # the seed of the set above
        softmax = sampled(case, case.y, negatives=negatives, reduction="none")
        ones = binary(case, case.y, negatives=negatives, reduction="sum")
    expected = F.cross_entropy(
        (logits + log_weight).masked_fill(~mask, -math.inf), case.y, reduction="none"
    )
    assert_same(softmax, expected, case)
    each = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    assert_same(ones, (each * log_weight.exp() * mask).sum(), case)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_importance_correction_stays_unbiased(pattern):
    """The estimate of the sum over classes other than the label is unbiased exactly, and so is binary cross
    entropy. Negatives counted with the tail, or twice, are far off: they have the largest logits."""
    case = small_layer(pattern, 1.5, correction="importance")
    logits = F.linear(case.x, case.weight, case.bias).detach()
    negatives = logits.topk(8).indices
    negatives[0, 3:] = -100
    own = logits.gather(1, case.y[:, None])[:, 0]
    others = logits.scatter(1, case.y[:, None], -math.inf).logsumexp(1)
    ones = F.one_hot(case.y, 60).double()
    truth = F.binary_cross_entropy_with_logits(logits, ones, reduction="sum")
    losses, binary_losses = [], []
    for seed in range(1000):
        generator = torch.Generator().manual_seed(seed)
        how = dict(negatives=negatives, generator=generator)
        losses.append(sampled(case, case.y, reduction="none", **how).detach())
        binary_losses.append(binary(case, case.y, reduction="sum", **how).detach())
    z = z_scores(torch.stack(losses).expm1(), (others - own).exp())
    assert (z.abs() < 3.5).all() and (z**2).mean() < 3
    assert z_scores(torch.stack(binary_losses)[:, None], truth).abs() < 3.5


@pytest.mark.parametrize("pattern", PATTERNS)
def test_same_bits_at_any_number_of_threads(pattern):
    options = dict(pattern=pattern, correction="importance", budget=12, tail=30, K=3, L=6)
    case = problems.make(300, 16, 70, dtype=torch.float32, **options)
    negatives = own_negatives((70, 20), 300)
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        case.tables.invalidate()
        results = []
        for loss in (sampled, binary):
            generator = torch.Generator().manual_seed(7)
            value = loss(case, case.y, negatives=negatives, generator=generator)
            results += [value, *gradients(value, case)]
        found.append(results)
    torch.set_num_threads(1)
    assert all(map(torch.equal, *found))


# --- layers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", PATTERNS)
def test_layers_take_them_along_views(pattern):
    """Lists of rows follow reshapes and slices of the logits; a list of the batch stays one."""
    layer, *_ = make(pattern=pattern)
    x, y = torch.randn(2, 3, D), torch.randint(N, (2, 3))
    by_row, of_batch = own_negatives((2, 3, 5), N), own_negatives((7,), N)
    views = {
        "whole": lambda t: t,
        "reshape": lambda t: t.reshape(-1, t.shape[-1]),
        "flatten": lambda t: t.flatten(0, 1),
        "slice": lambda t: t[1:, 1],
        "row": lambda t: t[0, 2].unsqueeze(0),
    }
    for view in views.values():
        for negatives in (by_row, of_batch):
            own = view(negatives) if negatives is by_row else negatives
            labels = view(y[..., None])[..., 0]
            losses = []
            for logits in (view(layer(x, negatives=negatives)), layer(view(x), negatives=own)):
                torch.manual_seed(3)
                losses.append(F.cross_entropy(logits.flatten(0, -2), labels.flatten()))
            assert torch.equal(*losses)


def test_active_logits_hold_them():
    layer, x, _ = make(pattern="per_sample")
    negatives = own_negatives((B, 4), N)
    dense = layer(x, negatives=negatives).to_dense()
    mine = mask_of(negatives, B, N, "per_sample")
    assert dense[mine].isfinite().all() and (dense == -math.inf).any()
    kept = negatives.clone()
    logits = layer(x, negatives=negatives)
    negatives.fill_(0)  # a buffer that is used again
    torch.manual_seed(0)
    found = logits.to_dense()
    torch.manual_seed(0)
    assert torch.equal(found, layer(x, negatives=kept).to_dense())


def test_no_negatives_are_none():
    layer, x, y = make(correction="importance")
    losses = []
    for negatives in (None, y[:0], y[:, None][:, :0], torch.full((B, 2), -100)):
        torch.manual_seed(0)
        losses.append(F.cross_entropy(layer(x, negatives=negatives).reshape(-1, N), y))
    assert all(torch.equal(losses[0], loss) for loss in losses)
    empty = F.cross_entropy(layer(x[:0], negatives=y[:0, None]), y[:0], reduction="sum")
    assert empty == 0


def test_eval_needs_none():
    layer, x, _ = make()
    layer.eval()
    assert torch.equal(layer(x, negatives=torch.tensor([3])), layer(x))


class _Model(nn.Module):
    def __init__(self, pattern):
        super().__init__()
        options = LSHOptions(budget=6, tail=8, K=3, L=4, pattern=pattern, correction="importance")
        self.head = LSHLinear(D, N, options=options)

    def forward(self, x, y, negatives):
        return F.cross_entropy(self.head(x, negatives=negatives), y)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_compiled_graphs_take_them(pattern):
    torch._dynamo.reset()
    torch.manual_seed(0)
    eager = _Model(pattern)
    model = copy.deepcopy(eager)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x, y, negatives = torch.randn(B, D), torch.randint(N, (B,)), own_negatives((B, 4), N)
    for mode, module in ((compiled, model), (eager, eager)):
        torch.manual_seed(1)
        for _ in range(2):
            loss = mode(x, y, negatives)
            loss.backward()
        module.found = [loss.detach(), *(p.grad for p in module.parameters())]
    torch._dynamo.reset()
    assert all(map(torch.equal, model.found, eager.found))


# --- refusals -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize(
    "wrong, message",
    [
        (torch.tensor([N]), r"negatives: expected class indices in \[0, 50\) or -100 .* got 50"),
        (torch.tensor([[-1, 2]] * B), r"negatives: expected class indices in .* got -1 \(6 such"),
        (torch.tensor([1.0]), r"negatives: expected int64 class indices, got torch.float32"),
        (torch.tensor([1], dtype=torch.int32), r"negatives: expected int64 .* got torch.int32"),
        (torch.zeros(B + 1, 2).long(), r"negatives: expected shape \(M,\) .*'M'\).* got \(7, 2\)"),
        (torch.tensor(3), r"negatives: expected shape .* got \(\)"),
        ([1, 2], r"negatives: expected a strided CPU tensor, got list"),
        (torch.tensor([[1.0]] * B).to_sparse().long(), r"negatives: expected a strided CPU tensor"),
    ],
)
def test_wrong_lists_are_refused(pattern, wrong, message):
    layer, x, y = make(pattern=pattern)
    refused(layer, lambda: F.cross_entropy(layer(x, negatives=wrong), y), ValueError, message)
    refused(layer, lambda: layer(x, negatives=wrong).to_dense(), ValueError, message)
    for loss in (
        slide_torch.functional.lsh_linear_cross_entropy,
        slide_torch.functional.lsh_linear_binary_cross_entropy,
    ):
        arguments = dict(linear_bias=layer.bias, tables=layer.tables, negatives=wrong)
        refused(layer, partial(loss, x, layer.weight, y, **arguments), ValueError, message)


def test_hidden_layers_have_none():
    layer = LSHLinear(D, N, output="dense")
    with pytest.raises(NotImplementedError, match=r"negatives: expected None with output='dense'"):
        layer(torch.randn(B, D), negatives=torch.tensor([1]))
