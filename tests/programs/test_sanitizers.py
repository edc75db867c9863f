"""The kernels under ThreadSanitizer, AddressSanitizer and UndefinedBehaviorSanitizer, at every
instruction-set level of this machine."""

import shutil
import subprocess

import pytest
from helpers import LEVELS, ROOT

COMPILER = shutil.which("g++") or shutil.which("clang++")


@pytest.fixture(scope="module", params=["thread", "address,undefined"])
def program(request, tmp_path_factory):
    if COMPILER is None:
        pytest.skip("needs a C++ compiler")
    binary = tmp_path_factory.mktemp("sanitize") / "stress"
    sources = [ROOT / "tests/kernels/stress.cpp", *sorted((ROOT / "csrc/kernels").glob("*.cpp"))]
    command = [
        *(COMPILER, "-std=c++20", "-O1", "-g1", "-Wno-psabi", "-pthread"),
        *(f"-fsanitize={request.param}", "-fno-sanitize-recover=all"),
        *(*map(str, sources), "-o", str(binary)),
    ]
    built = subprocess.run(command, capture_output=True, text=True)
    if built.returncode and "cannot find -l" in built.stderr:
        pytest.skip(f"this compiler has no {request.param} sanitizer")
    assert built.returncode == 0, built.stderr
    return binary


@pytest.mark.parametrize("level", LEVELS)
def test_kernels_are_clean(program, level):
    environment = {"SLIDE_TORCH_ISA": level, "PATH": "/usr/bin:/bin"}
    run = subprocess.run([str(program)], capture_output=True, text=True, env=environment)
    if "unexpected memory mapping" in run.stderr:
        pytest.skip("this kernel's address-space layout is not supported by ThreadSanitizer")
    if "expected one of" in run.stderr and level != "baseline":
        pytest.skip(f"this machine has no {level}")
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout == f"{level} ok\n"
