"""The named tuple that predict returns: as torch.topk's, in eager mode, compiled, exported and pickled."""

import io
import pickle

import pytest
import torch
import torch.nn.functional as F

from slide_torch import LSHLinear, TopK


class Best(torch.nn.Module):
    def __init__(self, head, exact=True):
        super().__init__()
        self.head, self.exact = head, exact

    def forward(self, x):
        return self.head.predict(x, 3, exact=self.exact)


def layer_and_input():
    layer, x = LSHLinear(8, 200), torch.randn(2, 5, 8)
    layer.calibrate(x, 3, recall=1.0)
    return layer, x


@pytest.mark.parametrize("exact", [True, False])
def test_names_are_those_of_torch_topk(exact):
    layer, x = layer_and_input()
    found = layer.predict(x, 3, exact=exact)
    values, indices = found
    assert type(found) is TopK and found.values is values and found.indices is indices
    expected = F.linear(x, layer.weight, layer.bias).topk(3)
    assert found._fields == tuple(name for name in ("values", "indices") if hasattr(expected, name))
    torch.testing.assert_close(found.values, expected.values)
    assert torch.equal(found.indices, expected.indices)


def test_of_compiled_prediction():
    layer, x = layer_and_input()
    found = torch.compile(Best(layer), fullgraph=True, backend="aot_eager")(x)
    assert type(found) is TopK and torch.equal(found.indices, layer.predict(x, 3).indices)


def test_of_an_exported_and_saved_program():
    layer, x = layer_and_input()
    buffer = io.BytesIO()
    torch.export.save(torch.export.export(Best(layer), (x,)), buffer)
    buffer.seek(0)
    found = torch.export.load(buffer).module()(x)
    assert type(found) is TopK and torch.equal(found.indices, layer.predict(x, 3).indices)


def test_of_pickles_and_torch_save():
    found = TopK(torch.randn(2, 3), torch.zeros(2, 3, dtype=torch.int64))
    buffer = io.BytesIO()
    torch.save(found, buffer)
    buffer.seek(0)
    for copy in (pickle.loads(pickle.dumps(found)), torch.load(buffer, weights_only=False)):
        assert type(copy) is TopK and all(map(torch.equal, copy, found))
