"""What several test files use."""

import multiprocessing
import os
import platform
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
import torch.multiprocessing as mp
from torch import nn

from slide_torch import HashTables, LSHLinear, LSHOptions, ops
from slide_torch.hashing.make import make_family

ROOT = Path(__file__).resolve().parents[1]
LEVELS = ("baseline", "avx2", "avx2_vnni", "avx512", "avx512_vnni")
AVX2 = {"avx2", "fma", "bmi1", "bmi2"}
AVX512 = AVX2 | {"avx512f", "avx512bw", "avx512dq", "avx512vl"}
NEEDED = {
    "avx2": AVX2,
    "avx2_vnni": AVX2 | {"avx_vnni"},
    "avx512": AVX512,
    "avx512_vnni": AVX512 | {"avx512_vnni"},
}
FUZZ_SECONDS = float(os.environ.get("SLIDE_TORCH_FUZZ_SECONDS", "8"))  # of each fuzzer
FUZZ_SEED = int(os.environ.get("SLIDE_TORCH_FUZZ_SEED", "0"))


def cpu_flags():
    if platform.machine() != "x86_64":
        return set()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("flags"):
            return set(line.split(":")[1].split())
    return set()


def supported_levels():
    """The instruction-set levels of this machine, by its own account, the best one last."""
    flags = cpu_flags()
    return [level for level in LEVELS if NEEDED.get(level, set()) <= flags]


def python_path():
    """The environment in which another Python imports what the tests import."""
    paths = (ROOT, ROOT / "tests", os.environ.get("PYTHONPATH"))
    return {**os.environ, "PYTHONPATH": os.pathsep.join(str(p) for p in paths if p)}


def forks():
    """A context whose processes are forks of one that has imported torch and computed nothing: they start at
    once, where a new Python takes seconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "slide_torch"])
    return context


def in_fork(function, *arguments, **environment):
    """What ``function(*arguments)`` returns or raises in a process where ``environment`` is set."""
    with ProcessPoolExecutor(1, forks()) as pool:
        return pool.submit(_with_environment, environment, function, *arguments).result()


def _with_environment(environment, function, *arguments):
    os.environ.update(environment)
    return function(*arguments)


def run_processes(work, count, *arguments, limit):
    """Runs ``work(rank, *arguments)`` in ``count`` processes; those that take more than ``limit`` seconds
    fail the test instead of stopping it."""
    method = forks().get_start_method()
    context = mp.start_processes(work, arguments, nprocs=count, join=False, start_method=method)
    deadline = time.monotonic() + limit
    try:
        while not context.join(timeout=1):
            assert time.monotonic() < deadline, "the processes hang"
    finally:
        for process in context.processes:
            process.kill()


def run_at_level(level, *arguments, timeout=120, **environment):
    """Runs Python with ``arguments`` where SLIDE_TORCH_ISA names the level."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        env={**python_path(), **environment, "SLIDE_TORCH_ISA": level},
        capture_output=True,
        timeout=timeout,
    )


def small_model(*, bias=True, sparse=False, N=60, D=8, **options):
    """A network (D -> D -> N) whose head has small tables that are rehashed every second step."""
    torch.manual_seed(0)
    options = {"budget": 5, "tail": 6, "K": 2, "L": 3, "rehash_every": 2, **options}
    head = LSHLinear(D, N, bias, options=LSHOptions(**options), sparse=sparse)
    return nn.Sequential(nn.Linear(D, D), nn.ReLU(), head)


def make_tables(options, N=400, d=16):
    """Tables over random rows, and the rows."""
    weight = torch.randn(N, d)
    tables = HashTables(options, N, d, has_bias=False)
    tables.rebuild(weight, None)
    return tables, weight


def hash_family(family, *, d=40, has_bias=True, seed=0, **options):
    """A hash family of 1,000 rows of width ``d``, whose codes have three bits in five tables by default."""
    options = LSHOptions(family=family, **{"K": 3, "L": 5, **options}).resolve(1000, d)
    return make_family(options, d, has_bias=has_bias, seed=seed)


def coded_lists(weight, bias, offsets, rows):
    """Codes, terms and places of lists of rows."""
    coded = ops.empty_codes(weight, offsets, room=True)
    ops.code_lists_(*coded, weight, bias, offsets, rows)
    return coded


def rounded_rows(codes, terms, places, d):
    """The rows (N, d) that codes stand for."""
    integers = codes.int().transpose(1, 2).reshape(16 * len(codes), -1) - 64
    return (integers * terms[:, 0].reshape(-1, 1))[places.long(), :d]


def in_format_2(state):
    """A layer's sampler state as format 2 had it: with rows in eight bits, of which these take up seven."""
    codes = state["sq8_codes"]
    if codes is not None:
        blocks, pairs = len(codes), (state["shape"][1] + 1) // 2
        by_rows = (codes.int() - 64).to(torch.int8).transpose(1, 2).reshape(blocks, 16, -1)
        codes = by_rows[..., : 2 * pairs].reshape(blocks, 16, pairs, 2).transpose(1, 2).contiguous()
    return {**state, "format": 2, "sq8_codes": codes}


def in_format_1(state):
    """A layer's sampler state as format 1 had it."""
    state = in_format_2(state)
    old = {
        "sq8_codes": "row_codes",
        "sq8_terms": "row_terms",
        "sq8_places": "row_places",
        "drift_sample_codes": "probe_codes",
    }
    counters = {"period": "_period", "since_rehash": "_since_rehash"}
    state = {old.get(name, name): value for name, value in state.items()}
    functions, schedule = state["functions"], state["schedule"]
    return {
        **state,
        "format": 1,
        "functions": {
            "center" if name == "mean_row" else name: each for name, each in functions.items()
        },
        "schedule": {counters.get(name, name): value for name, value in schedule.items()},
    }
