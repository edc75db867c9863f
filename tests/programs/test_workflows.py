"""The Makefile; workflows that run its targets and nothing else, at the lowest versions that are allowed."""

import re

import pytest
from helpers import ROOT

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)
def test_every_command_is_a_target(workflow):
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    commands = re.findall(r"\brun: *(.*)$", workflow.read_text(), re.MULTILINE)
    assert commands
    for command in commands:
        program, target, *_ = command.split()
        assert program == "make", command
        assert target in targets, command


def test_a_name_of_the_makefile_has_one_value():
    """A recipe sees a name's last value, whatever stood when the recipe was written."""
    names = re.findall(r"^(\w+)\s*[:?]?=", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert sorted(set(names)) == sorted(names)


def test_the_lowest_versions_are_built_and_tested():
    settings = (ROOT / "pyproject.toml").read_text()
    (python,) = re.findall(r'^requires-python = ">=([\d.]+)"', settings, re.MULTILINE)
    (torch,) = re.findall(r'^dependencies = \["torch>=([\d.]+)"', settings, re.MULTILINE)
    tests = (ROOT / ".github/workflows/ci.yml").read_text()
    assert f'python: "{python}", settings: TORCH=torch=={torch}.0' in tests
    (built,) = re.findall(r'^before-build = "pip install torch==([\d.]+) ', settings, re.MULTILINE)
    assert built == f"{torch}.0"
    assert f'build = "cp{python.replace(".", "")}-*"' in settings
    assert f'"cp{python.replace(".", "")}"' in (ROOT / "setup.py").read_text()
