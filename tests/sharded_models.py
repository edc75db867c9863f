"""Models whose head is sharded, and what is compared with those of whole heads."""

import torch
import torch.distributed as dist
from torch import nn

from slide_torch import LSHLinear, LSHOptions

N, D, B = 61, 8, 6


def model_of(seed=0, dtype=torch.float32, bias=True, sparse=True, N=N, **options):
    torch.manual_seed(seed)
    options = LSHOptions(**{"budget": N, "tail": 0, **options})
    head = LSHLinear(D, N, bias, options=options, sparse=sparse)
    return nn.Sequential(nn.Linear(D, D), head).to(dtype)


def data_of(step, rows=B, dtype=torch.float32, classes=N):
    data = torch.Generator().manual_seed(step)
    x = torch.randn(rows, D, generator=data, dtype=torch.float64).to(dtype)
    return x, torch.randint(classes, (rows,), generator=data)


def rows_of(head, whole):
    return whole[head.shard.first : head.shard.last]


def dense(gradient):
    return gradient.to_dense() if gradient.is_sparse else gradient


def check_gradients(model, reference):
    torch.testing.assert_close(model[0].weight.grad, reference[0].weight.grad)
    for name, parameter in model[1].named_parameters():
        expected = dense(getattr(reference[1], name).grad)
        torch.testing.assert_close(dense(parameter.grad), rows_of(model[1], expected))


def equal_on_all(tensor):
    found = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(found, tensor.detach().contiguous())
    return all(torch.equal(found[0], other) for other in found)
