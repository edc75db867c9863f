"""Exact prediction against torch.topk; log-probabilities; both exported, compiled and under autocast."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from predicted_layers import DTYPES, clustered, layer_of


def reference(layer, x, k):
    """By a stable sort, so that equal values go by the smaller index; NaN comes first."""
    logits = F.linear(x, layer.weight, layer.bias).detach()
    values, indices = logits.sort(dim=-1, descending=True, stable=True)
    return values[..., :k], indices[..., :k]


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
