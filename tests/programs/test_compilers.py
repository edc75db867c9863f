"""The kernels by other compilers and for another processor: clang without a warning, and aarch64 under
emulation, where they are installed."""

import shutil
import subprocess

import pytest
from helpers import ROOT

KERNELS = [ROOT / "tests/kernels/stress.cpp", *sorted((ROOT / "csrc/kernels").glob("*.cpp"))]
FLAGS = ("-std=c++20", "-Wall", "-Wextra", "-Wno-psabi", "-Werror", "-pthread")


def needed(*programs):
    """Paths of programs; skips the test where one is missing."""
    paths = [shutil.which(program) for program in programs]
    missing = [program for program, path in zip(programs, paths, strict=True) if path is None]
    if missing:
        pytest.skip(f"needs {' and '.join(missing)}")
    return paths


def stress(tmp_path, compiler, *flags, run_by=(), level):
    """Builds the stress test, runs it, and expects it to say that all went well."""
    binary = tmp_path / "stress"
    command = [compiler, *FLAGS, *flags, *map(str, KERNELS), "-o", str(binary)]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    environment = {"SLIDE_TORCH_ISA": level, "PATH": "/usr/bin:/bin"}
    run = subprocess.run([*run_by, str(binary)], capture_output=True, text=True, env=environment)
    assert (run.returncode, run.stdout) == (0, f"{level or 'baseline'} ok\n"), (
        run.stdout + run.stderr
    )


def test_clang(tmp_path):
    (compiler,) = needed("clang++")
    stress(tmp_path, compiler, "-O1", level="baseline")


def test_aarch64(tmp_path):
    """Baseline vectors are NEON's there."""
    compiler, emulator = needed("aarch64-linux-gnu-g++", "qemu-aarch64")
    # static: the emulator then needs no libraries of the other processor
    stress(tmp_path, compiler, "-O2", "-static", run_by=[emulator], level="")
