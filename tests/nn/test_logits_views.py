"""SampledLogits look like the tensor of logits: shape, views, scaling."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from logits import N, make, same
from torch import nn

from slide_torch import LSHLinear, LSHOptions, SampledLogits

# --- what it looks like ---------------------------------------------------------------------------


@pytest.mark.parametrize("leading", [(), (6,), (2, 3), (0,)])
def test_looks_like_the_tensor(leading):
    _, _, logits, dense = make(leading)
    assert isinstance(logits, SampledLogits) and not isinstance(logits, torch.Tensor)
    assert logits.shape == dense.shape and isinstance(logits.shape, torch.Size)
    assert logits.size() == dense.size() and logits.size(-1) == N
    assert logits.dim() == logits.ndim == dense.dim()
    assert logits.numel() == torch.numel(logits) == dense.numel()
    assert len(logits) == len(dense)
    assert logits.dtype == dense.dtype and logits.device == dense.device
    assert logits.requires_grad
    assert repr(logits) == f"SampledLogits(shape={tuple(dense.shape)}, dtype=torch.float64)"


def test_requires_grad():
    """As of a tensor, it is a matter of when the logits were made."""
    layer, x, logits, _ = make()
    with torch.no_grad():
        assert logits.requires_grad and not layer(x).requires_grad
    assert not logits.detach().requires_grad
    x = x.detach()
    layer.weight.requires_grad_(False)
    assert layer(x).requires_grad  # the bias
    layer.bias.requires_grad_(False)
    assert not layer(x).requires_grad


# --- views ----------------------------------------------------------------------------------------

MASK = torch.tensor([[True, False, True], [False, True, True]])
VIEWS = {
    "view": lambda z: z.view(-1, N),
    "view_whole": lambda z: z.view(6, -1),
    "view_tuple": lambda z: z.view((3, 2, N)),
    "view_size": lambda z: z.view(torch.Size([6, N])),
    "view_minus_one": lambda z: z.view(3, -1, N),
    "reshape": lambda z: z.reshape(3, 2, 1, N),
    "torch.reshape": lambda z: torch.reshape(z, (6, N)),
    "torch.reshape_keyword": lambda z: torch.reshape(z, shape=(6, N)),
    "flatten": lambda z: z.flatten(0, 1),
    "flatten_negative": lambda z: z.flatten(end_dim=-2),
    "torch.flatten": lambda z: torch.flatten(z, 0, -2),
    "flatten_nothing": lambda z: z.flatten(2),
    "first": lambda z: z[0],
    "last": lambda z: z[-1],
    "numpy_int": lambda z: z[np.int64(1)],
    "slice": lambda z: z[:1],
    "step": lambda z: z[:, ::2],
    "all": lambda z: z[:],
    "empty_index": lambda z: z[()],
    "ellipsis": lambda z: z[...],
    "first_ellipsis": lambda z: z[0, ...],
    "two_ellipsis": lambda z: z[0, 1, ...],
    "shift": lambda z: z[..., :-1, :],
    "shift_plain": lambda z: z[:, :-1],
    "shift_full": lambda z: z[:, 1:, :],
    "element": lambda z: z[1, 2],
    "element_full": lambda z: z[1, 2, :],
    "last_token": lambda z: z[:, -1, :],
    "ellipsis_element": lambda z: z[..., 1, :],
    "ellipsis_only_last": lambda z: z[..., :],
    "list": lambda z: z[[1, 0, 1]],
    "tensor": lambda z: z[torch.tensor([1, 0, 1])],
    "two_tensors": lambda z: z[torch.tensor([1, 0]), torch.tensor([2, 2])],
    "mask": lambda z: z[MASK],
    "mask_rows": lambda z: z[torch.tensor([False, True])],
    "mask_full": lambda z: z[MASK, :],
    "mask_ellipsis": lambda z: z[MASK, ...],
    "none": lambda z: z[:, None],
    "none_first": lambda z: z[None],
    "unsqueeze": lambda z: z.unsqueeze(1),
    "unsqueeze_negative": lambda z: z.unsqueeze(-2),
    "torch.unsqueeze": lambda z: torch.unsqueeze(z, 0),
    "contiguous": lambda z: z.contiguous(),
    "float": lambda z: z.float().to(torch.float64) if isinstance(z, torch.Tensor) else z.float(),
    "to_dtype": lambda z: z.to(torch.float64),
    "to_device": lambda z: z.to("cpu"),
    "to_keywords": lambda z: z.to(device=torch.device("cpu"), dtype=torch.float64, copy=False),
    "to_other": lambda z: z.to(torch.zeros(1, dtype=torch.float64)),
    "iteration": lambda z: list(z)[1],
}


@pytest.mark.parametrize("name", VIEWS)
def test_views(name):
    _, _, logits, dense = make((2, 3))
    ours, theirs = VIEWS[name](logits), VIEWS[name](dense)
    assert isinstance(ours, SampledLogits) and ours.shape == theirs.shape
    # float() of the dense logits rounds; ours stays exact, as documented
    tolerance = 1e-6 if name == "float" else 1e-12
    torch.testing.assert_close(ours.to_dense(), theirs, rtol=tolerance, atol=tolerance)


def test_views_of_one_row():
    _, _, logits, dense = make(())
    for ours, theirs in (
        (logits.view(1, N), dense.view(1, N)),
        (logits[None], dense[None]),
        (logits.flatten(), dense.flatten()),
        (logits.view(-1), dense.view(-1)),
        (logits[:], dense[:]),
    ):
        assert ours.shape == theirs.shape
        torch.testing.assert_close(ours.to_dense(), theirs, rtol=1e-12, atol=1e-12)


WRONG_VIEWS = {
    "view(-1)": (lambda z: z.view(-1), ValueError, "keeps the last dimension 30"),
    "view(30, 6)": (lambda z: z.view(N, 6), ValueError, "keeps the last dimension 30"),
    "view(7, 30)": (lambda z: z.view(7, N), ValueError, "shape for 6 rows"),
    "view(-1, -1)": (lambda z: z.view(-1, -1), ValueError, "keeps the last"),
    "view(4, -1, 30)": (lambda z: z.view(4, -1, N), ValueError, "shape for 6 rows"),
    "view()": (lambda z: z.view(()), ValueError, "keeps the last dimension"),
    "view(dtype)": (lambda z: z.view(torch.float32), NotImplementedError, r"view\(dtype\)"),
    "flatten": (lambda z: z.flatten(), NotImplementedError, "end_dim=-2"),
    "torch.flatten": (lambda z: torch.flatten(z, 1), NotImplementedError, "end_dim=-2"),
    "unsqueeze(-1)": (lambda z: z.unsqueeze(-1), NotImplementedError, "classes must stay last"),
    "[..., 3]": (lambda z: z[..., 3], NotImplementedError, "indexing the last dimension"),
    "[:, :, 3]": (lambda z: z[:, :, 3], NotImplementedError, "indexing the last dimension"),
    "[0, 1, 2]": (lambda z: z[0, 1, 2], NotImplementedError, "indexing the last dimension"),
    "[0, 1, 2, ...]": (lambda z: z[0, 1, 2, ...], NotImplementedError, "the last dimension"),
    "[..., :5]": (lambda z: z[..., :5], NotImplementedError, "indexing the last dimension"),
    "[..., tensor]": (lambda z: z[..., torch.tensor([1])], NotImplementedError, "the last dim"),
    "[..., None]": (lambda z: z[..., None], NotImplementedError, "indexing the last dimension"),
    "[:, :, :, None]": (lambda z: z[:, :, :, None], NotImplementedError, "the last dimension"),
    "[mask]": (lambda z: z[torch.ones(2, 3, N).bool()], NotImplementedError, "the last dimension"),
    "[0, 0, 0, 0]": (lambda z: z[0, 0, 0, 0], IndexError, "too many indices for 3 dimensions"),
    "[5]": (lambda z: z[5], IndexError, "out of bounds"),
    "to(float32)": (lambda z: z.to(torch.float32), NotImplementedError, r"to\(torch.float32\)"),
    "to(cuda)": (lambda z: z.to("cuda"), NotImplementedError, r"to\(cuda\)"),
    "* 0": (lambda z: z * 0, ValueError, "positive finite number, got 0"),
    "* -1": (lambda z: -1.0 * z, ValueError, "positive finite number, got -1.0"),
    "* nan": (lambda z: z * float("nan"), ValueError, "positive finite number, got nan"),
    "/ 0": (lambda z: z / 0, NotImplementedError, "division by anything but a positive number"),
    "/ -2": (lambda z: z / -2, ValueError, "positive finite number"),
    "* tensor": (lambda z: z * torch.ones(N), NotImplementedError, "multiplication by a tensor"),
    "* parameter": (
        lambda z: z * nn.Parameter(torch.ones(())), NotImplementedError, "scale the layer's input"
    ),
    "topk(31)": (lambda z: z.topk(N + 1), ValueError, "k: expected an int from 0 to 30, got 31"),
    "topk(dim=0)": (lambda z: z.topk(1, 0), NotImplementedError, "dim=-1"),
    "topk(smallest)": (lambda z: z.topk(1, largest=False), NotImplementedError, "large logits"),
    "argmax()": (lambda z: z.argmax(), NotImplementedError, "over all dimensions"),
    "softmax(1)": (lambda z: F.softmax(z, 1), NotImplementedError, "dim=-1"),
    "log_softmax(1)": (lambda z: F.log_softmax(z, 1), NotImplementedError, "dim=-1"),
    "log_softmax(float32)": (
        lambda z: F.log_softmax(z, -1, dtype=torch.float32), NotImplementedError, "float32"
    ),
    "log_softmax * 2": (lambda z: z.log_softmax(-1) * 2, NotImplementedError, "before log_softmax"),
    "nll of logits": (
        lambda z: F.nll_loss(z, torch.zeros(2, 3).long()), NotImplementedError, "log_softmax"
    ),
    "size_average": (
        lambda z: F.cross_entropy(z, torch.zeros(2, 3).long(), size_average=True),
        NotImplementedError,
        "use reduction",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG_VIEWS)
def test_wrong_views_and_arguments(name):
    call, error, message = WRONG_VIEWS[name]
    _, _, logits, _ = make((2, 3))
    with pytest.raises(error, match=message):
        call(logits)


# --- scaling --------------------------------------------------------------------------------------

SCALED = {
    "* 0.5": lambda z: z * 0.5,
    "0.5 *": lambda z: 0.5 * z,
    "/ 0.07": lambda z: z / 0.07,
    "/ 2": lambda z: z / 2,
    "torch.mul": lambda z: torch.mul(z, 0.5),
    "torch.div": lambda z: torch.div(z, 3.0),
    "* tensor": lambda z: z * torch.tensor(0.5),
    "tensor *": lambda z: torch.tensor(0.5) * z,
    "torch.mul(tensor, )": lambda z: torch.mul(torch.tensor(0.5), z),
    "/ tensor": lambda z: z / torch.tensor([2.0], dtype=torch.float64),
    "numpy *": lambda z: np.float32(0.5) * z if isinstance(z, SampledLogits) else 0.5 * z,
    "chain": lambda z: 3 * (z / 4).view(-1, N) * 0.5,
}


@pytest.mark.parametrize("name", SCALED)
def test_scaling(name):
    layer, x, logits, dense = make()
    ours, theirs = SCALED[name](logits), SCALED[name](dense)
    assert isinstance(ours, SampledLogits)
    same(ours.to_dense(), theirs, layer, x)
    y = torch.randint(N, (6,))
    same(F.cross_entropy(ours, y), F.cross_entropy(theirs, y), layer, x)


@pytest.mark.parametrize("family", ["kmeans", "simhash", "dwta"])
def test_inputs_may_be_strided(family):
    """Rows that are no contiguous matrix, such as a slice of a sequence."""
    torch.set_num_threads(1)
    layer = LSHLinear(8, 50, options=LSHOptions(budget=4, tail=5, K=2, L=3, family=family))
    x, y = torch.randn(6, 3, 8), torch.randint(50, (6,))
    results = []
    for logits in (layer(x)[:, 1], layer(x[:, 1].clone())):
        torch.manual_seed(0)
        results.append([F.cross_entropy(logits, y), logits.to_dense()])
    assert all(map(torch.equal, *results))
