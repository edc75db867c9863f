"""Builds the one extension module, ``slide_torch._C``; everything else is in pyproject.toml."""

import os
import sys
from pathlib import Path

from setuptools import setup

try:
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except ImportError:
    sys.exit(
        "slide_torch: building needs torch >= 2.10 to be installed already, and it is not visible here.\n"
        "Install torch first, then build against that very torch (not a second one in an isolated\n"
        "environment):\n\n    pip install --no-build-isolation .\n"
    )

version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
if version < (2, 10):
    sys.exit(f"slide_torch: expected torch >= 2.10, got {torch.__version__}: pip install -U torch")

root = Path(__file__).parent
flags = [
    "-O3",
    "-std=c++20",
    "-Wall",
    "-Wextra",
    "-Wno-unused-parameter",
    "-Wno-psabi",
    "-fvisibility=hidden",
]
flags += ["-g0"]  # else Python's own flags ask for debug information: slower, and most of the size
flags += ["-fno-math-errno"]  # sqrt is then one instruction, and vectorises
flags += os.environ.get("SLIDE_TORCH_CXXFLAGS", "").split()

setup(
    ext_modules=[
        CppExtension(
            "slide_torch._C",
            sorted(str(path.relative_to(root)) for path in (root / "csrc").rglob("*.cpp")),
            depends=sorted(str(path.relative_to(root)) for path in (root / "csrc").rglob("*.h")),
            define_macros=[("TORCH_TARGET_VERSION", "0x020a000000000000")],
            extra_compile_args={"cxx": flags},
            py_limited_api=True,
        )
    ],
    cmdclass={"build_ext": BuildExtension},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
