"""What the tests of Predictor share."""

import torch

from slide_torch import LSHLinear, TopK

N, D, K = 600, 12, 7


def calibrated(bias=True, dtype=torch.float32, recall=0.9, k=K, d=D):
    layer = LSHLinear(d, N, bias=bias, dtype=dtype)
    x = torch.randn(50, d, dtype=dtype)
    layer.calibrate(x, k, recall)
    return layer, x


def same(found, expected):
    return type(found) is TopK and all(map(torch.equal, found, expected))


def tensors_of(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}
