"""Sampler states as earlier versions saved them, brought into the present format."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

FORMAT = 3  # the present one

# Format 1: other names of the same things, and what early states of it lack.
_RENAMED = {
    "row_codes": "sq8_codes",
    "row_terms": "sq8_terms",
    "row_places": "sq8_places",
    "probe_codes": "drift_sample_codes",
}
_RENAMED_COUNTERS = {"_period": "period", "_since_rehash": "since_rehash"}
_RENAMED_FUNCTIONS = {"center": "mean_row"}
_OPTIONAL = (*_RENAMED.values(), "frequencies")
_OPTIONAL_COUNTERS = {"drift_checks": 0, "drift": 0.0}


def in_present_format(state: dict[str, Any]) -> dict[str, Any]:
    """``state`` with the names of format 2, where what format 1 lacks is filled in, and with the rows' codes
    of format 3. What is damaged stays so."""
    if state["format"] == 1:
        state = _in_format_2(state)
    if state["format"] != FORMAT and _is_in_format_2(
        state.get("sq8_codes"), state.get("sq8_terms")
    ):
        codes, terms = _seven_bits(state["sq8_codes"], state["sq8_terms"])
        state = {**state, "sq8_codes": codes, "sq8_terms": terms}
    return state


def _in_format_2(state: dict[str, Any]) -> dict[str, Any]:
    renamed = dict.fromkeys(_OPTIONAL) | _with_names(state, _RENAMED)
    if isinstance(renamed.get("functions"), dict):
        renamed["functions"] = _with_names(renamed["functions"], _RENAMED_FUNCTIONS)
    if isinstance(renamed.get("schedule"), dict):
        counters = _with_names(renamed["schedule"], _RENAMED_COUNTERS)
        renamed["schedule"] = _OPTIONAL_COUNTERS | counters
    return renamed


def _with_names(old: dict[Any, Any], renamed: dict[str, str]) -> dict[Any, Any]:
    new_names = set(renamed.values())
    # what has a new name already is not of format 1
    kept = {name: value for name, value in old.items() if name not in new_names}
    return {renamed.get(name, name): value for name, value in kept.items()}


def _is_in_format_2(codes: Any, terms: Any) -> bool:
    return (
        isinstance(codes, Tensor)
        and isinstance(terms, Tensor)
        and (codes.layout, codes.device.type, codes.dtype) == (torch.strided, "cpu", torch.int8)
        and (terms.layout, terms.device.type, terms.dtype) == (torch.strided, "cpu", torch.float32)
        and codes.dim() == 4
        and codes.shape[2:] == (16, 2)
        and terms.shape == (codes.shape[0], 2, 16)
    )


def _seven_bits(codes: Tensor, terms: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and terms of :func:`slide_torch.ops.code_lists_` from int8 codes (blocks, pairs, 16, 2), -127
    to 127. They are rounded a second time; the next rehash rounds the rows themselves."""
    blocks, pairs = codes.shape[:2]
    quads = (2 * pairs + 7) // 8 * 2
    by_pairs = (codes.float() * (63 / 127)).round_().add_(64).to(torch.uint8)
    by_rows = by_pairs.permute(0, 2, 1, 3).reshape(blocks, 16, 2 * pairs)
    by_rows = F.pad(by_rows, (0, 4 * quads - 2 * pairs), value=64)
    scales = torch.stack([terms[:, 0] * (127 / 63), terms[:, 1]], 1)
    return by_rows.view(blocks, 16, quads, 4).transpose(1, 2).contiguous(), scales
