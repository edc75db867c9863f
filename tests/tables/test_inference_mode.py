"""Under torch.inference_mode(): what is built there trains on later, or says why it does not."""

import pytest
import torch
import torch.nn.functional as F

import slide_torch
from slide_torch import LSHFeedForward, LSHLinear, LSHOptions, RecallProbe

INFERENCE_CASES = {
    "default": {},
    "kmeans": {"family": "kmeans", "K": 3, "L": 2, "probes": 2},
    "groups": {"family": "kmeans", "K": 9, "L": 1, "probes": 4},
    "simhash": {"family": "simhash", "K": 3, "L": 4, "rebuild_every": 2},
    "searched": {"family": "simhash", "K": 3, "L": 1, "rerank": 50},
    "per_sample": {"pattern": "per_sample", "K": 3, "L": 4, "budget": 5},
    "augment_norms": {"K": 3, "L": 4, "augment_norms": True},
    "drift": {"K": 3, "L": 4, "schedule": "drift", "drift": 0.0},
    "frequencies": {"tail_distribution": "frequencies", "correction": "importance"},
    "log_uniform": {"tail_distribution": ("uniform", "log_uniform")},
    "exact": {"family": "exact"},
}


def train(layer, steps=4):
    optimizer = slide_torch.optim.Adam(layer.parameters(), lr=0.1)
    for step in range(steps):
        torch.manual_seed(step)
        loss = F.cross_entropy(layer(torch.randn(8, 16)), torch.randint(400, (8,)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.detach()


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("case", INFERENCE_CASES)
def test_what_is_built_in_inference_mode_trains_on(case, sparse):
    """As what is built under no_grad, bit for bit."""

    def run(mode):
        torch.manual_seed(0)
        options = LSHOptions(**{"tail": 6, "rehash_every": 1, **INFERENCE_CASES[case]})
        layer = LSHLinear(16, 400, options=options, sparse=sparse)
        x = torch.randn(8, 16)
        with mode():
            layer.set_frequencies(torch.rand(400) + 0.1)
            layer.recall(x.clone())
            layer.calibrate(x.clone(), 3)
            layer(x.clone()).topk(3)
            F.cross_entropy(layer(x.clone()), torch.arange(8))
        result = [train(layer)]
        with mode():
            layer.rehash()
            F.cross_entropy(layer(x.clone()), torch.arange(8))
            layer.rebuild()
            state = layer.tables.sampler_state(layer.weight, layer.bias)
            layer.tables.load_sampler_state(state, layer.weight)
        assert not any(tensor.is_inference() for tensor in layer.tables.tensors().values())
        result.append(train(layer))
        with mode():
            layer.calibrate(x.clone(), 3)
        return torch.stack([*result, layer.weight.sum().detach()]), layer.predict(x, 3, exact=False)

    (found, (values, indices)), (expected, best) = run(torch.inference_mode), run(torch.no_grad)
    assert torch.equal(found, expected) and found.isfinite().all()
    assert torch.equal(values, best[0]) and torch.equal(indices, best[1])


def test_hidden_layers_and_probes_in_inference_mode():
    options = LSHOptions(pattern="shared", K=3, L=4, rehash_every=1)
    body = LSHFeedForward(16, 300, options=options, eval_active="budget")
    head = LSHLinear(16, 400)
    probe = RecallProbe(head, every=1)
    x = torch.randn(8, 16)
    with torch.inference_mode():
        body.eval()(x.clone())
        probe.measure(head, x.clone())
    model = torch.nn.Sequential(body, head).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(4):
        F.cross_entropy(model(x), torch.arange(8)).backward()
        optimizer.step()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_a_layer_made_in_inference_mode_predicts_and_says_why_it_does_not_train():
    with torch.inference_mode():
        layer = LSHLinear(16, 400)
        hidden = LSHLinear(16, 400, output="dense", eval_active="budget")
        x = torch.randn(8, 16)
        assert hidden.eval()(x).shape == (8, 400)
        assert layer.calibrate(x, 3) >= 0.95 and 0 <= layer.recall(x) <= 1
        assert F.cross_entropy(layer(x), torch.arange(8)).isfinite()
    x = torch.randn(8, 16)
    assert layer.predict(x, 3)[0].shape == (8, 3)
    advice = r"linear_weight: expected a normal tensor, got one made in torch.inference_mode\(\)"
    for call in (
        lambda: F.cross_entropy(layer(x), torch.arange(8)),
        lambda: F.binary_cross_entropy_with_logits(layer(x), torch.zeros(8, 400)),
        lambda: hidden.train()(x),
    ):
        with pytest.raises(ValueError, match=advice):
            call()
    with torch.inference_mode():
        made = torch.randn(8, 16)
    with pytest.raises(ValueError, match="input: expected a normal tensor"):
        F.cross_entropy(LSHLinear(16, 400)(made), torch.arange(8))
