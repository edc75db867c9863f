"""Adam(..., fuse_backward=True): the weight's update inside backward."""

import copy
import functools
import gc
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import nn

from slide_torch import LSHFeedForward, LSHLinear, LSHOptions
from slide_torch.optim import Adam

OPS = torch.ops.slide_torch
D, N, B = 20, 500, 12
SHARED = LSHOptions(tail=30, K=4, L=8)
PER_SAMPLE = LSHOptions(pattern="per_sample", budget=40, tail=9, K=4, L=8)
EXACT = LSHOptions(budget=N)


def model(options=SHARED, dtype=torch.float32, bias=True, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(D, D), nn.Tanh(), LSHLinear(D, N, bias, options=options, sparse=True)
    ).to(dtype)


def train(net, optimizer, steps=5, seed=1, scheduler=None, labels=1, **loss_options):
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    losses = []
    for _ in range(steps):
        x = torch.randn(B, D, generator=generator, dtype=net[2].weight.dtype)
        y = torch.randint(N, (B, labels), generator=generator)
        optimizer.zero_grad()
        loss = net(x).cross_entropy(y, **loss_options)
        loss.backward()
        optimizer.step()
        if scheduler:
            scheduler.step()
        losses.append(loss.item())
    return losses


def same_everywhere(a, b):
    for left, right in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize("options", [SHARED, PER_SAMPLE, EXACT], ids=["shared", "sample", "exact"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("decoupled", [False, True])
def test_same_bits_as_two_steps(options, dtype, bias, decoupled):
    loss_options = dict(labels=3, decoupled=True) if decoupled else {}
    nets, losses, states = [], [], []
    for fuse in (False, True):
        net = model(options, dtype, bias)
        optimizer = Adam(net.parameters(), lr=0.02, weight_decay=0.1, fuse_backward=fuse)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        losses.append(train(net, optimizer, scheduler=schedule, **loss_options))
        nets.append(net)
        states.append(optimizer.state_dict()["state"])
    same_everywhere(*nets)
    assert losses[0] == losses[1] and losses[0][0] != losses[0][-1]
    assert states[0].keys() == states[1].keys()
    for index, state in states[0].items():
        for key, value in state.items():
            assert torch.equal(value, states[1][index][key])


@functools.cache
def backward_both_ways(dtype, moments_dtype):
    """By width, after the per-sample pattern's backward in two steps and after the fused one: weight, moments
    and the gradients of input and bias. Rows meet from no sample to all."""
    results = {}
    for width in (1, 3, 16, 17, 32, 64, 100, 128, 130, 257):
        generator = torch.Generator().manual_seed(width)
        weight = torch.randn(60, width, generator=generator, dtype=dtype)
        x = torch.randn(B, width, generator=generator, dtype=dtype)
        rows = torch.arange(0, 60, 2)
        met = torch.rand(B, 30, generator=generator) < torch.linspace(0, 1, 30)
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), met.sum(1).cumsum(0)])
        order = met.nonzero()[:, 1].argsort(stable=True).int()
        pair_offsets = torch.cat([torch.zeros(1, dtype=torch.int64), met.sum(0).cumsum(0)])
        samples = met.nonzero()[order.long(), 0].int()
        labels = torch.arange(B + 1), offsets[1:] - 1, torch.ones(B, dtype=dtype)
        active = rows, offsets, pair_offsets, order, samples
        softmax = None, *active, None, *labels, 1.0, False, True
        _, *kept = OPS.sample_cross_entropy(x, weight, *softmax)
        arguments = torch.rand(B, generator=generator, dtype=dtype), x
        both = []
        for fuse in (False, True):
            param = weight.clone()
            moments = [
                torch.rand(weight.shape, generator=torch.Generator().manual_seed(i), dtype=dtype)
                for i in range(2)
            ]
            moments = [moment.to(moments_dtype) for moment in moments]
            adam = {"lr": 0.1, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.3}
            adam |= {"step": 3, "maximize": width % 2 == 0}
            given = *arguments, param, *active, *labels, *kept, False
            if fuse:
                op = OPS.sample_cross_entropy_backward_adam_
                grads = op(*given, True, *moments, *adam.values())
            else:
                op = OPS.sample_cross_entropy_backward
                grad_input, grad_rows, grad_bias = op(*given, True, True)
                OPS.adam_rows_(param, *moments, rows, grad_rows, *adam.values())
                grads = grad_input, grad_bias
            both.append((param, *moments, *grads))
        results[width] = both
    return results


@pytest.mark.parametrize("width", (1, 3, 16, 17, 32, 64, 100, 128, 130, 257))
@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.float32, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.float64, torch.float64),
    ],
    ids=["float32", "bfloat16_moments", "float64"],
)
def test_same_bits_as_two_steps_at_any_width(width, dtypes):
    two_steps, fused = backward_both_ways(*dtypes)[width]
    names = ("weight", "exp_avg", "exp_avg_sq", "grad_input", "grad_bias")
    for name, a, b in zip(names, two_steps, fused, strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("options", [SHARED, PER_SAMPLE], ids=["shared", "sample"])
def test_same_bits_at_any_number_of_threads(options):
    nets = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        net = model(options)
        net[0] = net[1] = nn.Identity()  # torch's products may differ by the number of threads
        train(net, Adam(net.parameters(), lr=0.02, fuse_backward=True))
        nets.append(net)
    same_everywhere(nets[0], nets[1])
    same_everywhere(nets[0], nets[2])


def test_there_is_no_gradient_and_rows_move_in_backward():
    net = model()
    optimizer = Adam(net.parameters(), lr=0.02, fuse_backward=True)
    before = net[2].weight.detach().clone()
    F.cross_entropy(net(torch.randn(B, D)), torch.arange(B)).backward()
    assert net[2].weight.grad is None and net[0].weight.grad is not None
    moved = (net[2].weight != before).any(1)
    assert moved[:B].all() and not moved.all()
    optimizer.step()
    assert torch.equal((net[2].weight != before).any(1), moved)


def test_dense_gradients_are_handed_over_as_ever():
    nets = []
    for fuse in (False, True):
        net = model()
        net[2].sparse = False
        train(net, Adam(net.parameters(), lr=0.02, fuse_backward=fuse))
        nets.append(net)
    same_everywhere(*nets)


@pytest.mark.parametrize("options", [SHARED, PER_SAMPLE], ids=["shared", "sample"])
def test_binary_cross_entropy_hands_its_gradient_to_the_step(options):
    """It has no fused form: the result is that of an optimizer that does not fuse."""
    nets = []
    for fuse in (False, True):
        net = model(options)
        optimizer = Adam(net.parameters(), lr=0.02, fuse_backward=fuse)
        before = net[2].weight.detach().clone()
        torch.manual_seed(1)
        for _ in range(4):
            optimizer.zero_grad()
            net[2](torch.randn(B, D)).binary_cross_entropy_with_logits(torch.arange(B)).backward()
            assert net[2].weight.grad.is_sparse
            optimizer.step()
        assert not torch.equal(net[2].weight, before)
        assert float(optimizer.state[net[2].weight]["step"]) == 4
        train(net, optimizer, 2)  # and cross entropy after it
        nets.append(net)
    same_everywhere(*nets)


def test_label_smoothing_is_refused_before_anything_changes():
    net = model()
    optimizer = Adam(net.parameters(), lr=0.02, fuse_backward=True)
    x, y = torch.randn(B, D), torch.arange(B)
    state = torch.get_rng_state()
    with pytest.raises(NotImplementedError, match=r"label_smoothing: .* set fuse_backward=False"):
        F.cross_entropy(net(x), y, label_smoothing=0.1)
    assert torch.equal(torch.get_rng_state(), state) and not net[2].tables.built
    F.cross_entropy(net(x), y).backward()
    optimizer.step()
    net[2].sparse = False  # dense gradients are not fused
    F.cross_entropy(net(x), y, label_smoothing=0.1).backward()
    optimizer.step()


def test_a_second_backward_is_refused_and_changes_nothing():
    net = model()
    optimizer = Adam(net.parameters(), lr=0.02, fuse_backward=True)
    x, y = torch.randn(B, D), torch.arange(B)
    F.cross_entropy(net(x), y).backward()
    weight = net[2].weight.detach().clone()
    steps = float(optimizer.state[net[2].weight]["step"])
    with pytest.raises(RuntimeError, match="one backward between two steps"):
        F.cross_entropy(net(x), y).backward()
    assert torch.equal(net[2].weight, weight)
    assert float(optimizer.state[net[2].weight]["step"]) == steps == 1
    optimizer.step()
    F.cross_entropy(net(x), y).backward()


def test_a_gradient_from_elsewhere_is_refused_at_the_step():
    net = model()
    optimizer = Adam(net.parameters(), lr=0.02, fuse_backward=True)
    x, y = torch.randn(B, D), torch.arange(B)
    loss = F.cross_entropy(net(x), y)
    (loss + net[2].weight[0, 0]).backward()
    with pytest.raises(RuntimeError, match="another use"):
        optimizer.step()


def test_two_losses_of_one_weight_are_refused_by_torch():
    net = model()
    optimizer = Adam(net.parameters(), lr=0.02, fuse_backward=True)
    x, y = torch.randn(B, D), torch.arange(B)
    losses = F.cross_entropy(net(x), y) + F.cross_entropy(net(x), y + 1)
    with pytest.raises(RuntimeError, match=r"modified by an inplace|one backward between"):
        losses.backward()
    assert optimizer


def test_option_of_a_group_and_bad_values():
    net = model()
    groups = [
        {"params": net[:2].parameters()},
        {"params": net[2].parameters(), "fuse_backward": True, "lr": 0.5},
    ]
    optimizer = Adam(groups, lr=0.02)
    before = net[2].weight.detach().clone()
    F.cross_entropy(net(torch.randn(B, D)), torch.arange(B)).backward()
    step = (net[2].weight - before).abs().max()
    assert 0.49 < step < 0.51  # Adam's first step is the learning rate
    assert optimizer
    with pytest.raises(ValueError, match="fuse_backward: expected a bool, got 1"):
        Adam(net.parameters(), fuse_backward=1)


def test_state_dict_copies_and_death():
    net = model()
    optimizer = Adam(net.parameters(), lr=0.02, fuse_backward=True)
    train(net, optimizer, 2)
    other, copied = copy.deepcopy((net, optimizer))
    stored = io.BytesIO()
    pickle.dump((net, optimizer), stored)
    stored.seek(0)
    third, unpickled = pickle.load(stored)
    loaded_net = copy.deepcopy(net)
    loaded = Adam(loaded_net.parameters(), lr=1.0)
    loaded.load_state_dict(optimizer.state_dict())  # with its fuse_backward
    for a_net, its in ((net, optimizer), (other, copied), (third, unpickled), (loaded_net, loaded)):
        train(a_net, its, 2, seed=5)
        assert a_net[2].weight.grad is None
        same_everywhere(net, a_net)
    del optimizer, its
    gc.collect()
    F.cross_entropy(net(torch.randn(B, D)), torch.arange(B)).backward()
    assert net[2].weight.grad is not None  # nobody is left to update it


def test_a_torch_state_dict_loads_and_a_wrong_state_is_refused():
    net = model()
    theirs = torch.optim.AdamW(net.parameters(), weight_decay=0.0)
    ours = Adam(net.parameters(), fuse_backward=True)
    ours.load_state_dict(theirs.state_dict())
    assert ours.param_groups[0]["fuse_backward"]
    ours.state[net[2].weight] = {"exp_avg": torch.zeros(3), "exp_avg_sq": torch.zeros(3)}
    before = net[2].weight.detach().clone()
    with pytest.raises(ValueError, match="exp_avg"):
        F.cross_entropy(net(torch.randn(B, D)), torch.arange(B)).backward()
    assert torch.equal(net[2].weight, before)


# --- backward that is asked for something else --------------------------------------------------------

FUSABLE = pytest.mark.parametrize(
    "options", [SHARED, PER_SAMPLE, EXACT], ids=["shared", "sample", "exact"]
)


def head(options=SHARED, fuse=True):
    """A layer, its fusing optimizer and the loss of an input with a gradient."""
    torch.manual_seed(0)
    layer = LSHLinear(D, N, options=options, sparse=True)
    optimizer = Adam(layer.parameters(), lr=0.02, fuse_backward=fuse)
    x = torch.randn(B, D, requires_grad=True)
    return layer, optimizer, x, F.cross_entropy(layer(x), torch.arange(B))


@FUSABLE
@pytest.mark.parametrize("asked", ["grad_input", "grad_bias", "grad_all", "inputs_input"])
def test_what_backward_is_not_asked_for_is_not_trained(options, asked):
    plain, _, x, loss = head(options, fuse=False)
    expected = torch.autograd.grad(loss, [x, plain.weight, plain.bias])

    layer, optimizer, x, loss = head(options)
    before = layer.weight.detach().clone()
    version = layer.weight._version
    assert torch.equal(before, plain.weight)
    if asked == "inputs_input":
        loss.backward(inputs=[x], retain_graph=True)
        found = {0: x.grad}
    else:
        wanted = {"grad_input": [0], "grad_bias": [2], "grad_all": [0, 1, 2]}[asked]
        leaves = [(x, layer.weight, layer.bias)[i] for i in wanted]
        found = dict(zip(wanted, torch.autograd.grad(loss, leaves, retain_graph=True), strict=True))
    for index, gradient in found.items():
        assert torch.equal(gradient.to_dense(), expected[index].to_dense())
    assert torch.equal(layer.weight, before) and layer.weight._version == version
    assert not optimizer.state and layer.weight.grad is None and layer.bias.grad is None

    # a backward that is asked for the weight trains it, once
    loss.backward(inputs=[layer.weight])
    assert not torch.equal(layer.weight, before) and layer.weight.grad is None
    assert float(optimizer.state[layer.weight]["step"]) == 1
    optimizer.step()
    F.cross_entropy(layer(x), torch.arange(B)).backward()


@FUSABLE
def test_a_weight_that_is_frozen_before_backward_stays(options):
    layer, optimizer, x, loss = head(options)
    before = layer.weight.detach().clone()
    layer.weight.requires_grad_(False)
    loss.backward()
    assert torch.equal(layer.weight, before) and layer.weight.grad is None and not optimizer.state
    assert x.grad is not None and layer.bias.grad is not None


@FUSABLE
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_trains_as_without(options, reentrant):
    nets = []
    for fuse in (False, True):
        layer, optimizer, x, _ = head(options, fuse)
        torch.manual_seed(3)

        def loss(x, layer=layer):
            return F.cross_entropy(layer(x), torch.arange(B))

        value = torch.utils.checkpoint.checkpoint(loss, x, use_reentrant=reentrant)
        if not reentrant:  # torch refuses it of reentrant ones
            before = layer.weight.detach().clone()
            torch.autograd.grad(value, x)
            assert torch.equal(layer.weight, before) and layer.weight.grad is None
            value = torch.utils.checkpoint.checkpoint(loss, x, use_reentrant=reentrant)
        value.backward()
        optimizer.step()
        nets.append(layer)
    same_everywhere(*nets)


@pytest.mark.parametrize("hook", ["register_hook", "register_post_accumulate_grad_hook"])
def test_hooks_that_wait_for_the_gradient_are_refused(hook):
    layer, optimizer, _, loss = head()
    before = layer.weight.detach().clone()
    handle = getattr(layer.weight, hook)(lambda grad: None)
    with pytest.raises(RuntimeError, match="fuse_backward: expected a parameter without hooks"):
        loss.backward(retain_graph=True)
    assert torch.equal(layer.weight, before)
    handle.remove()
    loss.backward()
    assert not torch.equal(layer.weight, before) and optimizer.state


def test_create_graph_is_refused():
    layer, optimizer, _, loss = head()
    before = layer.weight.detach().clone()
    with pytest.raises(RuntimeError, match="fuse_backward: expected create_graph=False"):
        loss.backward(create_graph=True)
    assert torch.equal(layer.weight, before) and not optimizer.state


@pytest.mark.parametrize("finite", [True, False])
@pytest.mark.parametrize("unscaled", [True, False])
def test_a_grad_scaler_is_refused_whether_it_skips_or_not(finite, unscaled):
    layer, optimizer, _, loss = head()
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(loss if finite else loss + layer.bias[0] * torch.inf).backward()
    if unscaled:
        scaler.unscale_(optimizer)
    with pytest.raises(RuntimeError, match=r"expected no GradScaler.* set fuse_backward=False"):
        scaler.step(optimizer)
    assert not hasattr(optimizer, "found_inf") and not hasattr(optimizer, "grad_scale")


def test_a_grad_scaler_where_nothing_is_fused():
    """A disabled one, and one beside binary cross entropy, whose gradient the step is given."""
    x, y = torch.randn(B, D), torch.arange(B)
    layer, optimizer, *_ = head()
    disabled = torch.amp.GradScaler("cpu", enabled=False)
    for _ in range(2):
        disabled.scale(F.cross_entropy(layer(x), y)).backward()
        disabled.step(optimizer)
        disabled.update()
    layers = []
    for scaled in (False, True):
        layer, optimizer, *_ = head()
        scaler = torch.amp.GradScaler("cpu", enabled=scaled, init_scale=4.0)
        torch.manual_seed(1)
        for factor in (1.0, torch.inf, 1.0) if scaled else (1.0, 1.0):
            optimizer.zero_grad()
            loss = layer(x).binary_cross_entropy_with_logits(y) * factor
            scaler.scale(loss).backward()
            scaler.step(optimizer)  # skips the second
            scaler.update()
        layers.append(float(optimizer.state[layer.weight]["step"]))
    assert layers == [2, 2]


def test_a_hidden_layer_is_handed_its_gradients():
    torch.manual_seed(0)
    block = LSHFeedForward(D, N, options=PER_SAMPLE, sparse=True)
    optimizer = Adam(block.parameters(), lr=0.02, fuse_backward=True)
    before = [p.detach().clone() for p in block.parameters()]
    x = torch.randn(B, D, requires_grad=True)
    block(x).square().sum().backward(inputs=[x])
    assert all(map(torch.equal, before, block.parameters())) and not optimizer.state
    block(x).square().sum().backward()
    assert all(map(torch.equal, before, block.parameters()))
    assert block.first.weight.grad.is_sparse and block.second_weight.grad.is_sparse
    optimizer.step()
    assert not any(map(torch.equal, before, block.parameters()))
