"""What must not change by accident: public names and signatures, keys of states, bits of training runs.

    python tests/frozen.py             # prints what it finds as JSON
    python tests/frozen.py --write     # records it in frozen.json; says whose bits changed

The bits are those of the library's own kernels: inputs and initial weights come from integer hashes, and
torch is told to use its plainest kernels (``PINNED``). A record holds for one architecture and instruction
set, and where that has fused multiply-adds for one compiler, as compilers contract a * b + c differently
(``level_key``). torch and numpy may still round differently on another machine, in the system's exp and log
say: digests of some of their own results (``surroundings``) stand beside.
"""

import functools
import json
import platform
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from frozen_names import names
from frozen_runs import CASES, digest, matrix, numbers, run
from frozen_states import SAVED, SAVED_STATES, keys, resume, save_states
from helpers import run_at_level, supported_levels
from torch import nn

import slide_torch

RECORD = Path(__file__).with_name("frozen.json")
# of a process that computes bits: no instruction set beyond the architecture's first
PINNED = {"ATEN_CPU_CAPABILITY": "default", "OMP_WAIT_POLICY": "passive"}


def surroundings() -> dict[str, str]:
    """Digests of what torch and numpy compute here of what the library leaves to them."""
    x = numbers(300, 41, salt=93, dtype=torch.float32)
    generator = torch.Generator().manual_seed(5)
    param, grad = x.clone(), x.flip(0)
    moments = [torch.zeros_like(x), torch.zeros_like(x), torch.tensor(0.0)]
    optimizer = torch.optim.Adam([nn.Parameter(param)], fused=True)
    optimizer.param_groups[0]["params"][0].grad = grad
    optimizer.step()
    found = [torch.randn(33, 40, generator=generator), torch.rand(100, generator=generator)]
    for y in (x, x.double()):
        found += [y.exp(), (y.square() + 1).log(), F.normalize(y, dim=1), y.sum(0), y.mean(1)]
        found += [y.square().sum(1).sqrt(), y.double().norm(dim=1).quantile(0.9), y.sum()]
    found += [*moments, optimizer.param_groups[0]["params"][0]]
    shares = x.double().square().flatten().numpy() + 0.5
    of_numpy = [np.log(shares), np.log1p(1 / shares), shares**0.75, shares.cumsum(), shares.sum()]
    return {
        "torch": digest(found),
        "numpy": digest(torch.as_tensor(each) for each in of_numpy),
    }


@functools.cache
def compiler() -> str:
    """The compiler of the extension, as it notes in the file: "GCC 12" or "clang 14"."""
    content = Path(slide_torch._C.__file__).read_bytes()
    clang = re.search(rb"clang version (\d+)", content)
    gcc = re.search(rb"GCC: \([^)]*\) (\d+)", content)
    if clang:
        return f"clang {clang[1].decode()}"
    return f"GCC {gcc[1].decode()}" if gcc else "unknown compiler"


def level_key(level: str) -> str:
    """What a record holds for. GCC and clang agree at x86's baseline, which has no fused multiply-add."""
    level = level.removesuffix("_vnni")  # the same sums of integers by another instruction
    contracts = (platform.machine(), level) != ("x86_64", "baseline")
    return f"{platform.machine()} {level}" + (f", {compiler()}" if contracts else "")


def bits(turn: int | None = None) -> dict[str, Any]:
    """Digests of all cases, once if they are the same with one thread and with two, else both.

    With a ``turn``, 0 or 1, cases outside the matrix run with one thread and with two by turns.
    """
    found: dict[str, Any] = {"level": slide_torch.instruction_set(), **surroundings()}
    runs = {name: functools.partial(run, case) for name, case in CASES.items()}
    runs |= {f"resumed, {name}": functools.partial(resume, name) for name in SAVED}
    in_full = matrix()
    for place, (name, make_digests) in enumerate(runs.items()):
        whole = turn is None or name in in_full
        by_threads = {}
        for threads in (1, 2) if whole else ((place + turn) % 2 + 1,):
            torch.set_num_threads(threads)
            by_threads[f"threads: {threads}"] = " ".join(make_digests())
        same = len(set(by_threads.values())) == 1
        found[name] = next(iter(by_threads.values())) if same else by_threads
    return found


def bits_at(level: str, turn: int | None = None) -> dict[str, Any]:
    """:func:`bits` in a process of its own, at an instruction set."""
    turns = [] if turn is None else [turn]
    done = run_at_level(level, __file__, "--bits", *turns, timeout=600, **PINNED)
    if done.returncode != 0:
        raise RuntimeError(done.stderr.decode())
    return json.loads(done.stdout)


def record() -> dict[str, Any]:
    return json.loads(RECORD.read_text())


def write() -> None:
    """Writes the record; what it has for other machines and compilers is kept unless bits changed."""
    old = record()["bits"] if RECORD.exists() else {}
    levels = [level for level in supported_levels() if not level.endswith("_vnni")]
    own = {level_key(level): bits_at(level) for level in levels}
    changed = False
    for key, found in own.items():
        before = old.get(key, found)
        names_changed = [name for name in found if name in before and before[name] != found[name]]
        changed = changed or bool(names_changed)
        print(f"{key}: {len(names_changed)} of {len(found)} changed", *names_changed, sep="\n  ")
    new = {"names": names(), "keys": keys(), "bits": ({} if changed else old) | own}
    RECORD.write_text(json.dumps(new, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--bits"]:
        print(json.dumps(bits(*map(int, sys.argv[2:]))))
    elif sys.argv[1:] == ["--write"]:
        if not SAVED_STATES[max(SAVED_STATES)].exists():
            save_states()
        write()
    else:
        print(json.dumps({"names": names(), "keys": keys()}, indent=1))
