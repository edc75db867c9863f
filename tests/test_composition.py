"""Inside the rest of PyTorch: clipping, autocast, checkpointing, tying, copies, threads, processes."""

import copy
import multiprocessing
import pickle
import subprocess
import sys
import threading

import pytest
import torch
import torch.nn.functional as F
from helpers import small_model as make
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

import slide_torch
from slide_torch import LSHLinear, LSHOptions

N, D, B = 60, 8, 5
PATTERNS = ["shared", "per_sample"]


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)  # for such small problems two are slower


def batch(seed=1):
    data = torch.Generator().manual_seed(seed)
    return torch.randn(B, D, generator=data), torch.randint(N, (B,), generator=data)


def loss_of(model, seed=1):
    x, y = batch(seed)
    torch.manual_seed(seed)
    return F.cross_entropy(model(x), y)


def grads_of(model):
    return [p.grad.to_dense().clone() for p in model.parameters()]


def stale_unmarked(layer):
    """Rows whose codes are not those of the weights, and that are not marked as such."""
    tables = layer.tables
    moved = (tables.family.row_codes(layer.weight, layer.bias) != tables.codes).any(0)
    return moved & ~tables.dirty


# --- gradients --------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm_type", [1.0, 2.0, float("inf")])
@pytest.mark.parametrize("max_norm", [0.1, 100.0])
@pytest.mark.parametrize("batches", [1, 2])
def test_clipping_of_sparse_gradients_is_that_of_dense_ones(batches, max_norm, norm_type):
    dense, sparse = make(), make(sparse=True)
    for model in (dense, sparse):
        for seed in range(batches):
            loss_of(model, seed).backward()
    expected = nn.utils.clip_grad_norm_(dense.parameters(), max_norm, norm_type)
    found = slide_torch.clip_grad_norm_(sparse.parameters(), max_norm, norm_type)
    torch.testing.assert_close(found, expected)
    for one, other in zip(grads_of(sparse), grads_of(dense), strict=True):
        torch.testing.assert_close(one, other)
    assert sparse[-1].weight.grad.layout == torch.sparse_coo
    again = slide_torch.clip_grad_norm_(sparse.parameters(), max_norm, norm_type)
    torch.testing.assert_close(again, found.clamp(max=max_norm))


def test_clipping_refuses_and_spares():
    model = make(sparse=True)
    assert slide_torch.clip_grad_norm_(model.parameters(), 1.0) == 0
    loss_of(model).backward()
    with pytest.raises(NotImplementedError):  # what docs/pytorch.md says of torch's own
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    before = grads_of(model)
    model[0].bias.grad[0] = float("nan")
    with pytest.raises(RuntimeError, match="expected gradients of a finite norm, got nan"):
        slide_torch.clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=True)
    assert torch.equal(model[-1].weight.grad.to_dense(), before[2])
    assert slide_torch.clip_grad_norm_(model[-1].weight, 1e9) > 0  # a single tensor


@pytest.mark.parametrize("sparse", [False, True])
def test_grad_scaler(sparse):
    plain, scaled = make(sparse=sparse), make(sparse=sparse)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizers = [slide_torch.optim.SGD(m.parameters(), lr=0.1) for m in (plain, scaled)]
    for seed in range(3):
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss_of(plain, seed).backward()
        optimizers[0].step()
        scaler.scale(loss_of(scaled, seed)).backward()
        scaler.step(optimizers[1])
        scaler.update()
    for p, q in zip(plain.parameters(), scaled.parameters(), strict=True):
        torch.testing.assert_close(p, q)
    # a step with Inf is left out and lowers the scale
    before = scaled[-1].weight.detach().clone()
    scaler.scale(loss_of(scaled) * float("inf")).backward()
    scaler.step(optimizers[1])
    scaler.update()
    assert torch.equal(scaled[-1].weight, before) and scaler.get_scale() == 512.0


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_autocast(pattern, sparse):
    """Earlier layers give bfloat16; the head computes in float32, and so does its gradient."""
    model = make(pattern=pattern, sparse=sparse)
    reference = copy.deepcopy(model)
    x, y = batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = model[:2](x)
        assert hidden.dtype == torch.bfloat16
        hidden.retain_grad()
        torch.manual_seed(1)
        logits = model[-1](hidden)
        assert logits.dtype == torch.float32
        loss = F.cross_entropy(logits, y)
    loss.backward()
    exact = hidden.detach().float().requires_grad_()
    torch.manual_seed(1)
    expected = F.cross_entropy(reference[-1](exact), y)
    expected.backward()
    assert loss.dtype == torch.float32 and torch.equal(loss, expected)
    assert hidden.grad.dtype == torch.bfloat16 and torch.equal(hidden.grad, exact.grad.bfloat16())
    assert torch.equal(model[-1].weight.grad.to_dense(), reference[-1].weight.grad.to_dense())
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model[-1](hidden).topk(2).values.dtype == torch.float32
        assert model.eval()(x).dtype == torch.bfloat16  # as nn.Linear
    with pytest.raises(ValueError, match=r"input: expected torch.float32"):
        model.train()[-1](hidden)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_activation_checkpointing(pattern, sparse, use_reentrant):
    """The recomputation draws the active set of the forward, and is no second step of the schedule, also
    where the forward has built, rehashed or rebuilt tables."""
    plain = make(pattern=pattern, sparse=sparse, rebuild_every=2)
    saving = copy.deepcopy(plain)
    optimizers = [slide_torch.optim.Adam(m.parameters(), lr=0.1) for m in (plain, saving)]
    drawn = []
    for one, optimizer in zip((plain, saving), optimizers, strict=True):
        torch.manual_seed(7)
        for seed in range(8):
            x, y = batch(seed)
            x.requires_grad_()

            def forward(x, y, one=one):
                return F.cross_entropy(one(x), y)

            saved = one is saving
            loss = (
                checkpoint(forward, x, y, use_reentrant=use_reentrant) if saved else forward(x, y)
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            drawn.append((loss.detach(), x.grad, *grads_of(one)))
    for one, other in zip(drawn[:8], drawn[8:], strict=True):
        # reentrant: a first pass without gradients brings no rehash
        assert use_reentrant or all(map(torch.equal, one, other))
    expected, found = plain[-1].stats(), saving[-1].stats()
    assert found["steps"] == expected["steps"] == 8
    assert abs(found["rehashes"] - expected["rehashes"]) <= use_reentrant and found["rehashes"] > 1
    assert sparse is False or not stale_unmarked(saving[-1]).any()


def test_reentrant_checkpointing_recomputes_the_same_set():
    model = make(sparse=True)
    loss_of(model)
    plain = copy.deepcopy(model)
    x, y = batch()
    x.requires_grad_()
    torch.manual_seed(3)
    checkpoint(lambda x: F.cross_entropy(model(x), y), x, use_reentrant=True).backward()
    grad, x.grad = x.grad, None
    torch.manual_seed(3)
    F.cross_entropy(plain(x), y).backward()
    assert torch.equal(x.grad, grad)


def test_the_same_seed_again_after_a_step_is_a_new_step():
    model = make(sparse=True)
    optimizer = slide_torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(6):
        optimizer.zero_grad()
        loss_of(model, seed=1).backward()  # a caller who sets the seed anew in every step
        optimizer.step()
    assert model[-1].stats()["steps"] == 6 and model[-1].stats()["rehashes"] == 2


# --- parameters that are not just Parameters --------------------------------------------------------


@pytest.mark.parametrize("pattern", PATTERNS)
def test_functional_call(pattern):
    """Loss and gradients are those of the parameters given, though the loss comes after the call."""
    model, other = make(pattern=pattern), make(pattern=pattern)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(-1.5)
    given = {name: p.detach().clone().requires_grad_() for name, p in other.named_parameters()}
    x, y = batch()
    torch.manual_seed(1)
    loss = F.cross_entropy(torch.func.functional_call(model, given, (x,)), y)
    loss.backward()
    expected = loss_of(other)
    expected.backward()
    assert torch.equal(loss, expected)
    for p, (name, q) in zip(other.parameters(), given.items(), strict=True):
        assert torch.equal(p.grad, q.grad), name
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("how", ["weight_norm", "spectral_norm"])
def test_parametrizations(how):
    model = make()
    reference = make(budget=N)
    for one in (model, reference):
        getattr(nn.utils.parametrizations, how)(one[-1], "weight")
    model[-1].tables.options = reference[-1].tables.options  # all neurons active: exact
    x, y = batch()
    with nn.utils.parametrize.cached():  # one weight: spectral_norm's iteration goes on in training
        logits = F.linear(model[:2](x), model[-1].weight, model[-1].bias)
        losses = [F.cross_entropy(logits, y), F.cross_entropy(model(x), y)]
    parameters = list(model.parameters())
    expected, found = (torch.autograd.grad(loss, parameters, retain_graph=True) for loss in losses)
    torch.testing.assert_close(losses[1], losses[0])
    torch.testing.assert_close(found, expected)
    assert all(gradient.any() for gradient in found)


def test_parametrization_with_sparse_gradients_is_refused():
    model = make(sparse=True)
    nn.utils.parametrizations.weight_norm(model[-1], "weight")
    with pytest.raises(ValueError, match=r"expected a leaf .* use sparse=False"):
        loss_of(model)
    assert model[-1].stats()["steps"] == 0


def test_float16_parameters_are_refused():
    with pytest.raises(ValueError, match=r"float64 or bfloat16, got torch.float16"):
        LSHLinear.from_linear(nn.Linear(D, N).half())
    model = make().half()
    with pytest.raises(ValueError, match=r"float64 or bfloat16, got torch.float16"):
        F.cross_entropy(model[-1](torch.zeros(2, D).half()), torch.zeros(2, dtype=torch.int64))


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
            assert not head.tables.dirty.any() and head.tables.pending.rows() is None
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


@pytest.mark.parametrize("use_buffers", [False, True])
def test_averaged_model(use_buffers):
    model = make()
    averaged = AveragedModel(model, use_buffers=use_buffers)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    total = torch.zeros(N, D)
    for seed in range(4):
        optimizer.zero_grad()
        loss_of(model, seed).backward()
        optimizer.step()
        averaged.update_parameters(model)
        total += model[-1].weight.detach()
    x, _ = batch()
    torch.testing.assert_close(averaged.module[-1].weight, total / 4)
    assert averaged.eval()(x).shape == (B, N)
    assert loss_of(averaged.train()).isfinite()
    assert model[-1].stats()["steps"] == 4 and not list(model.buffers())


# --- threads and processes --------------------------------------------------------------------------


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 12

    def __getitem__(self, index):
        # a worker computes, with the operators too, as a preprocessing step might
        x = torch.full((D,), float(index))
        return slide_torch.ops.mean_row(x.unsqueeze(0), None, 1), index


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_data_loader_workers(start):
    """Workers start while layers with tables live in the parent, which has used its threads."""
    model = make(sparse=True)
    torch.set_num_threads(2)
    loss_of(model).backward()
    context = multiprocessing.get_context(start)
    loader = DataLoader(Rows(), batch_size=4, num_workers=1, multiprocessing_context=context)
    seen = 0
    for x, index in loader:
        assert torch.equal(x[:, 0], index.float())
        F.cross_entropy(model(x), index).backward()
        seen += len(x)
    assert seen == 12


@pytest.mark.parametrize("pattern", PATTERNS)
def test_several_threads(pattern):
    """Each thread trains a layer of its own, and all read one in eval; results are those of one thread."""
    shared = make().eval()

    def train(seed):
        generator = torch.Generator().manual_seed(seed)
        layer = copy.deepcopy(layers[seed])
        for step in range(30):
            x, y = batch(100 * seed + step)
            loss = slide_torch.functional.lsh_linear_cross_entropy(
                x, layer.weight, y, linear_bias=layer.bias, tables=layer.tables, sparse=True,
                generator=generator,
            )  # fmt: skip
            for p, g in zip(layer.parameters(), torch.autograd.grad(loss, list(layer.parameters())),
                            strict=True):  # fmt: skip
                p.data.sub_(g.to_dense(), alpha=0.1)
            with torch.no_grad():
                evaluations[seed] = shared(x)
        return [p.detach() for p in layer.parameters()]

    layers = [make(sparse=True, pattern=pattern, budget=9)[-1] for _ in range(4)]
    evaluations = {}
    expected = [train(seed) for seed in range(4)]
    expected_evaluations = dict(evaluations)
    found = [None] * 4

    def run(seed):
        found[seed] = train(seed)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in range(4):
        assert all(map(torch.equal, found[seed], expected[seed]))
        assert torch.equal(evaluations[seed], expected_evaluations[seed])


def test_threads_changed_between_steps():
    results = []
    for counts in ((1, 1, 1, 1), (2, 1, 2, 1)):
        model = make(sparse=True)
        optimizer = slide_torch.optim.Adam(model[-1].parameters(), lr=0.1)
        for seed, count in enumerate(counts):
            torch.set_num_threads(count)
            optimizer.zero_grad()
            F.cross_entropy(model[-1](batch(seed)[0]), batch(seed)[1]).backward()
            optimizer.step()
        results.append(model[-1].weight.detach())
    assert torch.equal(*results)


LEAVES = """
import threading, torch, torch.nn.functional as F
from slide_torch import LSHLinear, LSHOptions
torch.set_num_threads(2)
layer = LSHLinear(8, 6000, options=LSHOptions(budget=5, tail=6), sparse=True)
def train():
    for _ in range(20):
        F.cross_entropy(layer(torch.randn(64, 8)), torch.randint(6000, (64,))).backward()
train()
threading.Thread(target=train).start()
print("done")
"""


def test_the_interpreter_exits():
    """With its thread pool started, with live tables, while another thread still trains."""
    answer = subprocess.run(
        [sys.executable, "-c", LEAVES], capture_output=True, text=True, timeout=120
    )
    assert answer.stdout == "done\n" and answer.returncode == 0, answer.stderr


def test_tensor_dataset_training_loop_with_generator_state():
    """The sampler draws from torch's generator: restoring it restores the run."""
    model = make(sparse=True)
    data = TensorDataset(*batch())
    state = torch.get_rng_state()
    losses = []
    for _ in range(2):
        torch.set_rng_state(state)
        one = copy.deepcopy(model)
        for x, y in DataLoader(data, batch_size=2, shuffle=True):
            losses.append(F.cross_entropy(one(x), y).item())
    assert losses[:3] == losses[3:]
