"""Optimizers for models where some gradients are row-sparse: one optimizer for the whole model.

Row-sparse gradients (``torch.sparse_coo`` with one sparse dimension, as from ``nn.EmbeddingBag``
with ``sparse=True``) update the touched rows only, in one pass over their memory. Dense gradients
get torch's own update. State dicts load into, and from, the torch optimizer of the same name.

Parameters in bfloat16 (contiguous, on the CPU) are updated in float32 and, with their states, rounded
stochastically: up or down with the probability that makes the mean right, since rounded to nearest what
moves by less than 1/512 of itself would never move. The random bits are a hash of step and element: no
generator is drawn from, and the result is the same at any number of threads and on every replica.
"""

from .adagrad import Adagrad
from .adam import Adam
from .sgd import SGD

__all__ = ["SGD", "Adagrad", "Adam"]
