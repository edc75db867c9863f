"""Hidden layers over active sets: outputs and gradients are those of the active neurons."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hidden_layers import OUT, PATTERNS, B, D, N, close, feed_forward, gradients, linear
from torch import nn

from slide_torch import LSHFeedForward, LSHLinear, LSHOptions
from slide_torch.optim import Adam

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_linear_gradients_are_those_of_active_neurons(pattern, bias, sparse):
    layer, x = linear(pattern, bias=bias, sparse=sparse), torch.randn(B, D, requires_grad=True)
    wanted = [x, *layer.parameters()]
    y = layer(x)
    weights = torch.randn(B, N)
    dense = F.linear(x, layer.weight, layer.bias) * (y != 0)
    expected = gradients((dense * weights).sum(), wanted)
    (y * weights).sum().backward()
    assert layer.weight.grad.is_sparse is sparse
    if sparse:
        rows = layer.weight.grad._indices()[0]
        assert torch.equal(rows, (y != 0).any(0).nonzero().flatten())
    close([t.grad.to_dense() for t in wanted], expected)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("activation", [F.relu, nn.GELU(), torch.sigmoid])
def test_feed_forward_is_the_dense_one_with_inactive_neurons_zero(
    activation, pattern, bias, sparse
):
    layer = feed_forward(pattern, activation=activation, bias=bias, sparse=sparse)
    x = torch.randn(2, 3, D, requires_grad=True)
    wanted = [x, *layer.parameters()]
    torch.manual_seed(5)
    y = layer(x)
    torch.manual_seed(5)
    mask = layer.first(x) != 0  # a hidden layer with the same draw
    dense = activation(F.linear(x, layer.first.weight, layer.first.bias)) * mask
    expected = F.linear(dense, layer.second_weight.T, layer.second_bias)
    weights = torch.randn(2, 3, OUT)
    close([y], [expected])
    found, truth = ((z * weights).sum() for z in (y, expected))
    close(gradients(found, wanted), gradients(truth, wanted))
    (layer(x)).sum().backward()
    assert layer.second_weight.grad.is_sparse is sparse


@pytest.mark.parametrize("pattern", PATTERNS)
def test_gradcheck_with_every_neuron_active(pattern):
    options = LSHOptions(pattern=pattern, budget=N)
    x = torch.randn(3, D, dtype=torch.float64, requires_grad=True)
    layer = linear(options=options, dtype=torch.float64)
    torch.testing.assert_close(layer(x), layer.eval()(x))
    pair = feed_forward(options=options, dtype=torch.float64, activation=torch.tanh)
    torch.testing.assert_close(pair(x), pair.eval()(x))
    for module in (layer.train(), pair.train()):
        names = [name for name, _ in module.named_parameters()]

        def call(x, *parameters, module=module, names=names):
            values = dict(zip(names, parameters, strict=True))
            return torch.func.functional_call(module, values, (x,))

        assert torch.autograd.gradcheck(call, (x, *module.parameters()), fast_mode=True)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_gradcheck_of_active_sets(pattern):
    """Through the operators, whose active sets stay as they are while the numbers move."""
    from slide_torch.nn import hidden

    layer = feed_forward(pattern, dtype=torch.float64)
    x = torch.randn(B, D, dtype=torch.float64, requires_grad=True)
    _, active = layer.first.draw_active(x)
    first, second = layer.first, layer.second_weight

    def call(x, weight, bias, second):
        values = hidden.into_active(x, weight, bias, active, sparse=False)
        return hidden.out_of_active(torch.tanh(values), second, active, sparse=False)

    assert torch.autograd.gradcheck(call, (x, first.weight, first.bias, second), fast_mode=True)


def test_float32_errs_no_more_than_torch():
    width, hidden, count = 64, 500, 50
    layer = LSHFeedForward(width, hidden, options=LSHOptions(budget=hidden))
    x = torch.randn(count, width, requires_grad=True)
    weights = torch.randn(count, width)
    wanted = [x, *layer.parameters()]

    def run(module, x, weights):
        y = module(x)
        return [y, *torch.autograd.grad((y * weights).sum(), [x, *module.parameters()])]

    def error(results):
        pairs = zip(results, truth, strict=True)
        return torch.stack([(a.double() - t).abs().max() / t.abs().max() for a, t in pairs])

    found = run(layer, x, weights)
    dense = run(layer.eval(), x, weights)
    exact = copy.deepcopy(layer).double()
    truth = run(exact, x.detach().double().requires_grad_(), weights.double())
    assert len(found) == len(wanted) + 1
    # 4 times: both are luck of the order in which some hundred numbers are added
    assert (error(found) < 4 * error(dense) + torch.finfo(torch.float32).eps).all()


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_same_bits_at_any_number_of_threads(pattern, sparse, both_thread_counts):
    def run():
        options = LSHOptions(pattern=pattern, budget=100, rehash_every=2)
        layer = LSHFeedForward(48, 3000, 40, options=options, sparse=sparse)
        alone = LSHLinear(40, 500, output="dense", sparse=sparse)
        optimizer = Adam([*layer.parameters(), *alone.parameters()], lr=0.1)
        for _ in range(4):
            loss = alone(layer(torch.randn(64, 48))).pow(2).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return [loss.detach(), *(p.detach().clone() for p in layer.parameters())]

    one, two = both_thread_counts(run)
    assert all(map(torch.equal, one, two))


def test_no_second_derivative():
    x = torch.randn(B, D, requires_grad=True)
    for layer in (linear(), feed_forward()):
        (grad,) = torch.autograd.grad(layer(x).pow(2).sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiable once"):
            grad.sum().backward()
