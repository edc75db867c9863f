"""Optimizers for models in which some gradients are row-sparse: one optimizer for the whole model.

Row-sparse gradients (``torch.sparse_coo`` with one sparse dimension, as from ``nn.EmbeddingBag``
with ``sparse=True``) update only their own rows, in one pass over the memory. Dense gradients use
torch's own update. State dicts can be exchanged with the torch optimizer of the same name, except those of
``row_wise`` and ``deferred_decay``, which torch does not have.

Parameters in bfloat16 (contiguous, on the CPU) are updated in float32 and, with their states of one number
an element, rounded stochastically: up or down with probabilities that keep the mean exact. With rounding to
nearest, an update smaller than 1/512 of a value would be lost. The random bits are a hash of step and
element: no generator is used, and the result is the same at any number of threads and on every replica.
"""

from .adagrad import Adagrad
from .adam import Adam
from .sgd import SGD

__all__ = ["SGD", "Adagrad", "Adam"]
