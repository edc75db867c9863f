"""The instruction that sums products of bytes: what it adds up, emulated, and that compilers use it. The
levels that have it are tested, as all levels are, where the processor has it."""

import platform
import re
import shutil
import subprocess

import pytest
from helpers import ROOT

FLAGS = ("-std=c++20", "-Wall", "-Wextra", "-Wno-psabi", "-Werror", "-fno-math-errno")
COMPILERS = ("g++", "clang++", "aarch64-linux-gnu-g++")


def compiled(compiler, source, target, *flags):
    if shutil.which(compiler) is None:
        pytest.skip(f"needs {compiler}")
    command = [compiler, *FLAGS, *flags, str(ROOT / source), "-o", str(target)]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr


@pytest.mark.parametrize("compiler", COMPILERS)
def test_sums_of_products(tmp_path, compiler):
    """An emulation of the instruction and every other way make the same sums."""
    emulator = [shutil.which("qemu-aarch64")] if compiler.startswith("aarch64") else []
    if None in emulator:
        pytest.skip("needs qemu-aarch64")
    compiled(compiler, "tests/kernels/byte_products.cpp", tmp_path / "run", "-O2", "-static")
    run = subprocess.run([*emulator, str(tmp_path / "run")], capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (0, "ok\n"), run.stdout + run.stderr


@pytest.mark.skipif(platform.machine() != "x86_64", reason="instructions of x86-64")
@pytest.mark.parametrize("compiler", COMPILERS[:2])
@pytest.mark.parametrize(("level", "register"), [("avx2_vnni", "ymm"), ("avx512_vnni", "zmm")])
def test_compilers_use_the_instruction(tmp_path, level, register, compiler):
    """For 1 to 4 samples at a time, two quads each, and nothing of the way without it."""
    assembly = tmp_path / "level.s"
    compiled(compiler, f"csrc/kernels/{level}.cpp", assembly, "-O3", "-S")
    code = assembly.read_text()
    found = re.findall(rf"vpdpbusd\s.*%{register}", code)
    vectors_of_a_block = {"ymm": 2, "zmm": 1}[register]
    assert len(found) >= (1 + 2 + 3 + 4) * 2 * vectors_of_a_block
    assert "vpmaddubsw" not in code
