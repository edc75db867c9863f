"""torch.compile(fullgraph=True) and torch.export: one graph, the results of eager mode."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers import small_model as make
from torch import nn

import slide_torch

N, D, B = 60, 8, 5

CASES = {
    "shared": {},
    "shared_importance": {"correction": "importance"},
    "per_sample": {"pattern": "per_sample"},
    "per_sample_importance": {"pattern": "per_sample", "correction": "importance"},
    "no_tables": {"budget": 0},
    "every_neuron": {"budget": N},
    "kmeans_reranked": {"family": "kmeans", "K": 3, "L": 1, "probes": 2, "rerank": 20},
    "log_uniform": {"tail_distribution": "log_uniform", "correction": "importance"},
    "per_sample_log_uniform": {
        "tail_distribution": "log_uniform",
        "correction": "importance",
        "pattern": "per_sample",
    },
    "exact_candidates": {"family": "exact"},
}


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    torch.set_num_threads(1)
    yield
    torch._dynamo.reset()


def class_indices():
    return torch.randint(N, (B,))


def label_lists():
    return torch.randint(N, (B, 3)).masked_fill(torch.rand(B, 3) < 0.4, -100)


def train(model, loss_of, *, make_target=class_indices, steps=7):
    optimizer = slide_torch.optim.Adam(model.parameters(), lr=0.1)
    torch.manual_seed(1)
    losses, grads = [], []
    for _ in range(steps):
        loss = loss_of(torch.randn(B, D), make_target())
        optimizer.zero_grad()
        loss.backward()
        grads.append([p.grad.to_dense() for p in model.parameters()])
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses), grads


def check_alike(model, losses_of, backend, **arguments):
    """Trains a copy in eager mode and ``model`` compiled, both from ``losses_of(model)``."""
    eager = copy.deepcopy(model)
    expected, expected_grads = train(eager, losses_of(eager), **arguments)
    compiled = torch.compile(losses_of(model), fullgraph=True, backend=backend)
    with torch._dynamo.config.patch(error_on_recompile=True):
        found, grads = train(model, compiled, **arguments)
    # inductor adds a batch's losses in an order of its own
    torch.testing.assert_close(found, expected, rtol=1e-5 if backend == "inductor" else 0, atol=0)
    for one, other in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)
    assert all(
        p.grad.layout == e.grad.layout
        for p, e in zip(model.parameters(), eager.parameters(), strict=True)
    )
    stats, expected_stats = model[-1].stats(), eager[-1].stats()
    assert stats.pop("upkeep_seconds") >= 0 and expected_stats.pop("upkeep_seconds") >= 0
    assert stats == expected_stats
    if model[-1].tables.uses_tables:
        assert stats["rehashes"] == 2
        assert torch.equal(model[-1].tables.codes, eager[-1].tables.codes)
        assert torch.equal(model[-1].tables.dirty, eager[-1].tables.dirty)


def cross_entropy_of(model):
    return lambda x, y: F.cross_entropy(model(x), y)


# Each case with row-sparse gradients under one loss and with dense ones under the other, so that every two of
# case, loss and layout meet.
SPARSE = {case: place % 2 == 1 for place, case in enumerate(CASES)}


@pytest.mark.parametrize("case", CASES)
def test_training_equals_eager(case):
    check_alike(make(sparse=SPARSE[case], **CASES[case]), cross_entropy_of, "aot_eager")


@pytest.mark.parametrize("case,sparse", [("shared", True), ("per_sample_importance", False)])
def test_training_equals_eager_with_inductor(case, sparse):
    check_alike(make(sparse=sparse, **CASES[case]), cross_entropy_of, "inductor")


def criterion_of(model, criterion):
    return lambda x, y: criterion(model(x), y)


LOSSES = {
    "criterion": lambda model: criterion_of(model, nn.CrossEntropyLoss()),
    "log_softmax": lambda model: lambda x, y: F.nll_loss(F.log_softmax(model(x), -1), y),
    "scaled_sum": lambda model: lambda x, y: F.cross_entropy(model(x) / 0.7, y, reduction="sum"),
    "none": lambda model: (
        lambda x, y: F.cross_entropy(model(x), y, reduction="none").square().sum()
    ),
    "weighted": lambda model: (
        lambda x, y: F.cross_entropy(model(x), y, weight=torch.linspace(0.5, 2.0, N))
    ),
    "reshaped": lambda model: (
        lambda x, y: F.cross_entropy(model(x.view(B, 1, D)).view(-1, N), y.view(-1))
    ),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_losses(loss):
    check_alike(make(), LOSSES[loss], "aot_eager")


def binary_of(**options):
    def losses_of(model):
        return lambda x, y: model(x).binary_cross_entropy_with_logits(y, **options)

    return losses_of


@pytest.mark.parametrize("case", CASES)
def test_binary_cross_entropy(case):
    check_alike(make(sparse=not SPARSE[case], **CASES[case]), binary_of(), "aot_eager")


def test_binary_cross_entropy_with_weights():
    losses_of = binary_of(weight=torch.linspace(0.5, 2.0, N), pos_weight=torch.tensor(3.0))
    check_alike(make(), losses_of, "aot_eager", make_target=label_lists)


def decoupled_of(model):
    return lambda x, y: model(x).cross_entropy(y, decoupled=True)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_decoupled_cross_entropy(case, sparse):
    model = make(sparse=sparse, **CASES[case])
    check_alike(model, decoupled_of, "aot_eager", make_target=label_lists)


def test_decoupled_cross_entropy_with_inductor():
    check_alike(make(sparse=True), decoupled_of, "inductor", make_target=label_lists)


def smoothed_of(model):
    return lambda x, y: F.cross_entropy(model(x), y, label_smoothing=0.2)


@pytest.mark.parametrize(
    "case,backend",
    [
        ("shared", "aot_eager"),
        ("shared_importance", "inductor"),
        ("every_neuron", "aot_eager"),
    ],
)
def test_label_smoothing(case, backend):
    check_alike(make(**CASES[case]), smoothed_of, backend, make_target=label_lists)


@pytest.mark.parametrize("options", [{"sparse": True}, CASES["per_sample_importance"]])
def test_label_smoothing_that_no_graph_holds(options):
    model = make(**options)
    x, y = torch.randn(B, D), class_indices()
    with pytest.raises(Exception, match=r"label_smoothing: expected 0.0 under torch.compile"):
        torch.compile(smoothed_of(model), fullgraph=True, backend="aot_eager")(x, y)
    torch.compile(smoothed_of(model), backend="aot_eager")(x, y).backward()  # breaks the graph


TARGETS = {
    "label_lists": label_lists,
    "ignored": lambda: class_indices().index_fill(0, torch.tensor([0, 3]), -100),
    "probabilities": lambda: torch.rand(B, N).softmax(1),
}


@pytest.mark.parametrize("target", TARGETS)
def test_targets(target):
    check_alike(make(bias=False), cross_entropy_of, "aot_eager", make_target=TARGETS[target])


def test_new_batch_sizes_recompile_once_at_most():
    model = make(sparse=True)
    calls = []

    def backend(graph, inputs):
        calls.append(graph)
        return graph.forward

    loss_of = torch.compile(cross_entropy_of(model), fullgraph=True, backend=backend)
    for size in (5, 5, 7, 9, 4, 12):
        loss_of(torch.randn(size, D), torch.randint(N, (size,))).backward()
    assert 1 <= len(calls) <= 2


@pytest.mark.parametrize("capture", [False, True])
def test_graphs_without_fullgraph(capture):
    """Sizes that depend on data break them, unless torch is told to capture these."""
    model, graphs = make(sparse=True), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(cross_entropy_of(model), backend=backend)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=capture):
        losses, _ = train(model, compiled)
    eager = make(sparse=True)
    torch.testing.assert_close(losses, train(eager, cross_entropy_of(eager))[0])
    assert len(graphs) == 1 if capture else len(graphs) > 1


def test_two_draws_from_the_same_input_differ():
    """Drawing is random: equal calls are not merged into one."""
    model = make(budget=0)

    @torch.compile(fullgraph=True, backend="inductor")
    def losses(x, y):
        return F.cross_entropy(model(x), y), F.cross_entropy(model(x), y)

    one, two = losses(torch.randn(B, D), class_indices())
    assert one != two


def test_two_layers_and_a_copy_keep_to_their_own_tables():
    first, second = make(), make(budget=7)
    first_copy = copy.deepcopy(first)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def loss_of(one, two, x, y):
        return F.cross_entropy(one(x), y) + F.cross_entropy(two(x), y)

    x, y = torch.randn(B, D), class_indices()
    loss_of(first, second, x, y).backward()
    loss_of(first, second, x, y).backward()
    assert first[-1].stats()["steps"] == second[-1].stats()["steps"] == 2
    loss_of(first_copy, second, x, y).backward()
    assert [m[-1].stats()["steps"] for m in (first, first_copy, second)] == [2, 1, 3]


def test_a_whole_step_with_the_optimizer():
    """Optimizer and loss in one compiled function; torch's optimizer may break the graph."""
    model, eager = make(), make()
    for one in (model, eager):
        optimizer = torch.optim.SGD(one.parameters(), lr=0.1)

        def step(x, y, one=one, optimizer=optimizer):
            optimizer.zero_grad()
            F.cross_entropy(one(x), y).backward()
            optimizer.step()

        step = torch.compile(step, backend="aot_eager") if one is model else step
        torch.manual_seed(2)
        for _ in range(4):
            step(torch.randn(B, D), class_indices())
    for p, q in zip(model.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(p, q)
    assert model[-1].stats()["rehashes"] == eager[-1].stats()["rehashes"] == 1


def test_compiled_module_and_eager_loss():
    """``model.compile()`` alone: the head's SampledLogits leaves the graph."""
    model, eager = make(sparse=True), make(sparse=True)
    model.compile(backend="aot_eager")
    expected, _ = train(eager, cross_entropy_of(eager))
    found, _ = train(model, cross_entropy_of(model))
    torch.testing.assert_close(found, expected)


def test_eval():
    model = make().eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(B, D)
    torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.parametrize("pattern", ["shared", "per_sample"])
def test_fusing_optimizer_steps_outside_the_graph(pattern):
    """The gradient is handed over, and the update is that of eager mode."""
    found = []
    for compiled in (False, True):
        model = make(sparse=True, pattern=pattern)
        loss_of = cross_entropy_of(model)
        if compiled:
            loss_of = torch.compile(loss_of, fullgraph=True, backend="aot_eager")
        optimizer = slide_torch.optim.Adam(model.parameters(), lr=0.1, fuse_backward=True)
        torch.manual_seed(1)
        for _ in range(3):
            loss = loss_of(torch.randn(B, D), class_indices())
            optimizer.zero_grad()
            loss.backward()
            assert (model[-1].weight.grad is None) != compiled
            optimizer.step()
        found.append(model[-1].weight.detach().clone())
    torch.testing.assert_close(*found)


@pytest.mark.parametrize(
    "make_optimizer",
    [
        lambda p: slide_torch.optim.Adam(p, lr=0.1),
        lambda p: slide_torch.optim.Adam(p, lr=0.1, fuse_backward=True),
        lambda p: slide_torch.optim.SGD(p, lr=0.1, momentum=0.9),
        lambda p: slide_torch.optim.Adagrad(p, lr=0.1),
    ],
    ids=["adam", "adam_fused", "sgd", "adagrad"],
)
def test_a_compiled_training_step_is_that_of_eager_mode(make_optimizer):
    """The graph breaks at backward and at the optimizer, whose every state moves as ever (and, unless dynamo
    is told otherwise, at the draw: test_a_whole_step_with_the_optimizer)."""
    found = []
    for compiled in (False, True):
        model = make(sparse=True)
        optimizer = make_optimizer(model.parameters())
        loss_of = cross_entropy_of(model)

        def step(x, y, optimizer=optimizer, loss_of=loss_of):
            optimizer.zero_grad()
            loss_of(x, y).backward()
            optimizer.step()

        if compiled:
            step = torch.compile(step, backend="aot_eager")
        torch.manual_seed(1)
        with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
            for _ in range(3):
                step(torch.randn(B, D), class_indices())
        found.append([*model.parameters()])
        found[-1] += [v for p in model.parameters() for v in optimizer.state[p].values()]
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_export_of_eval():
    model = make().eval()
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(model, (torch.randn(B, D),), dynamic_shapes=({0: batch},))
    for size in (2, 9):
        x = torch.randn(size, D)
        assert torch.equal(program.module()(x), model(x))
    assert set(program.state_dict) == set(model.state_dict())


def test_refusals():
    model = make()
    tables = model[-1].tables
    x, y = torch.randn(B, D), class_indices()

    def with_generator(x, y):
        return slide_torch.functional.lsh_linear_cross_entropy(
            x, model[-1].weight, y, linear_bias=model[-1].bias, tables=tables,
            generator=torch.default_generator,
        )  # fmt: skip

    with pytest.raises(Exception, match="generator"):
        torch.compile(with_generator, fullgraph=True, backend="eager")(x, y)
    compiled = torch.compile(cross_entropy_of(model), fullgraph=True, backend="aot_eager")
    compiled(x, y)
    with pytest.raises(ValueError, match=r"target: expected class indices in \[0, 60\)"):
        compiled(x, y + N)
