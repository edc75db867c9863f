"""The operators in Python: typed calls, fake (shape-only) versions, autograd, each beside the other.

Shapes: N neurons of width d, a batch of B inputs, U active neurons ("rows", strictly increasing).
"""

from .active_set import (
    build_tables,
    rerank,
    retrieve,
    sample_tail,
    transpose_active,
    union_active,
    update_codes_,
)
from .hashing import (
    dwta,
    group_means,
    hashed_rows,
    mean_row,
    nearest_centroids,
    nearest_in_groups,
    simhash_dense,
    simhash_hadamard,
)
from .library import instruction_set
from .linear import into_active, out_of_active
from .losses import binary_cross_entropy, cross_entropy, partial_cross_entropy
from .rows import (
    adagrad_rows_,
    adam_rows_,
    advise_hugepages_,
    coalesce_rows,
    rows_to_dense,
    sgd_rows_,
    touch_rows_,
    widened_rows,
)
from .topk import (
    code_centers,
    code_lists_,
    coded_centers,
    empty_codes,
    list_centers,
    move_codes_,
    rank_centers,
    recode_rows_,
    search_lists,
    topk_linear,
    topk_lists,
)
from .transforms import refuse_transforms, transform_of
from .xmc import parse_xmc

__all__ = [
    "adagrad_rows_",
    "adam_rows_",
    "advise_hugepages_",
    "binary_cross_entropy",
    "build_tables",
    "coalesce_rows",
    "code_centers",
    "code_lists_",
    "coded_centers",
    "cross_entropy",
    "dwta",
    "empty_codes",
    "group_means",
    "hashed_rows",
    "instruction_set",
    "into_active",
    "list_centers",
    "mean_row",
    "move_codes_",
    "nearest_centroids",
    "nearest_in_groups",
    "out_of_active",
    "parse_xmc",
    "partial_cross_entropy",
    "rank_centers",
    "recode_rows_",
    "refuse_transforms",
    "rerank",
    "retrieve",
    "rows_to_dense",
    "sample_tail",
    "search_lists",
    "sgd_rows_",
    "simhash_dense",
    "simhash_hadamard",
    "topk_linear",
    "topk_lists",
    "touch_rows_",
    "transform_of",
    "transpose_active",
    "union_active",
    "update_codes_",
    "widened_rows",
]
