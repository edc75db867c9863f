"""Torch's own databases of samples (optim_db, module_db, op_db): with every neuron active each sample gives
torch's value and gradients, or is refused as the lists of refusals here say."""

import importlib.util
import re
import sys
import types
import unittest

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import slide_torch
from slide_torch import LSHLinear, LSHOptions

if (
    importlib.util.find_spec("expecttest") is None
):  # torch's test utilities import it; nothing here uses it
    stub = types.ModuleType("expecttest")
    stub.TestCase = unittest.TestCase
    sys.modules["expecttest"] = stub
_WHY = "torch.testing._internal, which holds the databases, cannot be imported here"
op_db = pytest.importorskip(
    "torch.testing._internal.common_methods_invocations", reason=_WHY, exc_type=ImportError
).op_db
module_db = pytest.importorskip(
    "torch.testing._internal.common_modules", reason=_WHY, exc_type=ImportError
).module_db
optim_db = pytest.importorskip(
    "torch.testing._internal.common_optimizers", reason=_WHY, exc_type=ImportError
).optim_db

DTYPE = torch.float64


def op_samples(name):
    """The samples of an operator: (input, args, kwargs) each."""
    found = [info for info in op_db if info.name == name]
    assert found, f"op_db has no {name}"
    for info in found:
        for sample in info.sample_inputs("cpu", DTYPE, requires_grad=False):
            yield sample.input, sample.args, sample.kwargs


def module_samples(cls):
    """The samples of a module: constructor's and forward's (args, kwargs)."""
    (info,) = (info for info in module_db if info.module_cls is cls)
    for training in (True, False):
        for sample in info.module_inputs_func(
            info, device="cpu", dtype=DTYPE, requires_grad=False, training=training
        ):
            made, called = sample.constructor_input, sample.forward_input
            yield made.args, made.kwargs, called.args, called.kwargs


def identity_layer(logits):
    """A layer whose logits are its inputs, every neuron active."""
    classes = logits.shape[-1] if logits.dim() else 1
    options = LSHOptions(budget=classes)
    layer = LSHLinear(classes, classes, bias=False, options=options, dtype=logits.dtype)
    nn.init.eye_(layer.weight)
    return layer


def with_logits(logits):
    """``logits`` as a training layer returns them, and the input that they come from."""
    layer = identity_layer(logits)
    input = logits.detach().clone().requires_grad_()
    return layer(input), input


def check(ours, theirs, refusals, case):
    """``ours()`` gives the tensors of ``theirs()``, or the refusal whose condition holds for ``case``."""
    refused = [(error, message) for holds, error, message in refusals if holds(case)]
    if not refused:
        torch.testing.assert_close(ours(), theirs(), equal_nan=True)
        return 1
    with pytest.raises(tuple(error for error, _ in refused)) as info:
        ours()
    assert any(
        isinstance(info.value, error) and re.search(message, str(info.value))
        for error, message in refused
    ), (str(info.value), refused)
    return 0


# --- losses ---------------------------------------------------------------------------------------


def is_probabilities(case):
    return case["target"].is_floating_point()


SCALAR = (lambda c: c["input"].dim() == 0, ValueError, "input: expected last dimension")

# Of cross entropies: classes are the last dimension, where torch has them second.
CROSS_ENTROPY = [
    (
        lambda c: is_probabilities(c) and c["input"].dim() != 2,
        ValueError,
        "target: expected probabilities of shape",
    ),
    (
        lambda c: is_probabilities(c) and c["kwargs"].get("ignore_index", -100) >= 0,
        ValueError,
        "ignore_index: expected a negative value",
    ),
]

BINARY = [
    SCALAR,
    (
        lambda c: c["kwargs"].get("reduction") == "none",
        NotImplementedError,
        "reduction: expected 'mean' or 'sum', got 'none'",
    ),
    (
        lambda c: c["input"].dim() != 2,
        ValueError,
        "target: expected probabilities of shape",
    ),
    (
        lambda c: not is_row(c["kwargs"].get("weight"), c),
        ValueError,
        "weight: expected a tensor of shape",
    ),
    (
        lambda c: not is_row(c["kwargs"].get("pos_weight"), c, number=True),
        ValueError,
        "pos_weight: expected a tensor of shape",
    ),
]


def is_row(factors, case, number=False):
    """Whether factors are one a class (or a number)."""
    fits = factors is None or factors.shape == case["input"].shape[-1:]
    return fits or (number and factors.numel() == 1)


def check_loss(loss, logits, target, kwargs, refusals):
    """The loss and its gradient for the logits. ``kwargs`` are for the choice of refusals."""
    last = torch.movedim(logits, 1, -1) if logits.dim() > 2 and loss.classes_second else logits
    own_target = target
    if last is not logits and target.is_floating_point():
        own_target = torch.movedim(target, 1, -1)

    def ours():
        sampled, input = with_logits(last)
        value = loss(sampled, own_target)
        value.sum().backward()
        return value.detach(), input.grad

    def theirs():
        input = logits.detach().clone().requires_grad_()
        value = loss(input, target)
        value.sum().backward()
        same = last is logits
        return value.detach(), input.grad if same else torch.movedim(input.grad, 1, -1)

    case = {"input": logits, "target": target, "kwargs": kwargs}
    return check(ours, theirs, refusals, case)


class Loss:
    def __init__(self, function, classes_second):
        self.function = function
        self.classes_second = classes_second

    def __call__(self, *args):
        return self.function(*args)


LOSSES = {
    "cross_entropy": (F.cross_entropy, nn.CrossEntropyLoss, CROSS_ENTROPY, True),
    "binary": (F.binary_cross_entropy_with_logits, nn.BCEWithLogitsLoss, BINARY, False),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses_of_op_db(name):
    function, _, refusals, second = LOSSES[name]
    equal = 0
    for logits, (target, *more), kwargs in op_samples(f"nn.functional.{function.__name__}"):
        assert not more
        loss = Loss(lambda z, t, kw=kwargs: function(z, t, **kw), second)
        equal += check_loss(loss, logits, target, kwargs, refusals)
    assert equal > 0


@pytest.mark.parametrize("name", LOSSES)
def test_losses_of_module_db(name):
    _, cls, refusals, second = LOSSES[name]
    equal = 0
    for args, kwargs, (logits, target), called in module_samples(cls):
        assert not args and not called
        loss = Loss(cls(**kwargs), second)
        equal += check_loss(loss, logits, target, kwargs, refusals)
    assert equal > 0


# --- linear, topk ---------------------------------------------------------------------------------

LINEAR = [(lambda c: c["weight"].dim() != 2, ValueError, "weight of 2 dimensions")]


def check_linear(input, weight, bias):
    """What a layer computes, in training and in eval, and its gradients."""

    def both(function, *tensors):
        tensors = [None if t is None else t.detach().clone().requires_grad_() for t in tensors]
        output = function(*tensors)
        output.square().sum().backward()
        return output.detach(), *(t.grad for t in tensors if t is not None)

    def ours(training, sparse=False):
        def function(x, w, b):
            linear = nn.Linear(1, 1)
            linear.weight, linear.bias = nn.Parameter(w), None if b is None else nn.Parameter(b)
            options = LSHOptions(budget=w.shape[0])
            layer = LSHLinear.from_linear(linear, options=options, sparse=sparse).train(training)
            parameters = {"weight": w} if b is None else {"weight": w, "bias": b}
            output = torch.func.functional_call(layer, parameters, (x,))
            return output.to_dense() if training else output

        output, *grads = both(function, input, weight, bias)
        return output, *(g.to_dense() for g in grads)

    case = {"weight": weight}
    theirs = lambda: both(F.linear, input, weight, bias)  # noqa: E731
    check(lambda: ours(True), theirs, LINEAR, case)
    check(lambda: ours(True, sparse=True), theirs, LINEAR, case)
    return check(lambda: ours(False), theirs, LINEAR, case)


def test_linear_of_op_db():
    equal = 0
    for input, (weight, *bias), kwargs in op_samples("nn.functional.linear"):
        assert not kwargs
        equal += check_linear(input, weight, bias[0] if bias else None)
    assert equal > 0


def test_linear_of_module_db():
    for args, kwargs, inputs, called in module_samples(nn.Linear):
        (input,) = (*inputs, *called.values())
        torch.manual_seed(1)
        linear = nn.Linear(*args, **kwargs, dtype=DTYPE)
        torch.manual_seed(1)
        layer = LSHLinear(*args, **kwargs, dtype=DTYPE)
        assert all(map(torch.equal, layer.parameters(), linear.parameters()))
        assert check_linear(input, layer.weight, layer.bias)


def topk_arguments(k, dim=-1, largest=True, sorted=True):
    return k, dim, largest, sorted


TOPK = [
    SCALAR,
    (
        lambda c: c["dim"] not in (-1, c["input"].dim() - 1),
        NotImplementedError,
        r"topk\(dim=.*classes are the last dimension",
    ),
    (lambda c: not c["largest"], NotImplementedError, r"topk\(largest=False\)"),
]


def test_topk_of_op_db():
    equal = 0
    for input, args, kwargs in op_samples("topk"):
        k, dim, largest, _ = topk_arguments(*args, **kwargs)
        case = {"input": input, "dim": dim, "largest": largest}

        def ours(input=input, args=args, kwargs=kwargs):
            return tuple(torch.topk(with_logits(input)[0], *args, **kwargs))

        def theirs(input=input, args=args, kwargs=kwargs):
            return tuple(torch.topk(input, *args, **kwargs))

        if check(ours, theirs, TOPK, case):
            equal += 1
            torch.testing.assert_close(identity_layer(input).predict(input, k), theirs())
    assert equal > 0


# --- optimizers -----------------------------------------------------------------------------------

N, D, B = 12, 5, 6


def trained(make_layer, make_optimizer):
    torch.manual_seed(2)
    layer = make_layer()
    optimizer = make_optimizer(list(layer.parameters()))
    data = torch.Generator().manual_seed(5)
    for _ in range(4):
        x = torch.randn(B, D, generator=data, dtype=DTYPE)
        y = torch.randint(N, (B,), generator=data)

        def closure(x=x, y=y):
            optimizer.zero_grad()
            loss = F.cross_entropy(layer(x), y)
            loss.backward()
            return loss

        optimizer.step(closure)
    return [p.detach() for p in layer.parameters()]


def lsh_layer(sparse, bias):
    options = LSHOptions(budget=N)
    return LSHLinear(D, N, bias, options=options, sparse=sparse, dtype=DTYPE)


def optimizer_settings(info):
    """Every setting of a torch optimizer in the database, in every implementation that runs here."""
    for sample in info.optim_inputs_func(device="cpu"):
        for implementation in ("plain", *info.supported_impls):
            if implementation == "differentiable":  # parameters of its own kind: no leaves
                continue
            kwargs = dict(sample.kwargs)
            if info.optim_cls is torch.optim.LBFGS:
                kwargs["max_iter"] = 3  # further line searches magnify rounding to anything
            if implementation != "plain" and kwargs.get(implementation) is None:
                kwargs[implementation] = True
            if not (kwargs.get("foreach") and kwargs.get("fused")):
                yield kwargs


CLOSE = {
    "LBFGS": dict(rtol=1e-5, atol=1e-5),
    "SparseAdam": dict(rtol=0, atol=5e-5),  # eps is added before the bias correction
}


@pytest.mark.parametrize("info", optim_db, ids=lambda info: info.optim_cls.__name__)
def test_optimizers_of_optim_db(info):
    """Trained by any of torch's optimizers a layer becomes what nn.Linear becomes."""
    torch.set_num_threads(1)
    bias = info.optim_cls is not torch.optim.Muon  # which takes matrices only
    only_sparse = info.optim_cls is torch.optim.SparseAdam
    close = CLOSE.get(info.optim_cls.__name__, {})
    for kwargs in optimizer_settings(info):

        def make(parameters, kwargs=kwargs):
            return info.optim_cls(parameters, **kwargs)

        if only_sparse:
            dense = {k: v for k, v in kwargs.items() if k in ("lr", "betas", "eps", "maximize")}
            theirs = trained(
                lambda: nn.Linear(D, N, dtype=DTYPE),
                lambda parameters, kw=dense: torch.optim.Adam(parameters, **{"lr": 1e-3, **kw}),
            )
        else:
            theirs = trained(lambda: nn.Linear(D, N, bias, dtype=DTYPE), make)
            torch.testing.assert_close(
                trained(lambda: lsh_layer(False, bias), make), theirs, **close
            )
        plain = not any(kwargs.get(name) for name in ("foreach", "fused", "weight_decay"))
        if only_sparse or (info.supports_sparse and plain):
            torch.testing.assert_close(
                trained(lambda: lsh_layer(True, bias), make), theirs, **close
            )


OURS = [info for info in optim_db if hasattr(slide_torch.optim, info.optim_cls.__name__)]


@pytest.mark.parametrize("info", OURS, ids=lambda info: info.optim_cls.__name__)
@pytest.mark.parametrize("sparse", [False, True])
def test_our_optimizers_take_the_settings_of_optim_db(info, sparse):
    """They give what torch's give, or refuse a setting by its name."""
    torch.set_num_threads(1)
    ours = getattr(slide_torch.optim, info.optim_cls.__name__)
    equal = 0
    for kwargs in optimizer_settings(info):
        layer = lambda: lsh_layer(sparse, True)  # noqa: E731
        try:
            found = trained(layer, lambda parameters, kw=kwargs: ours(parameters, **kw))
        except (TypeError, ValueError) as error:
            assert any(re.search(rf"\b{name}\b", str(error)) for name in kwargs), (kwargs, error)
            continue
        equal += 1
        cls, close = info.optim_cls, {}
        if cls is torch.optim.Adam:  # ours decouples weight decay
            cls, kwargs = torch.optim.AdamW, {"weight_decay": 0.0, **kwargs}
            close = CLOSE["SparseAdam"] if sparse else {}
        theirs = trained(
            lambda: nn.Linear(D, N, dtype=DTYPE),
            lambda parameters, cls=cls, kw=kwargs: cls(parameters, **kw),
        )
        torch.testing.assert_close(found, theirs, **close)
    assert equal > 0
