"""SampledLogits: what they compute equals dense logits where active, all else is refused in one sentence."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from logits import D, N, make, same
from torch import nn

from slide_torch import LSHLinear, LSHOptions, RecallProbe

SAMPLED = dict(budget=5, tail=6, K=2, L=3)
PATTERNS = ["shared", "per_sample"]


# --- computed, everything active ------------------------------------------------------------------


@pytest.mark.parametrize("leading", [(), (6,), (2, 3), (0,)])
@pytest.mark.parametrize("sparse,bias", [(False, True), (True, True), (True, False)])
def test_computed_equals_dense(leading, sparse, bias):
    layer, x, logits, dense = make(leading, sparse=sparse, bias=bias)
    for ours, theirs in (
        (logits.to_dense(), dense),
        (logits.to_dense(0.0), dense),
        (logits.softmax(-1), dense.softmax(-1)),
        (F.softmax(logits, dim=-1), dense.softmax(-1)),
        (torch.softmax(logits, -1, dtype=torch.float64), dense.softmax(-1)),
        (logits.log_softmax(-1).to_dense(), dense.log_softmax(-1)),
        (F.log_softmax(logits, -1).to_dense(), dense.log_softmax(-1)),
        (torch.log_softmax(logits, -1).to_dense(), dense.log_softmax(-1)),
        (logits.topk(3).values, dense.topk(3).values),
        (torch.topk(logits, N, dim=-1).values, dense.topk(N).values),
        (F.log_softmax(logits, -1).topk(3)[0], dense.log_softmax(-1).topk(3)[0]),
    ):
        same(ours, theirs, layer, x)
    assert torch.equal(logits.topk(3).indices, dense.topk(3).indices)
    assert torch.equal(logits.argmax(-1), dense.argmax(-1))
    assert torch.equal(torch.argmax(logits, dim=-1), dense.argmax(-1))
    assert torch.equal(logits.argmax(-1, keepdim=True), dense.argmax(-1, keepdim=True))


def losses(z, y):
    """The ways to the loss that torch users write, for (B, T, N) logits and (B, T) labels."""
    flat, labels = z.view(-1, N), y.view(-1)
    ignored = labels.clone()
    ignored[::2] = 7
    weight = torch.linspace(0.1, 2, N, dtype=torch.float64)
    probabilities = torch.eye(N, dtype=torch.float64)[labels] * 0.75 + 0.25 / N
    yield F.cross_entropy(flat, labels)
    yield F.cross_entropy(flat, labels, reduction="none")
    yield F.cross_entropy(flat, ignored, ignore_index=7, weight=weight, reduction="sum")
    yield F.cross_entropy(flat, probabilities)
    yield nn.CrossEntropyLoss()(flat, labels)
    yield nn.CrossEntropyLoss(weight, ignore_index=7)(flat, ignored)
    yield nn.CrossEntropyLoss(reduction="none")(z.reshape(-1, N).contiguous(), labels)
    yield F.nll_loss(F.log_softmax(flat, dim=-1), labels)
    yield nn.NLLLoss(weight)(nn.LogSoftmax(-1)(flat), labels)
    yield F.nll_loss(flat.log_softmax(1), ignored, ignore_index=7)
    # as in Hugging Face's language models: predict the next token
    shifted, next_labels = z[..., :-1, :].contiguous(), y[..., 1:].contiguous()
    next_labels[0, 0] = -100
    yield F.cross_entropy(shifted.view(-1, N), next_labels.view(-1), ignore_index=-100)
    yield F.cross_entropy(z[:, -1], y[:, -1])
    yield F.cross_entropy(z[0, 0], y[0, 0])


def test_losses_equal_dense():
    layer, x, logits, dense = make((3, 4))
    y = torch.randint(N, (3, 4))
    count = 0
    for ours, theirs in zip(losses(logits, y), losses(dense, y), strict=True):
        same(ours, theirs, layer, x)
        count += 1
    assert count == 13


def test_losses_without_flattening():
    layer, x, logits, dense = make((3, 4))
    y = torch.randint(N, (3, 4))
    expected = F.cross_entropy(dense.view(-1, N), y.view(-1))
    same(F.cross_entropy(logits, y), expected, layer, x)
    same(logits.cross_entropy(y), expected, layer, x)
    same(logits.cross_entropy(torch.stack([y, y], -1)), expected, layer, x)
    csr = F.one_hot(y.view(-1), N).double().to_sparse_csr()
    same(F.cross_entropy(logits.view(-1, N), csr), expected, layer, x)


# --- computed over an active set ------------------------------------------------------------------


@pytest.mark.parametrize("correction", ["none", "importance"])
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_computed_over_the_active_set(pattern, sparse, correction):
    layer, x, logits, dense = make(
        (2, 3), sparse=sparse, pattern=pattern, correction=correction, **SAMPLED
    )

    layer.rebuild()

    def draw(what):
        torch.manual_seed(3)  # every call draws an active set: the same one here
        return what()

    found = draw(lambda: logits.to_dense())
    active = found > float("-inf")
    assert active.sum(-1).min() >= 6 and active.sum(-1).max() < N
    assert (active == active[0, 0]).all() == (pattern == "shared")
    same(draw(lambda: logits.to_dense(0.0)), dense.where(active, 0.0), layer, x)

    log_weight = torch.zeros(2, 3, N, dtype=torch.float64)
    if correction == "importance":  # N minus the certain ones, for each of the tail
        in_tail = draw(lambda: tail_of(layer, x)).view(2, 3, N)
        certain = (active & ~in_tail).sum(-1, keepdim=True)
        each = (N - certain).double() / in_tail.sum(-1, keepdim=True)
        log_weight = each.log().where(in_tail, 0.0)
    masked = dense.masked_fill(~active, float("-inf"))
    log_probabilities = dense - (masked + log_weight).logsumexp(-1, keepdim=True)
    ours = draw(lambda: F.log_softmax(logits, -1).to_dense(0.0))
    same(ours, log_probabilities.where(active, 0.0), layer, x)
    ours = draw(lambda: F.softmax(logits, -1))
    same(ours, log_probabilities.exp().where(active, 0.0), layer, x)

    everything = logits.topk(N)  # of an active set of its own, always the same
    active = torch.zeros(2, 3, N + 1, dtype=torch.bool)
    active = active.scatter(-1, everything.indices % (N + 1), True)[..., :N]
    assert active.sum(-1).min() >= 6 and active.sum(-1).max() < N
    expected = dense.masked_fill(~active, float("-inf")).topk(4)
    best = logits.topk(4)
    same(best.values, expected.values, layer, x)
    assert torch.equal(best.indices, expected.indices)
    assert torch.equal(logits.argmax(-1), expected.indices[..., 0])
    assert everything.values.shape == everything.indices.shape == (2, 3, N)
    assert torch.equal(everything.indices >= 0, everything.values > float("-inf"))
    assert torch.equal((everything.indices >= 0).sum(-1), active.sum(-1))


def tail_of(layer, x):
    """Of a draw without labels: which active neurons only the tail has, (B, N)."""
    from slide_torch.active_set import Labels, SharedActiveSet
    from slide_torch.sampling.draw import draw_active_set

    flat = x.detach().reshape(-1, D)
    active = draw_active_set(layer.tables, flat, Labels.none(len(flat), flat.dtype))
    result = torch.zeros(len(flat), N, dtype=torch.bool)
    drawn = active.log_weight != 0
    if isinstance(active, SharedActiveSet):
        result[:, active.rows[drawn]] = True
    else:
        sample = torch.arange(len(flat)).repeat_interleave(active.offsets.diff())
        result[sample[drawn], active.active.long()[drawn]] = True
    return result


@pytest.mark.parametrize("options", [
    SAMPLED,
    {**SAMPLED, "pattern": "per_sample"},
    dict(budget=4, tail=5, K=2),  # one table, searched
    dict(budget=0, tail=5, tail_distribution="log_uniform"),
    dict(budget=4, tail=6, K=2, L=3, tail_distribution=("uniform", "frequencies")),
    dict(budget=4, tail=5, family="exact"),
    dict(budget=N),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("sparse", [False, True])
def test_looking_changes_no_bit_of_a_run(options, sparse):
    """topk, argmax, recall and a probe: before the first step, between forward and backward, after a step."""

    def run(look):
        torch.manual_seed(3)
        settings = dict(rehash_every=2, rebuild_every=2)
        layer = LSHLinear(D, N, options=LSHOptions(**settings, **options), sparse=sparse)
        layer.set_frequencies(torch.arange(1, N + 1))
        seen = []
        for _ in range(9):
            x, y = torch.randn(5, D), torch.randint(N, (5,))
            logits = layer(x)
            seen += look(layer, logits, x)
            loss = F.cross_entropy(logits, y)
            seen += look(layer, logits, x)
            loss.backward()
            with torch.no_grad():
                for p in layer.parameters():
                    p.sub_(p.grad)
                    p.grad = None
            seen += look(layer, layer(x), x)
        state = [*layer.parameters(), *layer.tables.tensors().values(), torch.get_rng_state()]
        return state, layer.stats(), seen

    def looking(layer, logits, x):
        best = logits.topk(3)
        assert torch.equal(best.indices, torch.topk(logits, 3).indices)
        assert torch.equal(best.values, logits.topk(3).values)
        assert torch.equal(logits.argmax(-1), best.indices[:, 0])
        F.log_softmax(logits, -1).topk(2)
        with torch.no_grad():
            layer.recall(x, 3)
        RecallProbe(layer, k=2).measure(layer, x)
        return [best.values.detach()]

    state, stats, _ = run(lambda *_: [])
    other, other_stats, seen = run(looking)
    assert len(state) == len(other) and all(map(torch.equal, state, other))
    assert stats.pop("upkeep_seconds") >= 0 and other_stats.pop("upkeep_seconds") >= 0
    assert stats == other_stats
    assert all(map(torch.equal, seen, run(looking)[2]))


def test_looking_is_no_training_step():
    layer, _, logits, _ = make(**SAMPLED)
    logits.topk(2)
    logits.argmax(-1)
    with torch.no_grad():
        logits.softmax(-1)
    assert layer.tables.built and layer.tables.schedule.steps == 0


# --- everything else ------------------------------------------------------------------------------

OTHER = torch.zeros(6, N, dtype=torch.float64)
REFUSED = {
    "+ 1": lambda z: z + 1,
    "1 +": lambda z: 1 + z,
    "+ tensor": lambda z: z + OTHER,
    "tensor +": lambda z: OTHER + z,
    "tensor -": lambda z: OTHER - z,
    "- 1": lambda z: z - 1,
    "1 -": lambda z: 1 - z,
    "1 /": lambda z: 1 / z,
    "neg": lambda z: -z,
    "abs": lambda z: abs(z),
    "pow": lambda z: z**2,
    "matmul": lambda z: z @ OTHER.T,
    "tensor matmul": lambda z: OTHER.T @ z,
    "==": lambda z: z == OTHER,
    "== number": lambda z: z == 0,
    "!=": lambda z: z != 0,
    "<": lambda z: z < 0,
    ">=": lambda z: z >= 0,
    "tensor >": lambda z: OTHER.gt(z),
    "bool": lambda z: bool(z),
    "setitem": lambda z: z.__setitem__(0, 1.0),
    "+=": lambda z: z.__iadd__(OTHER),
    "numpy +": lambda z: np.float64(1) + z,
    "np.asarray": lambda z: np.asarray(z),
    "exp": torch.exp,
    "torch.sum": torch.sum,
    "torch.mean": lambda z: torch.mean(z, -1),
    "torch.max": lambda z: torch.max(z, -1),
    "torch.where": lambda z: torch.where(OTHER > 0, z, OTHER),
    "logsumexp": lambda z: torch.logsumexp(z, -1),
    "cat": lambda z: torch.cat([z, z]),
    "stack": lambda z: torch.stack([z, OTHER]),
    "relu": F.relu,
    "mul by keywords": lambda z: torch.mul(input=z, other=2.0),
    "dropout": F.dropout,
    "linear": lambda z: F.linear(z, OTHER),
    "BCELoss": lambda z: nn.BCELoss()(z, OTHER),
    "kl_div": lambda z: F.kl_div(z, OTHER),
    "mse": lambda z: F.mse_loss(z, OTHER),
    "as target": lambda z: F.cross_entropy(OTHER, z),
    "copy_": lambda z: OTHER.clone().copy_(z),
}


@pytest.mark.parametrize("name", REFUSED)
def test_everything_else_is_refused_clearly(name):
    _, _, logits, _ = make()
    message = "SampledLogits: .*is not available, as only active logits are ever computed; use "
    with pytest.raises(NotImplementedError, match=message):
        REFUSED[name](logits)


@pytest.mark.parametrize("name", ["sum", "exp", "max", "transpose", "backward", "T", "item"])
def test_methods_it_lacks(name):
    _, _, logits, _ = make()
    with pytest.raises(AttributeError, match=rf"SampledLogits has no '{name}'.*eval\(\)\(input\)"):
        getattr(logits, name)
    assert not hasattr(logits, name)


def test_unknown_attribute():
    _, _, logits, _ = make()
    with pytest.raises(AttributeError, match="object has no attribute 'loss'"):
        _ = logits.loss
    copied = copy.copy(logits)
    assert copied.shape == logits.shape
    assert hash(logits) == hash(logits) and logits in [copied, logits][1:]


def test_training_through_to_dense_keeps_the_tables_fresh():
    options = LSHOptions(K=4, L=8, budget=8, tail=8, rehash_every=2)
    layer = LSHLinear(16, 200, options=options, sparse=True)
    x = torch.randn(6, 16)
    layer(x).to_dense(0.0).sum().backward()
    assert layer.stats()["steps"] == 1 and layer.stats()["dirty_share"] > 0
