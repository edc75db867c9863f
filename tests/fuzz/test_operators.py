"""Every operator with arguments that are right, nearly right and wrong: it returns, or raises an error that
says something and has changed nothing. A process of its own makes the calls: a crash is a failed test.

``SLIDE_TORCH_FUZZ_SECONDS`` sets how long; ``SLIDE_TORCH_FUZZ_SEED`` which calls. A failure names the command
that repeats it.
"""

import argparse
import itertools
import os
import random
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch
from helpers import FUZZ_SECONDS, FUZZ_SEED, python_path
from sample_inputs import sample_inputs

# bytes of address space beyond what the imports take: large requests fail instead of swapping
ROOM = 4 << 30

# (NotImplementedError is a RuntimeError; IndexError is torch's own, of index_select)
ALLOWED = (RuntimeError, ValueError, TypeError, IndexError, MemoryError)
# what torch's stable ABI says where the reason was lost
LOST = "API call failed"

NOT_CALLED = {
    "draw_step": "takes a ticket for live tables, which its wrapper made in the same call",
}
# What build_tables made is not checked again at every step: it would cost more than retrieval itself.
TRUSTED = {("retrieve", "table_offsets"), ("retrieve", "table_ids")}

DTYPES = (
    *(torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.bool, torch.complex64),
    *(torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64),
)
INTEGERS = (
    *(-(2**63), -(2**31), -7, -1, 0, 1, 2, 3, 5, 8, 16, 24, 25, 64, 254, 255, 1000),
    *(2**31 - 1, 2**31, 2**32, 2**40, 2**53, 2**60, 2**61, 2**62, 2**63 - 1),
)
FLOATS = (float("nan"), float("inf"), -float("inf"), 0.0, -1.0, 1e-300, 1e300, 0.5, 2.0)
SIZES = (0, 1, 2, 7, 33, 2**24, 2**24 + 1, 2**31, 2**40, 2**61)


def all_samples():
    """(name, arguments) of valid calls; the same in every process."""
    torch.manual_seed(0)
    return [
        (name, tuple(arguments))
        for name, samples in sample_inputs().items()
        if name not in NOT_CALLED
        for arguments in samples()
    ]


def operators():
    names = torch._C._dispatch_get_all_op_names()
    return sorted(n.removeprefix("slide_torch::") for n in names if n.startswith("slide_torch::"))


def content(choose, t):
    """Other values of the same dtype and shape."""
    if t.numel() == 0:
        return t
    if t.is_floating_point() or t.is_complex():
        value = choose.choice((*FLOATS, 1e38))
        t.view(-1)[choose.randrange(t.numel())] = value if abs(value) < 1e38 else float("inf")
        return t
    limits = (
        (0, 1) if t.dtype == torch.bool else (torch.iinfo(t.dtype).min, torch.iinfo(t.dtype).max)
    )
    values = [v for v in (*INTEGERS, 4, 6, 39, 40, 41) if limits[0] <= v <= limits[1]]
    kind = choose.randrange(4)
    if kind == 0:
        t.view(-1)[choose.randrange(t.numel())] = choose.choice(values)
    elif kind == 1:
        t = t.flatten()[torch.randperm(t.numel())].view(t.shape)
    elif kind == 2:
        t.fill_(choose.choice(values))
    else:
        t = torch.randint(-1 if limits[0] < 0 else 0, max(2, min(50, limits[1])), t.shape).to(
            t.dtype
        )
    return t


def shape(choose, t):
    """Other sizes."""
    kind = choose.randrange(7)
    if kind == 0:
        sizes = [choose.choice(SIZES) for _ in range(choose.randrange(1, 4))]
        sizes[choose.randrange(len(sizes))] = 0
        choose.shuffle(sizes)
        return t.new_empty(sizes)
    if t.dim() == 0 or t.numel() == 0:
        return t.new_ones(choose.choice(((), (1,), (3,), (2, 3))))
    axis = choose.randrange(t.dim())
    if kind == 1:
        return t.narrow(axis, 0, choose.randrange(t.shape[axis] + 1)).contiguous()
    if kind == 2:
        return torch.cat([t, t], axis)
    if kind == 3:
        return t.unsqueeze(axis)
    if kind == 4:
        return t.select(axis, 0).contiguous()
    if kind == 5:
        return t.new_empty([0 if i == axis else n for i, n in enumerate(t.shape)])
    return t.new_empty([0 if i == axis else choose.choice(SIZES) for i in range(t.dim())])


def layout(choose, t):
    """Strides, devices and layouts that kernels do not read."""
    kind = choose.randrange(6)
    if kind == 0 and t.dim() > 1:
        return t.transpose(0, 1).contiguous().transpose(0, 1)
    if kind == 1 and t.dim() > 0:
        return torch.stack([t, t], -1).select(-1, 0)
    if kind == 2 and t.dim() > 0 and t.shape[0] > 0:
        return t[:1].expand(t.shape)
    if kind == 3:
        return t.to("meta")
    if kind == 4 and t.dim() > 0:
        return t.to_sparse()
    return t.detach().requires_grad_(t.is_floating_point())


def mutated(choose, kind, value):
    """Something else where ``value`` stood; ``kind`` is the schema's."""
    if "Optional" in kind and choose.randrange(3) == 0:
        return None
    if "Tensor" in kind:
        if value is None:
            return torch.rand(choose.choice(((3,), (40,), (40, 12), (5,))))
        act = choose.choice((content, content, shape, shape, layout, None))
        try:
            return value.to(choose.choice(DTYPES)) if act is None else act(choose, value)
        except RuntimeError:  # torch itself makes no such tensor
            return value
    if "int" in kind:
        return choose.choice(INTEGERS)
    if "float" in kind:
        return choose.choice(FLOATS)
    if "bool" in kind:
        return not value
    return value


def equal(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and bool((bits(a) == bits(b)).all())


def bits(t):
    return t.detach().contiguous().flatten().view(torch.uint8)


def one_call(seed, case, samples, schemas, verbose=False):
    """Makes call number ``case`` of ``seed``; raises AssertionError if the operator misbehaves."""
    choose = random.Random(seed << 32 | case)
    torch.manual_seed(choose.randrange(2**31))
    name, given = choose.choice(samples)
    schema = schemas[name].arguments
    values = [v.detach().clone() if isinstance(v, torch.Tensor) else v for v in given]
    values += [argument.default_value for argument in schema[len(values) :]]
    for i in {choose.randrange(len(values)) for _ in range(choose.randrange(4))} if values else ():
        if (name, schema[i].name) not in TRUSTED:
            values[i] = mutated(choose, str(schema[i].type), values[i])
    # what a refused call must leave as it was
    written = [
        (a.name, values[i], values[i].clone())
        for i, a in enumerate(schema)
        if a.alias_info is not None and a.alias_info.is_write
        and isinstance(values[i], torch.Tensor) and values[i].device.type == "cpu"
        and values[i].layout == torch.strided
    ]  # fmt: skip
    if verbose:
        for argument, value in zip(schema, values, strict=True):
            print(f"  {argument.name} = {value!r}", flush=True)
    try:
        getattr(torch.ops.slide_torch, name)(*values)
        return name, None
    except ALLOWED as error:
        message = str(error)
        said = bool(message.strip()) or isinstance(error, MemoryError)
        assert said and LOST not in message, f"{name}: {type(error).__name__}: {message}"
        for argument, now, before in written:
            assert equal(now, before), f"{name}: {argument} changed, though: {message}"
        return name, error


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=FUZZ_SEED)
    parser.add_argument("--case", type=int)
    parser.add_argument("--seconds", type=float, default=FUZZ_SECONDS)
    parser.add_argument("--progress", help="file that has the number of the call under way")
    options = parser.parse_args()
    torch.set_num_threads(2)
    samples = all_samples()
    schemas = {
        s.name.removeprefix("slide_torch::"): s
        for s in torch._C._jit_get_all_schemas()
        if s.name.startswith("slide_torch::")
    }
    if options.case is not None:
        print(one_call(options.seed, options.case, samples, schemas, verbose=True))
        return
    if "asan" not in os.environ.get("LD_PRELOAD", ""):  # which reserves terabytes
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, used + ROOM))
    end, returned, refused, called = time.monotonic() + options.seconds, 0, 0, set()
    progress = os.open(options.progress, os.O_WRONLY | os.O_CREAT) if options.progress else None
    for case in itertools.count():
        if time.monotonic() > end:
            break
        if progress is not None:
            os.pwrite(progress, b"%020d" % case, 0)
        name, error = one_call(options.seed, case, samples, schemas)
        returned, refused = returned + (error is None), refused + (error is not None)
        called.add(name)
    print(f"{returned} returned, {refused} refused, {len(called)} operators")
    assert returned and refused


def test_no_operator_is_forgotten():
    assert {name for name, _ in all_samples()} | set(NOT_CALLED) == set(operators())


def test_operators(tmp_path):
    progress = tmp_path / "progress"
    command = [sys.executable, __file__, "--seed", str(FUZZ_SEED)]
    run = subprocess.Popen(
        [*command, "--seconds", str(FUZZ_SECONDS), "--progress", str(progress)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=python_path(),
    )
    try:
        output, _ = run.communicate(timeout=FUZZ_SECONDS + 120)
    except subprocess.TimeoutExpired:
        run.kill()
        output = f"no end in sight\n{run.communicate()[0]}"
    case = int(progress.read_text() or 0) if progress.exists() else 0
    assert run.returncode == 0, (
        f"exit {run.returncode}; to repeat the call: {' '.join(command)} --case {case}\n{output[-6000:]}"
    )


if __name__ == "__main__":
    main()
