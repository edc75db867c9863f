"""Hash families: the codes of every row."""

from __future__ import annotations

from .case import Case, case
from .problem import Problem


@case
def simhash_hadamard(p: Problem) -> Case:
    size = 1 << (p.width - 1).bit_length()
    rotations = -(-6 * 50 // size)
    additions = 3 * rotations * size * (size.bit_length() - 1)  # three fast transforms a rotation
    traffic = {"read": p.weight.nbytes, "write": 2 * 50 * p.neurons}
    return Case(p.codes("simhash", projection="hadamard"), traffic, additions * p.neurons)


@case
def simhash_dense(p: Problem) -> Case:
    traffic = {"read": p.weight.nbytes, "write": 2 * 50 * p.neurons}
    flops = 2 * 6 * 50 * (p.width + 1) * p.neurons
    return Case(p.codes("simhash", projection="gaussian"), traffic, flops)


@case
def dwta(p: Problem) -> Case:
    comparisons = 6 * 50 * 8 * p.neurons
    return Case(
        p.codes("dwta"), {"read": p.weight.nbytes, "write": 4 * 50 * p.neurons}, comparisons
    )
