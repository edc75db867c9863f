"""Sparse rows with several labels each: files of the Extreme Classification Repository, batches.

The first line of a file is ``rows features labels``; each further line is one row,
``label,label,... feature:value feature:value ...``, with all indices counted from 0.

    train = read_xmc("train.txt")
    for indices, offsets, values, labels in batches(train, 256, seed=0):
        hidden = embedding_bag(indices, offsets, per_sample_weights=values)
        ...
"""

from __future__ import annotations

import codecs
import contextlib
import dataclasses
import gzip
import os
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BufferedReader
from numbers import Integral
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from . import ops

__all__ = ["IGNORE_INDEX", "SparseRows", "XMCData", "batches", "read_xmc"]

IGNORE_INDEX = -100
"""The padding of labels, as in ``F.cross_entropy``."""

CHUNK_BYTES = 32 << 20
_LARGEST = 1 << 31  # indices are int32

_NOT_TEXT = (
    (b"PK\x03\x04", "a zip archive", "unpack it"),
    (b"BZh", "bzip2", "unpack it"),
    (b"\xfd7zXZ\x00", "xz", "unpack it"),
    (b"\x28\xb5\x2f\xfd", "zstd", "unpack it"),
    (codecs.BOM_UTF16_LE, "UTF-16", "save it as UTF-8"),
    (codecs.BOM_UTF16_BE, "UTF-16", "save it as UTF-8"),
)

_Text = TypeVar("_Text", bytes, bytearray)
_Rows = TypeVar("_Rows", bound="SparseRows")


@dataclass(frozen=True)
class SparseRows:
    """Rows of features and of labels, both in compressed sparse row form.

    Row ``i`` has the features ``feature_indices[feature_indptr[i]:feature_indptr[i + 1]]`` with
    their ``feature_values``, and likewise its labels; it may be without either.

    Attributes:
        feature_indptr: ``(n + 1)`` int64.
        feature_indices: ``(number of non-zero features)`` int32.
        feature_values: ``(number of non-zero features)`` float32.
        label_indptr: ``(n + 1)`` int64.
        label_indices: ``(number of labels)`` int32.
    """

    feature_indptr: np.ndarray
    feature_indices: np.ndarray
    feature_values: np.ndarray
    label_indptr: np.ndarray
    label_indices: np.ndarray

    def __len__(self) -> int:
        return len(self.feature_indptr) - 1

    def select(self: _Rows, rows: np.ndarray) -> _Rows:
        """The given rows, in the given order, as a copy.

        Args:
            rows: Integer, one-dimensional, each in [0, n).

        Raises:
            ValueError: if rows are anything else.
        """
        rows = _checked_rows(rows, len(self))
        features, feature_indptr = _positions(self.feature_indptr, rows)
        labels, label_indptr = _positions(self.label_indptr, rows)
        return dataclasses.replace(
            self,
            feature_indptr=feature_indptr,
            feature_indices=self.feature_indices[features],
            feature_values=self.feature_values[features],
            label_indptr=label_indptr,
            label_indices=self.label_indices[labels],
        )


@dataclass(frozen=True)
class XMCData(SparseRows):
    """The rows of one file, as they stand there: neither sorted nor merged.

    Attributes:
        num_features: How many features there are: the rows of the embedding.
        num_labels: How many labels there are: the rows of the output layer.
    """

    num_features: int
    num_labels: int

    def label_counts(self) -> Tensor:
        """How often each label occurs, ``(num_labels)`` int64; what ``metrics.propensities`` takes.

        A label that a row lists twice counts twice.
        """
        return torch.from_numpy(np.bincount(self.label_indices, minlength=self.num_labels))


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
            if (
                isinstance(size, bool)
                or not isinstance(size, Integral)
                or not 0 <= size <= _LARGEST
            ):
                raise ValueError(
                    f"read_xmc: {path}: {name}: expected an integer in [0, {_LARGEST}], got {size!r}: "
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


def batches(
    data: SparseRows,
    batch_size: int,
    *,
    seed: int | None = None,
    drop_last: bool = False,
    normalise: bool = False,
    skip: int = 0,
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Iterates over all rows once.

    Args:
        data: The rows.
        batch_size: Rows a batch, B.
        seed: Shuffles the rows; None takes them in order.
        drop_last: Whether to leave out a last batch of fewer rows.
        normalise: Whether to scale each row's values to unit Euclidean length; a row whose values
            are all zero stays as it is.
        skip: Batches to leave out at the beginning, as when training resumes in the middle.

    Yields:
        ``(indices, offsets, values, labels)``: what ``nn.EmbeddingBag(mode="sum",
        include_last_offset=True)`` takes as input, offsets ``(B + 1)`` (both int64) and
        per_sample_weights (float32), and labels ``(B, M)`` int64, padded with -100, where M is the
        largest number of labels of a row of this batch, possibly 0.

    Raises:
        ValueError: if batch_size is less than 1 or skip is negative, or either is no integer.
    """
    for name, value, least in (("batch_size", batch_size, 1), ("skip", skip, 0)):
        if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
            raise ValueError(
                f"batches: {name}: expected an integer of at least {least}, got {value!r}"
            )
    num_rows = len(data)
    order = np.arange(num_rows)
    if seed is not None:
        np.random.default_rng(seed).shuffle(order)
    end = num_rows - batch_size + 1 if drop_last else num_rows
    for start in range(skip * batch_size, end, batch_size):
        batch = data.select(order[start : start + batch_size])
        counts = np.diff(batch.label_indptr)
        labels = np.full((len(batch), counts.max()), IGNORE_INDEX, dtype=np.int64)
        labels[np.arange(labels.shape[1]) < counts[:, None]] = batch.label_indices
        values = _unit_rows(batch) if normalise else batch.feature_values
        yield (
            torch.from_numpy(batch.feature_indices.astype(np.int64)),
            torch.from_numpy(batch.feature_indptr),
            torch.from_numpy(values),
            torch.from_numpy(labels),
        )


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


def _positions(indptr: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where the entries of the given rows lie, and the row pointers once they are gathered."""
    starts = indptr[rows]
    lengths = indptr[rows + 1] - starts
    new_indptr = np.zeros(len(rows) + 1, dtype=np.int64)
    np.cumsum(lengths, out=new_indptr[1:])
    return np.arange(new_indptr[-1]) + np.repeat(starts - new_indptr[:-1], lengths), new_indptr


def _checked_rows(rows: np.ndarray, count: int) -> np.ndarray:
    rows = np.asarray(rows)
    if rows.ndim != 1 or (rows.size and not np.issubdtype(rows.dtype, np.integer)):
        advice = "; of a mask give np.flatnonzero(mask)" if rows.dtype == bool else ""
        raise ValueError(
            "SparseRows.select: rows: expected integers of one dimension, got "
            f"{rows.dtype} of shape {rows.shape}{advice}"
        )
    wrong = rows[(rows < 0) | (rows >= count)] if rows.size else rows
    if wrong.size:
        raise ValueError(
            f"SparseRows.select: rows: expected values in [0, {count}), got {wrong[0]} "
            f"({wrong.size} such)"
        )
    return rows.astype(np.int64)


def _unit_rows(rows: SparseRows) -> np.ndarray:
    """The values, each row scaled to unit length."""
    values = rows.feature_values.astype(np.float64)
    row_of = np.repeat(np.arange(len(rows)), np.diff(rows.feature_indptr))
    lengths = np.sqrt(np.bincount(row_of, weights=values * values, minlength=len(rows)))
    return (values / np.where(lengths > 0, lengths, 1)[row_of]).astype(np.float32)
