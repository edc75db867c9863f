"""What extend_ and drop_ of LSHLinear refuse, and that nothing is changed by a refused call."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from refusals import refused
from resized_layers import B, D, N, make, train
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from slide_torch import LSHLinear
from slide_torch.distributed import prepare

OPTIMIZERS = (
    *("adam", "fused", "small_moments", "sgd", "adagrad"),
    *(
        "torch_adam",
        "torch_adamw",
        "torch_rprop",
        "torch_sparse_adam",
        "torch_sgd",
        "torch_adagrad",
    ),
)
# gradients that an optimizer does not take: row-sparse ones or dense ones
WITHOUT = {
    **dict.fromkeys(("torch_adam", "torch_adamw", "torch_rprop"), (True,)),
    "torch_sparse_adam": (False,),
}


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)  # for such small problems two are slower
    torch.manual_seed(0)


WRONG = {
    "extend": [
        (lambda layer: layer.extend_(-1), r"count_or_rows: expected an int from 0"),
        (lambda layer: layer.extend_(True), r"count_or_rows: expected an int from 0"),
        (lambda layer: layer.extend_(2**31), r"count_or_rows: expected an int from 0"),
        (lambda layer: layer.extend_(torch.ones(D)), r"expected a CPU tensor \(n, 8\)"),
        (lambda layer: layer.extend_(torch.ones(2, D + 1)), r"expected a CPU tensor \(n, 8\)"),
        (lambda layer: layer.extend_(torch.ones(2, D).double()), r"torch.float64: give"),
        (lambda layer: layer.extend_(torch.ones(2, D, device="meta")), r"strided on meta"),
        (lambda layer: layer.extend_(torch.ones(2, D).to_sparse()), r"sparse_coo on cpu"),
        (lambda layer: layer.extend_(torch.full((2, D), torch.nan)), r"finite numbers, got NaN"),
        (lambda layer: layer.extend_(2, bias=torch.ones(3)), r"bias: expected .*\(2,\)"),
        (lambda layer: layer.extend_(2, bias=[0.0, 0.0]), r"bias: expected .*got list"),
        (lambda layer: layer.extend_(2, optimizer="adam"), r"expected a torch optimizer, got str"),
    ],
    "drop": [
        (lambda layer: layer.drop_([N]), r"ids: expected class indices from 0 to 119"),
        (lambda layer: layer.drop_(torch.tensor([-1])), r"ids: expected class indices from 0"),
        (lambda layer: layer.drop_(torch.ones(N, dtype=torch.bool)), r"of a mask give"),
        (lambda layer: layer.drop_(torch.ones(2)), r"ids: expected a tensor \(n\) of integers"),
        (lambda layer: layer.drop_([0.5]), r"ids: expected a tensor \(n\) of integers"),
        (lambda layer: layer.drop_(3), r"ids: expected .*got int"),
        (lambda layer: layer.drop_(range(N)), r"at least one class that stays"),
    ],
}


@pytest.mark.parametrize("call, message", [*WRONG["extend"], *WRONG["drop"]])
def test_wrong_arguments_change_nothing(call, message):
    layer, optimizer = make()
    train(layer, optimizer, range(2))
    refused(layer, lambda: call(layer), ValueError, message)


def both(layer, error, message, **arguments):
    refused(layer, lambda: layer.extend_(2, **arguments), error, f"extend_: .*{message}")
    refused(layer, lambda: layer.drop_([2], **arguments), error, f"drop_: .*{message}")


def test_gradients_are_refused():
    layer, optimizer = make()
    F.cross_entropy(layer(torch.randn(B, D)), torch.arange(B)).backward()
    both(layer, ValueError, r"weight: expected no gradient.*zero_grad", optimizer=optimizer)
    optimizer.zero_grad()
    layer.bias.grad = torch.zeros(N)
    both(layer, ValueError, r"bias: expected no gradient")


def test_a_step_that_backward_has_begun_is_refused():
    layer, optimizer = make(optimizer="fused", bias=False)
    F.cross_entropy(layer(torch.randn(B, D)), torch.arange(B)).backward()
    both(layer, ValueError, r"weight: expected finished steps.*call optimizer.step\(\)")
    optimizer.step()
    layer.extend_(2, optimizer=optimizer)


def test_optimizers_that_are_refused():
    layer, _ = make(sparse=False)
    other = torch.optim.SGD([torch.zeros(2, requires_grad=True)], lr=0.1)
    both(layer, ValueError, r"optimizer: expected the one that updates", optimizer=other)
    for make_one in (torch.optim.Adafactor, torch.optim.ASGD, torch.optim.LBFGS):
        one = make_one(layer.parameters())
        x, y = torch.randn(B, D), torch.arange(B)

        def closure(one=one, x=x, y=y):
            one.zero_grad()
            loss = F.cross_entropy(F.linear(x, layer.weight, layer.bias), y)
            loss.backward()
            return loss

        one.step(closure)
        one.zero_grad()
        both(layer, ValueError, r"optimizer: expected states with", optimizer=one)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_that_was_not_told_raises_an_error(name, sparse):
    if sparse in WITHOUT.get(name, ()):
        pytest.skip("takes no such gradients")
    layer, optimizer = make(optimizer=name, sparse=sparse)
    train(layer, optimizer, range(2))
    layer.extend_(2)
    weight = layer.weight.detach().clone()
    with pytest.raises((ValueError, RuntimeError)):
        train(layer, optimizer, range(1))
    if not name.startswith("torch_"):  # AdamW has decayed the weight by then
        assert torch.equal(layer.weight, weight)


def test_layers_that_are_refused():
    layer = LSHLinear(D, N, output="dense")
    both(layer, ValueError, r"output: expected 'sampled'")
    layer = nn.utils.parametrizations.weight_norm(LSHLinear(D, N))
    with pytest.raises(ValueError, match=r"weight: expected a Parameter.*parametrization"):
        layer.extend_(2)
    layer = nn.utils.weight_norm(make()[0])
    with pytest.raises(ValueError, match="weight_norm computes anew"):
        layer.drop_([1])
    layer = LSHLinear(D, N, device="meta")
    with pytest.raises(ValueError, match=r"got one on meta: move the layer to the CPU"):
        layer.extend_(2)
    layer, _ = make()
    layer.share_memory()
    both(layer, ValueError, r"weight: expected .*got one in shared memory")
    with torch.inference_mode():
        layer, _ = make()
    with pytest.raises(ValueError, match="got an inference tensor"):
        layer.extend_(2)
    layer, _ = make()
    layer.weight.data = torch.randn(N + 1, D)
    with pytest.raises(ValueError, match="make a new layer"):
        layer.extend_(2)
    layer, _ = make(bias=False)
    message = r"bias: expected None, as the layer has no bias"
    refused(layer, lambda: layer.extend_(2, bias=torch.zeros(2)), ValueError, message)


@pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch without gloo"
)
@pytest.mark.parametrize("seen", [False, True])
def test_data_parallel_models_are_made_anew(seen, tmp_path):
    """DistributedDataParallel would not average the gradients of the new memory, and not say so."""
    dist.init_process_group("gloo", f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        layer, _ = make(sparse=False)
        x, y = torch.randn(B, D), torch.arange(B)
        for grow in (True, False):
            wrapped = DistributedDataParallel(layer)
            if seen:
                F.cross_entropy(wrapped(x), y).backward()
                layer.zero_grad()
            layer.extend_(3)
            if seen and not grow:  # the old size, in new memory
                layer.drop_([1, 2, 3])
            with pytest.raises(RuntimeError, match=r"weight: expected .*wrap the model anew"):
                wrapped(x)
            assert layer(x).shape == (B, layer.out_features)
        wrapped = DistributedDataParallel(layer)
        F.cross_entropy(wrapped(x), y).backward()
        layer, optimizer = make()
        wrapped = DistributedDataParallel(prepare(nn.Sequential(nn.Linear(D, D), layer)))
        for _ in range(2):  # row-sparse gradients are averaged by size
            F.cross_entropy(wrapped(x), y).backward()
            optimizer.zero_grad()
            layer.extend_(3, optimizer=optimizer)
    finally:
        dist.destroy_process_group()
