"""Files of the Extreme Classification Repository.

The first line of a file is ``rows features labels``; each further line is one row,
``label,label,... feature:value feature:value ...``, with all indices counted from 0.
"""

from __future__ import annotations

import codecs
import contextlib
import gzip
import os
import re
import zlib
from collections.abc import Callable, Iterator
from io import BufferedReader
from numbers import Integral
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from .. import ops
from .scipy_matrices import LARGEST
from .sparse_rows import SparseRows, XMCData

__all__ = ["read_xmc"]

CHUNK_BYTES = 32 << 20

_NOT_TEXT = (
    (b"PK\x03\x04", "a zip archive", "unpack it"),
    (b"BZh", "bzip2", "unpack it"),
    (b"\xfd7zXZ\x00", "xz", "unpack it"),
    (b"\x28\xb5\x2f\xfd", "zstd", "unpack it"),
    (codecs.BOM_UTF16_LE, "UTF-16", "save it as UTF-8"),
    (codecs.BOM_UTF16_BE, "UTF-16", "save it as UTF-8"),
)

_Text = TypeVar("_Text", bytes, bytearray)


def read_xmc(
    path: str | os.PathLike[str],
    *,
    num_features: int | None = None,
    num_labels: int | None = None,
    progress: bool = False,
) -> XMCData:
    """Reads a file in the text format of the Extreme Classification Repository.

    A row without labels starts with a blank or directly with a feature; an empty line is a row
    without labels and features. Empty lines after the last row are skipped. A feature that a row
    lists twice stays twice, which an ``nn.EmbeddingBag`` sums. Values are rounded to float32; too small ones
    become zero.

    The file is read in chunks: beyond the result, memory is needed for a few chunks of 32 MiB only.

    Args:
        path: The file; gzip is recognised by its content, whatever the name. A byte order mark of
            UTF-8 is skipped.
        num_features: Takes the place of the header's number of features, e.g. that of the training
            file for a test file whose header has fewer.
        num_labels: Likewise for the number of labels. Where it is given, a header of two integers
            is read as ``rows features``.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: naming file and line, if the header is not three integers, a row is malformed
            (an index that is no integer or out of range, a missing colon, a value that is no finite
            number), or the header promises more or fewer rows than there are; or naming the file,
            if its gzip data are damaged or cut off.
    """
    path = Path(path)
    with _opened(path) as (raw, file):
        header = _read_header(path, _read(path, lambda: file.readline(200)), num_labels)
        num_rows, header_features, header_labels = header
        num_features = header_features if num_features is None else num_features
        num_labels = header_labels if num_labels is None else num_labels
        for name, size in (("num_features", num_features), ("num_labels", num_labels)):
            if isinstance(size, bool) or not isinstance(size, Integral) or not 0 <= size <= LARGEST:
                raise ValueError(
                    f"read_xmc: {path}: {name}: expected an integer in [0, {LARGEST}], got {size!r}: "
                    "indices are kept as int32"
                )
        rows = SparseRows(
            feature_indptr=np.zeros(1, np.int64),
            feature_indices=np.empty(0, np.int32),
            feature_values=np.empty(0, np.float32),
            label_indptr=np.zeros(1, np.int64),
            label_indices=np.empty(0, np.int32),
        )
        size = os.fstat(raw.fileno()).st_size
        bar = tqdm(
            total=size, desc=f"Reading {path.name}", unit="B", unit_scale=True, disable=not progress
        )
        with bar:
            line = 2
            while text := _read(path, lambda: _read_lines(file)):
                found = _parse(path, text, num_features, num_labels, first_line=line)
                pieces = [piece.numpy() for piece in found]
                here, room = len(pieces[0]) - 1, num_rows - len(rows)
                if here > room:
                    held = pieces[0][1:] + pieces[3][1:].astype(np.int64)  # entries up to each line
                    more = room + np.flatnonzero(held[room:] > (held[room - 1] if room else 0))
                    if len(more):
                        raise ValueError(
                            f"read_xmc: {path}, line {line + more[0]}: expected {num_rows} rows "
                            f"as in the header, got one more: correct the first line"
                        )
                    pieces[0], pieces[3] = pieces[0][: room + 1], pieces[3][: room + 1]
                for array, piece in zip(vars(rows).values(), pieces, strict=True):
                    _append(array, piece)
                line += here
                bar.update(raw.tell() - bar.n)
    if len(rows) < num_rows:
        raise ValueError(
            f"read_xmc: {path}, line {len(rows) + 1}: expected {num_rows} rows as in the "
            f"header, got the end of the file after {len(rows)}: is it complete?"
        )
    return XMCData(**vars(rows), num_features=num_features, num_labels=num_labels)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[BufferedReader, gzip.GzipFile | BufferedReader]]:
    """The file as it is, and its text."""
    with open(path, "rb") as raw:
        start = raw.peek(8)
        for magic, kind, remedy in _NOT_TEXT:
            if start.startswith(magic):
                raise ValueError(f"read_xmc: {path}: expected text or gzip, got {kind}: {remedy}")
        if not start.startswith(b"\x1f\x8b"):
            yield raw, raw
            return
        with gzip.GzipFile(fileobj=raw, mode="rb") as file:
            yield raw, file


def _read(path: Path, read: Callable[[], _Text]) -> _Text:
    """What ``read`` returns, with damage of gzip data as an error that names the file."""
    try:
        return read()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        message = (
            f"read_xmc: {path}: the gzip data are damaged or cut off ({error}); download or compress "
            "the file again"
        )
    raise ValueError(message)


def _read_header(path: Path, line: bytes, num_labels: int | None) -> list[int]:
    """The header's numbers of rows, features and labels."""
    line = line.removeprefix(codecs.BOM_UTF8)
    if not re.fullmatch(rb"\s*[0-9]{1,18}(\s+[0-9]{1,18}){1,2}\s*", line):
        raise ValueError(
            f"read_xmc: {path}, line 1: expected a header 'rows features labels' of three "
            f"integers, got {line[:40]!r}: add one if the file starts with its first row"
        )
    numbers = [int(number) for number in line.split()]
    if len(numbers) == 3:
        return numbers
    if num_labels is None:
        raise ValueError(
            f"read_xmc: {path}, line 1: expected a header 'rows features labels' of three integers, "
            f"got two, {line[:40]!r}: if they are rows and features, give num_labels (0 for a file of "
            "features alone)"
        )
    return [*numbers, num_labels]


def _read_lines(file: gzip.GzipFile | BufferedReader) -> bytearray:
    """The next chunk of whole lines; empty at the end of the file."""
    text = bytearray(CHUNK_BYTES)
    del text[file.readinto(text) :]
    text += file.readline()
    return text


def _parse(
    path: Path, text: bytearray, num_features: int, num_labels: int, first_line: int
) -> tuple[Tensor, ...]:
    lines = torch.frombuffer(text, dtype=torch.uint8)
    try:
        return ops.parse_xmc(lines, num_features, num_labels, first_line)
    except RuntimeError as error:
        found = re.search(r"line \d+: .*", str(error))
        if found is None:
            raise
        message = f"read_xmc: {path}, {found[0]}"
    raise ValueError(message)


def _append(array: np.ndarray, piece: np.ndarray) -> None:
    """Lengthens an array by a chunk's piece, in place; row pointers (int64) carry on counting.

    The memory allocator moves the pages of a large array, it does not copy them, where joining all
    pieces at the end would need twice the memory.
    """
    start = len(array)
    is_indptr = array.dtype == np.int64
    array.resize(start + len(piece) - is_indptr, refcheck=False)
    if is_indptr:
        np.add(piece[1:], array[start - 1], out=array[start:], dtype=np.int64)
    else:
        array[start:] = piece
