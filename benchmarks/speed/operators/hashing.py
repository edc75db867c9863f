"""Hash families: the codes of every row."""

from __future__ import annotations

from slide_torch import LSHOptions, ops
from slide_torch.hashing.kmeans import GROUPS_SEARCHED

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


@case
def nearest_in_groups(p: Problem) -> Case:
    """Its arithmetic, counted as if groups were of equal size, is of small integers: more than a bound by
    float32's rate allows."""
    family = p.tables(LSHOptions()).family
    centroids = family.centroids[0]
    groups = family.group_offsets[0], family.group_members[0]
    means, _ = ops.list_centers(centroids, None, *groups)
    compared = len(means) + GROUPS_SEARCHED * len(centroids) / len(means)
    return Case(
        lambda: ops.nearest_in_groups(
            p.weight, p.bias, None, family.mean_row, centroids, means, *groups, GROUPS_SEARCHED
        ),
        {"read": p.weight.nbytes, "write": 2 * p.neurons},
        2 * p.width * compared * p.neurons,
    )
