"""Embeddings whose weight is that of an LSHLinear: gradients of both, and tables that follow."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from small_batches import B, D, N, stale_unmarked
from torch import nn

import slide_torch
from slide_torch import LSHLinear, LSHOptions

pytestmark = pytest.mark.usefixtures("one_thread")


class Tied(nn.Module):
    def __init__(self, *, embedding_sparse, sparse, budget=5, call=True):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(N, D, sparse=embedding_sparse)
        options = LSHOptions(budget=budget, tail=2, K=4, L=3, rehash_every=100)
        self.head = LSHLinear(D, N, bias=False, options=options, sparse=sparse)
        if call:
            assert self.head.tie(self.embedding) is self.head
        else:
            self.head.weight = self.embedding.weight

    def forward(self, tokens):
        return self.head(self.embedding(tokens).mean(1))


def tokens_and_labels(seed):
    data = torch.Generator().manual_seed(seed)
    return torch.randint(N, (B, 3), generator=data), torch.randint(N, (B,), generator=data)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("embedding_sparse", [False, True])
def test_tied_embedding_gets_both_gradients(embedding_sparse, sparse):
    model = Tied(embedding_sparse=embedding_sparse, sparse=sparse, budget=N)
    tokens, labels = tokens_and_labels(0)
    F.cross_entropy(model(tokens), labels).backward()
    weight = model.embedding.weight.detach().clone().requires_grad_()
    F.cross_entropy(F.embedding(tokens, weight).mean(1) @ weight.T, labels).backward()
    assert len(list(model.parameters())) == 1 and model.head.weight is model.embedding.weight
    torch.testing.assert_close(model.head.weight.grad.to_dense(), weight.grad)


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("call", [False, True])
def test_tables_follow_a_tied_embedding(call, copied):
    """Rows that only the embedding has moved are marked; without tie() they are not."""
    model = Tied(embedding_sparse=True, sparse=True, call=call)
    if copied:
        model = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    optimizer = slide_torch.optim.SGD(model.parameters(), lr=20.0)
    for seed in range(3):
        tokens, labels = tokens_and_labels(seed)
        optimizer.zero_grad()
        F.cross_entropy(model(tokens), labels).backward()
        optimizer.step()
    assert bool(stale_unmarked(model.head).any()) != call
    before = model.head.tables.dirty.clone()
    model.eval().embedding(torch.arange(N))
    model.train()
    with torch.no_grad():
        model.embedding(torch.arange(N))
    assert torch.equal(model.head.tables.dirty, before)


def test_tied_embeddings_are_called_as_torch_allows():
    """By position or keyword, as tensors of any shape, as bags; what torch refuses leaves no marks."""

    def marked(embedding, *args, **kwargs):
        head = LSHLinear(
            D, N, bias=False, options=LSHOptions(budget=2, tail=0, K=4, L=3), sparse=True
        )
        head.tie(embedding)
        head.rebuild()
        try:
            embedding(*args, **kwargs)
        except (IndexError, RuntimeError, TypeError):
            head.rehash()  # would tell of marks that wait for a step
            assert not head.tables.dirty.any()
            raise
        head.rehash()  # marks outlive a rehash that comes before the step
        return head.tables.dirty.nonzero().flatten().tolist()

    tokens = torch.tensor([[3, 1], [1, 7]])
    for sparse in (False, True):
        embedding = nn.Embedding(N, D, sparse=sparse)
        assert marked(embedding, tokens) == marked(embedding, input=tokens) == [1, 3, 7]
        assert marked(embedding, tokens.int()) == marked(embedding, input=tokens.T) == [1, 3, 7]
        assert marked(embedding, torch.tensor(5)) == [5]
    bag = nn.EmbeddingBag(N, D)
    starts = torch.tensor([0, 2])
    assert marked(bag, tokens) == marked(bag, offsets=starts, input=tokens.flatten()) == [1, 3, 7]
    assert marked(bag, tokens.flatten(), offsets=starts) == [1, 3, 7]
    for wrong in (torch.tensor([N]), torch.tensor([-1])):
        with pytest.raises(IndexError):
            marked(nn.Embedding(N, D), wrong)
        with pytest.raises(IndexError):
            marked(nn.Embedding(N, D), input=wrong)
    with pytest.raises(TypeError):
        marked(nn.Embedding(N, D), ids=tokens)


def test_a_tied_embedding_that_grows():
    """As resize_token_embeddings of transformers does it; the remedy of the error works."""
    model = Tied(embedding_sparse=False, sparse=True)
    tokens, labels = tokens_and_labels(0)
    F.cross_entropy(model(tokens), labels).backward()
    model.embedding.weight.data = torch.randn(N + 4, D)
    model.embedding.num_embeddings = model.head.out_features = N + 4
    model.zero_grad()
    tokens[0] = N + 3
    with pytest.raises(
        ValueError, match=r"LSHLinear: weight: .*make a new layer, LSHLinear.from_linear"
    ):
        model(tokens)
    head = LSHLinear.from_linear(model.head, options=model.head.options, sparse=model.head.sparse)
    model.head = head.tie(model.embedding)
    labels[0] = N + 3
    F.cross_entropy(model(tokens), labels).backward()
    assert head.out_features == N + 4 and head.weight is model.embedding.weight
    assert head.tables.dirty[N + 3] and head.weight.grad.to_dense()[N + 3].any()


def test_tied_embedding_of_another_signature():
    class Embedding(nn.Embedding):
        def forward(self, ids):
            return super().forward(ids)

    embedding = Embedding(N, D)
    head = LSHLinear(D, N, sparse=True).tie(embedding)
    embedding(torch.arange(3))
    with pytest.raises(ValueError, match=r"tie: embedding: .*first argument or input=.*\['ids'\]"):
        embedding(ids=torch.arange(3))
    assert head.weight is embedding.weight


def test_tie_refuses():
    head = LSHLinear(D, N, sparse=True)
    for wrong in (nn.Embedding(N + 1, D), nn.Embedding(N, D).double(), nn.Linear(D, N)):
        with pytest.raises(
            ValueError, match=r"tie: embedding: expected an nn.Embedding.*make the layer"
        ):
            head.tie(wrong)
