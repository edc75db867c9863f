"""torch.library.opcheck of every operator: schema, fake version, autograd, dynamic shapes."""

import importlib
import pkgutil

import pytest
import torch
from sample_inputs import sample_inputs
from torch.library import opcheck

import slide_torch

TRACED = "test_aot_dispatch_dynamic"  # runs an operator eagerly and traced, and compares
ALL_CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", TRACED)

# Checks that cannot be made.
LEFT_OUT = {
    # torch.testing cannot compare strings, and there is no tensor to trace
    "instruction_set": {TRACED},
}


def registered():
    """Names of all operators that the dispatcher has, those defined in Python included."""
    for module in pkgutil.walk_packages(slide_torch.__path__, "slide_torch."):
        if not module.name.startswith("slide_torch.integrations."):  # they need packages of others
            importlib.import_module(module.name)
    names = (name.split("::") for name in torch._C._dispatch_get_all_op_names())
    return {name.partition(".")[0] for space, name in names if space == "slide_torch"}


def test_every_operator_has_samples():
    assert sample_inputs().keys() == registered() and len(registered()) > 40
    assert LEFT_OUT.keys() <= registered()


def traced_alike(argument):
    """What a trace tells of an argument: all but a tensor's dtype and values (test_faketensor)."""
    if isinstance(argument, torch.Tensor):
        return "tensor", argument.dim(), argument.requires_grad
    return argument


@pytest.mark.parametrize("name", sorted(registered()))
def test_opcheck(name):
    """Every sample; traced, which takes most of the time, the first of those with the same graph."""
    torch.set_num_threads(1)  # for such small problems two are slower
    checks = [check for check in ALL_CHECKS if check not in LEFT_OUT.get(name, ())]
    samples = list(sample_inputs()[name]())
    assert samples and checks
    graphs = set()
    for arguments in samples:
        graph = repr([traced_alike(argument) for argument in arguments])
        chosen = [check for check in checks if check != TRACED or graph not in graphs]
        graphs.add(graph)
        opcheck(getattr(torch.ops.slide_torch, name).default, arguments, test_utils=chosen)
