"""The sdist has all that a build needs, and the wheel made of it runs elsewhere, without a compiler.

The wheel has the extension that these tests run with: ``make wheel`` compiles the sdist.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
from helpers import ROOT

import slide_torch


def run(command, *, directory, path=None):
    """Runs a program where neither the checkout nor the tests are importable; its output."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    if path is not None:
        environment["PATH"] = str(path)
    result = subprocess.run(
        [*map(str, command)], cwd=directory, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def sources(root):
    """Names of the files that the package is built from."""
    kinds = {".cpp", ".h", ".py", ".typed"}
    found = [*(root / "csrc").rglob("*"), *(root / "slide_torch").rglob("*")]
    return {path.relative_to(root).as_posix() for path in found if path.suffix in kinds}


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    """The sdist, unpacked."""
    folder = tmp_path_factory.mktemp("sdist")
    command = f"setup.py -q egg_info --egg-base {folder} sdist --dist-dir {folder}".split()
    run([sys.executable, *command], directory=ROOT)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(folder / "unpacked")
    (root,) = (folder / "unpacked").iterdir()
    assert root.name == f"slide_torch-{slide_torch.__version__}"
    return root


@pytest.fixture(scope="module")
def wheel(unpacked, tmp_path_factory):
    """A wheel of the sdist and of the extension as it is built here."""
    folder = tmp_path_factory.mktemp("wheel")
    (folder / "slide_torch").mkdir()
    shutil.copy(importlib.util.find_spec("slide_torch._C").origin, folder / "slide_torch")
    with (unpacked / "setup.cfg").open("a") as settings:
        settings.write(f"\n[build]\nbuild_lib = {folder}\n")
    command = f"setup.py -q build_py bdist_wheel --skip-build --dist-dir {folder}"
    run([sys.executable, *command.split()], directory=unpacked)
    (path,) = folder.glob("*.whl")
    return path


def test_the_sdist_has_every_source(unpacked):
    assert sources(unpacked) == sources(ROOT)
    assert {path.name for path in unpacked.iterdir()} >= {
        *("pyproject.toml", "setup.py", "Makefile", "README.md", "LICENSE", "CITATION.cff"),
        *("tests", "benchmarks", "examples", "docs"),
    }
    assert not list(unpacked.rglob("*.so"))


def test_the_wheel_serves_every_python(wheel):
    """By its name, and by its content: nothing but the package."""
    assert re.fullmatch(rf"slide_torch-{slide_torch.__version__}-cp310-abi3-\w+\.whl", wheel.name)
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (metadata,) = (name for name in names if name.endswith("/METADATA"))
        fields = archive.read(metadata).decode().split("\n\n")[0]
    assert {name.split("/")[0] for name in names} == {"slide_torch", metadata.split("/")[0]}
    assert {"slide_torch/_C.abi3.so", "slide_torch/py.typed"} <= names
    assert not [name for name in names if name.endswith((".cpp", ".h"))]
    assert "License-Expression: BSD-3-Clause" in fields
    assert "Requires-Python: >=3.10" in fields
    assert "Requires-Dist: torch>=2.10" in fields


def test_the_extension_has_the_stable_abi_only(wheel):
    pytest.importorskip("abi3audit")
    run([sys.executable, "-m", "abi3audit", "--strict", wheel], directory=wheel.parent)


def test_the_wheel_runs_without_a_compiler(wheel, tmp_path):
    run([sys.executable, "-m", "venv", "--without-pip", "env"], directory=tmp_path)
    python = tmp_path / "env" / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check"]
    run([*pip, "install", "-q", "--no-index", "--no-deps", wheel], directory=tmp_path)
    place = run(
        [python, "-c", "import sysconfig as s; print(s.get_path('platlib'))"], directory=tmp_path
    )
    # torch is that of the tests; the .pth files of an added folder are not read, so the checkout stays out
    added = [sysconfig.get_path("platlib"), sysconfig.get_path("purelib")]
    (Path(place.strip()) / "torch_of_the_tests.pth").write_text("\n".join(dict.fromkeys(added)))

    shutil.copy(ROOT / "tests/programs/train_installed.py", tmp_path)
    nothing = tmp_path / "nothing"
    nothing.mkdir()
    printed = run([python, "train_installed.py"], directory=tmp_path, path=nothing).splitlines()
    version, file, *compilers = printed
    assert version == slide_torch.__version__
    assert Path(file).is_relative_to(tmp_path / "env")
    assert compilers == []


def test_the_version_is_in_one_place():
    """``slide_torch.__version__``; the texts that must repeat it agree."""
    version = slide_torch.__version__
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    (newest, *_) = re.findall(r"^## (\S+) \(", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest == version
