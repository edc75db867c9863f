"""torch.library.opcheck of every operator: schema, fake version, autograd, dynamic shapes."""

import importlib
import pkgutil

import pytest
import torch
from sample_inputs import sample_inputs
from torch.library import opcheck

import slide_torch

ALL_CHECKS = (
    "test_schema",
    "test_autograd_registration",
    "test_faketensor",
    "test_aot_dispatch_dynamic",
)

# Checks that cannot be made. test_aot_dispatch_dynamic runs an operator eagerly and compiled and compares.
LEFT_OUT = {
    # torch.testing cannot compare strings, and there is no tensor to trace
    "instruction_set": {"test_aot_dispatch_dynamic"},
}


def registered():
    """Names of all operators that the dispatcher has, those defined in Python included."""
    for module in pkgutil.walk_packages(slide_torch.__path__, "slide_torch."):
        importlib.import_module(module.name)
    names = (name.split("::") for name in torch._C._dispatch_get_all_op_names())
    return {name.partition(".")[0] for space, name in names if space == "slide_torch"}


def test_every_operator_has_samples():
    assert sample_inputs().keys() == registered() and len(registered()) > 40
    assert LEFT_OUT.keys() <= registered()


@pytest.mark.parametrize("name", sorted(registered()))
def test_opcheck(name):
    torch.set_num_threads(1)  # for such small problems two are slower
    checks = [check for check in ALL_CHECKS if check not in LEFT_OUT.get(name, ())]
    samples = list(sample_inputs()[name]())
    assert samples and checks
    for arguments in samples:
        opcheck(getattr(torch.ops.slide_torch, name).default, arguments, test_utils=checks)
