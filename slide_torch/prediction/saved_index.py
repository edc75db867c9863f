"""The index of approximate prediction in a state dict: tensors, checks, checksum of the weights."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from ..precision import computed_dtype
from .calibration import Calibration
from .partition import RowPartition, Search

FORMAT = 2
DERIVED = ("center_codes", "center_terms")  # by codes_of_centers, at loading
PARTITION = tuple(field.name for field in fields(RowPartition))
INDEX = (*(name for name in PARTITION if name not in DERIVED), "settings")

Expected = dict[str, tuple[torch.dtype, tuple[int, ...]]]  # dtype and shape of tensors by name


@dataclass(frozen=True)
class Settings:
    """What the tensor ``settings``, float64 (7), holds, in this order.

    Attributes:
        format: of the index.
        k, probes, radius_weight, rescored, recall: as of :class:`Calibration`.
        fingerprint: of the weights, see :func:`fingerprint`.
    """

    format: int
    k: int
    probes: int
    radius_weight: float
    rescored: int
    recall: float
    fingerprint: int

    @staticmethod
    def of(calibration: Calibration, weight: Tensor, bias: Tensor | None) -> Settings:
        c = calibration
        checksum = fingerprint(weight, bias)
        return Settings(FORMAT, c.k, c.probes, c.radius_weight, c.rescored, c.recall, checksum)

    def to_tensor(self) -> Tensor:
        return torch.tensor([getattr(self, f.name) for f in fields(self)], dtype=torch.float64)

    @staticmethod
    def from_tensor(tensor: Tensor) -> Settings:
        format, k, probes, radius_weight, rescored, recall, checksum = tensor.tolist()
        return Settings(
            int(format), int(k), int(probes), radius_weight, int(rescored), recall, int(checksum)
        )

    def search(self, partition: RowPartition) -> Search:
        enough = partition.lists_holding(self.k)
        return Search(self.k, self.probes, enough, self.radius_weight, self.rescored)


def fingerprint(weight: Tensor, bias: Tensor | None) -> int:
    """CRC-32 of dtype, shape and all bytes of ``weight`` (N, d) and ``bias`` (N): any change of up to 32 bits
    next to each other changes it, others but for one in 2^32. It costs one sequential read of the weights."""
    found = 0
    for tensor in (weight, bias):
        if tensor is None:
            found = zlib.crc32(b"None", found)
            continue
        found = zlib.crc32(f"{tensor.dtype} {tuple(tensor.shape)}".encode(), found)
        rows = tensor.detach().contiguous().view(-1).view(torch.uint8)
        found = zlib.crc32(rows.numpy().data, found)
    return found


def fault_of(index: dict[str, Tensor], weight: Tensor) -> str | None:
    """What is wrong with a saved index (all of ``INDEX``) for ``weight`` (N, d), if anything is."""
    neurons, width = weight.shape
    lists = len(index["offsets"]) - 1 if index["offsets"].dim() == 1 else 0
    blocks = len(index["codes"]) if index["codes"].dim() == 4 else 0
    dtype = computed_dtype(weight.dtype)
    expected: Expected = {
        "offsets": (torch.int64, (lists + 1,)),
        "rows": (torch.int32, (neurons,)),
        "centers": (dtype, (lists, width + 1)),
        "center_bias": (dtype, (lists,)),
        "rows_in_smallest": (torch.int64, (lists,)),
        "codes": (torch.uint8, (blocks, (width + 7) // 8 * 2, 16, 4)),
        "terms": (torch.float32, (blocks, 2, 16)),
    }
    settings: Expected = {"settings": (torch.float64, (len(fields(Settings)),))}
    return (
        _fault_of_shapes(index, settings)
        or _fault_of_format(index["settings"])
        or _fault_of_shapes(index, expected)
        or _fault_of_settings(index["settings"], lists, neurons)
        or _fault_of_lists(index, neurons)
    )


def _fault_of_shapes(index: dict[str, Tensor], expected: Expected) -> str | None:
    for name, (kind, shape) in expected.items():
        tensor = index[name]
        if tensor.dtype != kind or tuple(tensor.shape) != shape:
            return f"{name}: expected {kind} {shape}, got {tensor.dtype} {tuple(tensor.shape)}"
    return None


def _fault_of_format(numbers: Tensor) -> str | None:
    if numbers[0] == FORMAT:
        return None
    return (
        f"settings: expected format {FORMAT}, got {numbers[0].item():g}: calibrate the layer again and save "
        "its predictor() by this version"
    )


def _fault_of_settings(numbers: Tensor, lists: int, neurons: int) -> str | None:
    if bool(torch.isfinite(numbers).all()):
        s = Settings.from_tensor(numbers)
        counts = 1 <= s.k <= neurons and 1 <= s.probes <= lists and 1 <= s.rescored <= neurons
        shares = s.radius_weight >= 0 and 0 < s.recall <= 1
        if counts and shares and torch.equal(s.to_tensor(), numbers):  # integers are integers
            return None
    return f"settings: expected those of a calibration of {neurons} rows, got {numbers.tolist()}"


def _fault_of_lists(index: dict[str, Tensor], neurons: int) -> str | None:
    offsets, rows = index["offsets"], index["rows"]
    sizes = offsets.diff()
    if offsets[0] != 0 or offsets[-1] != neurons or not bool((sizes > 0).all()):
        return f"offsets: expected increasing numbers from 0 to {neurons}"
    if not torch.equal(index["rows_in_smallest"], sizes.sort().values.cumsum(0)):
        return "rows_in_smallest: expected sums of the lengths of lists"
    if len(index["codes"]) != int((sizes + 15).div(16, rounding_mode="floor").sum()):
        return "codes: expected as many blocks of 16 rows as the lists fill"
    if int(rows.min()) < 0 or int(rows.max()) >= neurons or int(rows.bincount().max()) > 1:
        return f"rows: expected every number from 0 to {neurons - 1} once"
    return None
