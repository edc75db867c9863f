"""What holds for every loss: empty batches, and the rest of torch."""

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from loss_problems import (
    PATTERNS,
    binary,
    dense_binary,
    gradients,
    make,
    sampled,
)

from slide_torch import LSHLinear, LSHOptions

# --- no samples, or none with a label -----------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("loss", ["plain", "smoothed", "decoupled", "binary"])
@pytest.mark.parametrize("tail", ["uniform", "log_uniform"])
@pytest.mark.parametrize("correction", ["none", "importance", "exact"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_empty_batches_and_ignored_rows_equal_torch(pattern, correction, tail, loss, reduction):
    if correction == "exact":
        options = dict(pattern=pattern, budget=40)
    else:
        options = dict(pattern=pattern, correction=correction, budget=6, tail=6, K=2, L=2)
        options["tail_distribution"] = tail
    refused = loss == "smoothed" and pattern == "per_sample" and correction == "none"
    if refused or (loss == "binary" and reduction == "none"):
        return
    if tail == "log_uniform" and correction != "importance":
        return
    extra = dict(label_smoothing=0.1) if loss == "smoothed" else {}
    ours_only = dict(decoupled=True) if loss == "decoupled" else {}
    for batch in (0, 3):
        case = make(B=batch, **options)
        nothing = torch.full((batch,), -100)
        targets = [nothing, nothing[:, None].expand(batch, 2), nothing.new_empty((batch, 0))]
        if batch == 0:
            no_row = torch.empty(0, 40, dtype=torch.float64)
            targets += [no_row, no_row.to_sparse_csr()]
        logits = F.linear(case.x, case.weight, case.bias)
        for target in targets:
            if loss == "binary":
                ours = binary(case, target, reduction=reduction)
                theirs = dense_binary(case, torch.zeros_like(logits), reduction=reduction)
            else:
                ours = sampled(case, target, reduction=reduction, **extra, **ours_only)
                theirs = F.cross_entropy(logits, nothing, reduction=reduction, **extra)
            if batch == 0 or loss != "binary":
                torch.testing.assert_close(ours, theirs, equal_nan=True)
            else:  # only the active neurons count
                assert ours.isfinite()
            found = gradients(ours, case)
            if reduction != "mean" and loss != "binary":
                assert not any(gradient.any() for gradient in found)


# --- both, with the rest of torch -----------------------------------------------------------------

LOSSES = {
    "binary": lambda z, y: z.binary_cross_entropy_with_logits(y),
    "smoothed": lambda z, y: F.cross_entropy(z, y, label_smoothing=0.1),
    "decoupled": lambda z, y: z.cross_entropy(torch.stack([y, y.flip(0)], 1), decoupled=True),
}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("family", ["simhash", "kmeans"])
def test_checkpointing_recomputes_the_same_step(loss, family):
    results = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        own = dict(rerank=20, rebuild_every=1) if family == "kmeans" else {}
        options = LSHOptions(family=family, budget=10, tail=20, K=3, L=2, rehash_every=2, **own)
        layer = LSHLinear(16, 300, options=options, sparse=True)
        step = lambda x, y, layer=layer: LOSSES[loss](layer(x), y)  # noqa: E731
        x, y = torch.randn(6, 16, requires_grad=True), torch.arange(6)
        for _ in range(5):
            layer.weight.grad = None
            if checkpointed:
                value = torch.utils.checkpoint.checkpoint(step, x, y, use_reentrant=False)
            else:
                value = step(x, y)
            value.backward()
        stats = layer.stats()
        stats.pop("upkeep_seconds")
        results.append((value, layer.weight.grad.to_dense(), x.grad, stats))
    (*plain, plain_stats), (*again, again_stats) = results
    assert all(map(torch.equal, plain, again)) and plain_stats == again_stats
    assert plain_stats["steps"] == 5


@pytest.mark.parametrize("loss", LOSSES)
def test_autocast_computes_at_full_precision(loss):
    layer = LSHLinear(16, 40, options=LSHOptions(budget=40))
    x, y = torch.randn(6, 16).bfloat16().requires_grad_(), torch.arange(6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = LOSSES[loss](layer(x), y)
    assert value.dtype == torch.float32
    assert torch.equal(value, LOSSES[loss](layer(x.float()), y))
    value.backward()
    assert x.grad.dtype == torch.bfloat16 and layer.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("loss", LOSSES)
def test_parametrized_weights_need_dense_gradients(loss):
    layer = LSHLinear(16, 40, options=LSHOptions(budget=10, tail=5, K=2, L=3), sparse=True)
    torch.nn.utils.parametrizations.weight_norm(layer)
    x, y = torch.randn(6, 16), torch.arange(6)
    with pytest.raises(ValueError, match=r"linear_weight: expected a leaf"):
        LOSSES[loss](layer(x), y)
    layer.sparse = False
    LOSSES[loss](layer(x), y).backward()
    assert layer.parametrizations.weight.original1.grad.abs().sum() > 0


def test_what_no_list_of_classes_is():
    case = make()
    for target in (torch.zeros(9, 2, dtype=torch.bool), torch.zeros(9, 2, dtype=torch.complex64)):
        with pytest.raises(ValueError, match="target: expected int64 class indices or"):
            binary(case, target)
