"""convert_: which layers it swaps, and that parameters, optimizers and sharing survive."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from slide_torch import LSHLinear, LSHOptions, convert_

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


def test_subclasses_of_linear_are_left_alone():
    class Special(nn.Linear):
        pass

    model = nn.Sequential(Special(8, 40), nn.Linear(8, 40))
    convert_(model, min_out_features=1)
    assert kinds(model) == {"0": Special, "1": LSHLinear}


def test_a_layer_that_cannot_be_one_changes_nothing():
    model = nn.Sequential(nn.Linear(8, 40), nn.Linear(8, 40, dtype=torch.float16))
    with pytest.raises(ValueError, match=r"float64 or bfloat16, got torch\.float16"):
        convert_(model, min_out_features=1)
    assert set(kinds(model).values()) == {nn.Linear}
