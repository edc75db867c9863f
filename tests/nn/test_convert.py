"""convert_: which layers it swaps, and that parameters, optimizers and sharing survive."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.testing._internal.two_tensor import TwoTensor

from slide_torch import LSHFeedForward, LSHLinear, LSHOptions, RecallProbe, SampledLogits, convert_
from slide_torch.nn.linear_conversion import OWN_ATTRIBUTES

OPTIONS = LSHOptions(budget=4, tail=4, K=2, L=3)


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
        self.heads = nn.ModuleDict({"one": nn.Linear(8, 40), "two": nn.Linear(8, 20)})

    def forward(self, x):
        x = self.body(x)
        return self.heads["one"](x), self.heads["two"](x)


def kinds(model):
    return {n: type(m) for n, m in model.named_modules() if isinstance(m, nn.Linear)}


def test_default_filter_takes_layers_of_a_hundred_thousand_outputs():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(2, 99_999), nn.Linear(99_999, 100_000))
    returned = convert_(model)
    assert returned is model
    assert kinds(model) == {"0": nn.Linear, "1": LSHLinear}


def test_min_out_features():
    model = Nested()
    convert_(model, min_out_features=20, options=OPTIONS, sparse=True)
    assert kinds(model) == {"body.0": nn.Linear, "heads.one": LSHLinear, "heads.two": LSHLinear}
    head = model.heads["one"]
    assert head.options == OPTIONS and head.sparse


def test_filter_sees_each_linear_and_its_name():
    model, seen = Nested(), []

    def chosen(module, name):
        seen.append((type(module), name))
        return name.endswith("two")

    convert_(model, chosen)
    assert seen == [(nn.Linear, n) for n in ("body.0", "heads.one", "heads.two")]
    assert kinds(model) == {"body.0": nn.Linear, "heads.one": nn.Linear, "heads.two": LSHLinear}


def test_parameters_are_reused_and_the_optimizer_stays_valid():
    model = Nested()
    names = [n for n, _ in model.named_parameters()]
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y = torch.randn(5, 8), torch.randint(20, (5,))
    before = model.eval()(x)
    convert_(model, min_out_features=20, options=OPTIONS)
    assert not model.heads["one"].training
    assert all(map(torch.equal, model(x), before))
    assert [n for n, _ in model.named_parameters()] == names
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    old = parameters[-2].detach().clone()
    one, two = model.train()(x)
    (F.cross_entropy(one, y) + F.cross_entropy(two, y)).backward()
    optimizer.step()
    assert not torch.equal(model.heads["two"].weight, old)


def test_a_layer_in_two_places_stays_one():
    shared = nn.Linear(8, 40)
    model = nn.Sequential(nn.ModuleDict({"a": shared}), nn.ModuleDict({"b": shared}))
    convert_(model, min_out_features=40)
    assert isinstance(model[0]["a"], LSHLinear) and model[0]["a"] is model[1]["b"]
    assert model[0]["a"].weight is shared.weight


def test_tied_weights_stay_tied():
    model = nn.Sequential(nn.Embedding(40, 8), nn.Linear(8, 40))
    model[1].weight = model[0].weight
    convert_(model, min_out_features=40)
    assert model[1].weight is model[0].weight


def test_the_model_itself():
    layer = nn.Linear(8, 40)
    made = convert_(layer, lambda module, name: name == "", sparse=True)
    assert isinstance(made, LSHLinear) and made.weight is layer.weight and made.sparse
    assert type(layer) is nn.Linear


def test_a_layer_without_bias():
    made = convert_(nn.Linear(8, 40, bias=False), min_out_features=1)
    assert made.bias is None and list(made.state_dict()) == ["weight"]


def test_no_match_names_the_candidates():
    model = Nested()
    with pytest.raises(ValueError, match=r"body.0 \(8 -> 8\), heads.one \(8 -> 40\), heads"):
        convert_(model)
    assert set(kinds(model).values()) == {nn.Linear}
    with pytest.raises(ValueError, match=r"matched none of: the model \(8 -> 40\)"):
        convert_(nn.Linear(8, 40))
    with pytest.raises(ValueError, match="the model has none"):
        convert_(nn.ReLU())


def test_an_lsh_linear_is_not_converted_twice():
    model = convert_(Nested(), lambda module, name: name == "heads.one")
    first = model.heads["one"]
    convert_(model, lambda module, name: name.startswith("heads"))
    assert model.heads["one"] is first and isinstance(model.heads["two"], LSHLinear)
    with pytest.raises(ValueError, match=r"matched none of: body.0 \(8 -> 8\)$"):
        convert_(model, min_out_features=20)


def test_subclasses_of_linear_are_refused_by_name():
    class Special(nn.Linear):
        pass

    model = nn.Sequential(nn.Linear(8, 40), nn.ModuleDict({"head": Special(8, 40)}))
    with pytest.raises(
        ValueError, match=r"convert_: 1\.head: .*got Special, a subclass.*leave it out"
    ):
        convert_(model, min_out_features=1)
    assert kinds(model) == {"0": nn.Linear, "1.head": Special}
    convert_(model, lambda module, name: type(module) is nn.Linear)
    assert kinds(model) == {"0": LSHLinear, "1.head": Special}


def test_lazy_layers_are_refused_until_they_are_layers():
    model = nn.Sequential(nn.LazyLinear(40))
    with pytest.raises(ValueError, match=r"convert_: 0: .*got LazyLinear"):
        convert_(model, min_out_features=1)
    model(torch.randn(2, 8))
    convert_(model, min_out_features=1)
    assert kinds(model) == {"0": LSHLinear}


def tensor_subclass(linear):
    class Wrapped(TwoTensor):
        pass

    linear.weight = nn.Parameter(Wrapped(linear.weight.detach(), linear.weight.detach().clone()))


REFUSED = {
    "weight_norm": (nn.utils.weight_norm, "weight_norm: call torch.nn.utils.remove_weight_norm"),
    "spectral_norm": (nn.utils.spectral_norm, "spectral_norm: call torch.nn.utils.remove_spectral"),
    "pruning": (
        lambda layer: prune.random_unstructured(layer, "weight", 0.5),
        "pruning: call torch.nn.utils.prune.remove",
    ),
    "bias pruning": (lambda layer: prune.random_unstructured(layer, "bias", 0.5), "pruning: "),
    "new weight_norm": (
        parametrizations.weight_norm,
        "parametrization of weight: call torch.nn.ut",
    ),
    "new spectral_norm": (parametrizations.spectral_norm, "parametrization of weight"),
    "bias parametrization": (
        lambda layer: parametrize.register_parametrization(layer, "bias", nn.Tanh()),
        "parametrization of bias",
    ),
    "forward": (
        lambda layer: setattr(layer, "forward", lambda x: x),
        "attribute 'forward' of its own, which LSHLinear has already: delete or rename it",
    ),
    "attribute": (lambda layer: setattr(layer, "tables", 3), "attribute 'tables' of its own"),
    "buffer": (
        lambda layer: layer.register_buffer("options", torch.ones(2)),
        "attribute 'options' of its own",
    ),
    "backward hook": (
        lambda layer: layer.register_full_backward_hook(lambda *a: None),
        "backward hooks: remove them, and register them with the new layer",
    ),
    "backward pre-hook": (
        lambda layer: layer.register_full_backward_pre_hook(lambda *a: None),
        "backward pre-hooks: remove",
    ),
    "load hook": (
        lambda layer: layer.register_load_state_dict_pre_hook(lambda *a: None),
        "load_state_dict pre-hooks: remove",
    ),
    "load post-hook": (
        lambda layer: layer.register_load_state_dict_post_hook(lambda *a: None),
        "load_state_dict post-hooks: remove",
    ),
    "tensor subclass": (tensor_subclass, "a weight of Wrapped: convert before quantising"),
    "buffer as weight": (
        lambda layer: (
            delattr(layer, "weight"),
            layer.register_buffer("weight", torch.ones(40, 8)),
        ),
        "a weight that is no Parameter",
    ),
    "no bias": (lambda layer: delattr(layer, "bias"), "a bias that is no Parameter"),
    "short bias": (
        lambda layer: setattr(layer, "bias", nn.Parameter(torch.ones(39))),
        r"bias of shape \(40,\).*got \(39,\)",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_carried_over_is_refused(case):
    """By name, before anything is changed."""
    spoil, message = REFUSED[case]
    model = nn.Sequential(nn.Linear(8, 40), nn.Linear(8, 40))
    spoil(model[1])
    before = kinds(model), {n: id(p) for n, p in model.named_parameters()}
    with pytest.raises(
        ValueError, match=f"convert_: 1: LSHLinear.from_linear: linear: .*{message}"
    ):
        convert_(model, min_out_features=1)
    assert before == (kinds(model), {n: id(p) for n, p in model.named_parameters()})
    if case not in ("no bias", "short bias"):
        with pytest.raises(ValueError, match=r"LSHFeedForward.from_linears: second: "):
            LSHFeedForward.from_linears(nn.Linear(4, 8), model[1])


SIBLINGS = [
    case for case in REFUSED if "attribute" not in case and case not in ("buffer", "short bias")
]


@pytest.mark.parametrize("case", SIBLINGS)
def test_to_linear_refuses_the_same(case):
    layer = LSHLinear(8, 40)
    spoil, message = REFUSED[case]
    spoil(layer)
    message = message.replace("LSHLinear has", "Linear has")
    with pytest.raises(ValueError, match=f"LSHLinear.to_linear: layer: .*{message}"):
        layer.to_linear()


@pytest.mark.parametrize("remove,spoil", [
    (lambda layer: nn.utils.remove_weight_norm(layer), nn.utils.weight_norm),
    (lambda layer: nn.utils.remove_spectral_norm(layer), nn.utils.spectral_norm),
    (lambda layer: prune.remove(layer, "weight"),
     lambda layer: prune.random_unstructured(layer, "weight", 0.5)),
    (lambda layer: parametrize.remove_parametrizations(layer, "weight"), parametrizations.weight_norm),
])  # fmt: skip
def test_the_remedies_work(remove, spoil):
    model = nn.Sequential(nn.Linear(8, 40))
    spoil(model[0])
    x = torch.randn(3, 8)
    before = model.eval()(x)
    remove(model[0])
    convert_(model, min_out_features=1)
    assert kinds(model) == {"0": LSHLinear}
    torch.testing.assert_close(model(x), before)


def hung_with_everything():
    linear, log = nn.Linear(8, 40), []
    linear.register_buffer("seen", torch.zeros(3))
    linear.register_buffer("scratch", torch.zeros(2), persistent=False)
    linear.register_parameter("gain", nn.Parameter(torch.ones(())))
    linear.adapter = nn.Linear(8, 2)
    linear.tag = "head"
    linear.compile()
    handles = [
        linear.register_forward_pre_hook(lambda m, args: log.append(("pre", type(m)))),
        linear.register_forward_hook(
            lambda m, args, kwargs, out: log.append((type(out), kwargs)), with_kwargs=True
        ),
        linear.register_forward_hook(lambda m, args, out: log.append("always"), always_call=True),
        linear.register_state_dict_pre_hook(lambda *a: log.append("saving")),
        linear.register_state_dict_post_hook(lambda m, state, prefix, meta: log.append("saved")),
    ]
    return linear, log, handles


def test_hooks_buffers_and_attributes_go_along():
    linear, log, handles = hung_with_everything()
    model = nn.Sequential(linear)
    names = list(model.state_dict()), [n for n, _ in model.named_parameters()]
    buffers = dict(model.named_buffers())
    convert_(model, min_out_features=40, options=OPTIONS)
    layer = model[0]
    log.clear()
    assert names == (list(model.state_dict()), [n for n, _ in model.named_parameters()])
    assert log == ["saving", "saved"]
    assert all(value is buffers[name] for name, value in model.named_buffers())
    assert layer.adapter is linear.adapter and layer.gain is linear.gain and layer.tag == "head"
    x = torch.randn(3, 8)
    log.clear()
    F.cross_entropy(layer(x), torch.arange(3)).backward()
    assert log == [("pre", LSHLinear), (SampledLogits, {}), "always"]
    log.clear()
    layer.eval()(input=x)
    assert log == [("pre", LSHLinear), (torch.Tensor, {"input": x}), "always"]
    copied = copy.deepcopy(layer)
    back = layer.to_linear()
    assert type(back) is nn.Linear and not back.training
    assert list(back.state_dict()) == list(linear.state_dict()) and back.tag == "head"
    assert not hasattr(back, "tables") and back.adapter is linear.adapter
    for handle in handles:  # taken before the conversion
        handle.remove()
    log.clear()
    torch.testing.assert_close(back(x), layer(x))
    layer.state_dict()
    assert log == []
    copied(x)
    assert len(log) == 3


def test_layers_without_hooks_share_none():
    linear = nn.Linear(8, 40)
    layer, log = LSHLinear.from_linear(linear), []
    layer.register_forward_hook(lambda *a: log.append("new"))
    linear(torch.zeros(1, 8))
    assert log == []


def test_a_probe_survives_both_ways():
    layer = LSHLinear(8, 200, options=LSHOptions(budget=4, tail=0))
    probe = RecallProbe(layer, every=1, k=2)
    other = LSHLinear.from_linear(layer.to_linear(), options=layer.options)
    layer.to_linear()(torch.zeros(1, 8))
    for _ in range(2):
        F.cross_entropy(other(input=torch.randn(3, 8)), torch.arange(3)).backward()
    assert probe.steps == 2 and probe.last


def test_attributes_of_its_own():
    """What from_linear and to_linear leave out; an attribute added to LSHLinear must be added there."""
    own = vars(LSHLinear(8, 40)).keys() - vars(nn.Linear(8, 40)).keys()
    assert own == OWN_ATTRIBUTES


@pytest.mark.parametrize("sparse", [False, True])
def test_a_tied_embedding_is_followed(sparse):
    model = nn.Sequential(nn.Embedding(200, 8, sparse=sparse), nn.Linear(8, 200, bias=False))
    model[1].weight = model[0].weight
    convert_(
        model, min_out_features=1, options=LSHOptions(budget=2, tail=0, K=2, L=2), sparse=sparse
    )
    assert model[1].weight is model[0].weight and len(list(model.parameters())) == 1
    F.cross_entropy(model[1](torch.randn(2, 8)), torch.arange(2)).backward()
    model[0](torch.tensor([150]))
    assert bool(model[1].tables.dirty[150]) == sparse


def test_feed_forward_refuses_what_would_be_lost():
    def first_and_second():
        return nn.Linear(4, 8), nn.Linear(8, 4)

    for place, name in ((0, "first"), (1, "second")):
        pair = first_and_second()
        pair[place].register_forward_hook(lambda *a: None)
        with pytest.raises(ValueError, match=f"{name}: .*with hooks, which would not be called"):
            LSHFeedForward.from_linears(*pair)
    first, second = first_and_second()
    second.register_buffer("seen", torch.zeros(2))
    with pytest.raises(ValueError, match=r"second: .*got one with seen"):
        LSHFeedForward.from_linears(first, second)
    first, second = first_and_second()
    first.register_buffer("seen", torch.zeros(2))
    assert LSHFeedForward.from_linears(first, second).first.seen is first.seen


def test_a_layer_that_cannot_be_one_changes_nothing():
    model = nn.Sequential(nn.Linear(8, 40), nn.Linear(8, 40, dtype=torch.float16))
    with pytest.raises(ValueError, match=r"float64 or bfloat16, got torch\.float16"):
        convert_(model, min_out_features=1)
    assert set(kinds(model).values()) == {nn.Linear}
