"""Files of any content: an error that names the file, or what a slow parser reads."""

import bz2
import gzip
import re

import numpy as np

from slide_torch.data import batches, read_xmc, xmc

PIECES = [*b"0123456789", *b"  \t,,::\n\n\r.-+eE", 0, 0xFF, *b"naif"]


def a_row(draw):
    labels = ",".join(str(draw.randrange(6)) for _ in range(draw.randrange(4)))
    values = ("1", "0.5", "-2e-3", "1e-50", ".5", "5.", "123456789.25")
    tokens = [f"{draw.randrange(9)}:{draw.choice(values)}" for _ in range(draw.randrange(4))]
    return draw.choice([" ", " ", "\t", "  "]).join([labels, *tokens])


def a_file(draw):
    """Content, and how many rows it has if nothing damages it."""
    rows = [a_row(draw) for _ in range(draw.randrange(8))]
    header = draw.choice([f"{len(rows)} 9 6"] * 9 + [f"{len(rows)} 9", f"{len(rows) + 1} 9 6", ""])
    newline = draw.choice(["\n", "\n", "\r\n"])
    content = newline.join([header, *rows, ""]).encode()
    if draw.random() < 0.1:
        content = b"\xef\xbb\xbf" + content
    return content + newline.encode() * draw.choice([0, 0, 0, 1, 3])


def damaged(content, draw):
    content = bytearray(content)
    for _ in range(draw.choice([1, 1, 2, 5])):
        place = draw.randrange(len(content) + 1)
        way = draw.randrange(4)
        if way == 0:
            content[place : place + 1] = bytes([draw.choice(PIECES)])
        elif way == 1:
            content[place:place] = bytes(draw.choice(PIECES) for _ in range(draw.randrange(30)))
        elif way == 2:
            del content[place : place + draw.choice([1, 1, 5, 50])]
        else:
            del content[place:]
    return bytes(content)


def slowly(content, num_labels):
    """Rows of labels and features, or None where something is wrong; number for number as documented."""
    content = content.removeprefix(b"\xef\xbb\xbf")
    lines = content.split(b"\n")
    if lines[-1] == b"":
        lines.pop()
    header = lines.pop(0).split() if lines else []
    if not all(re.fullmatch(rb"[0-9]{1,18}", number) for number in header):
        return None
    if len(header) == 2 and num_labels is not None:
        header = [*header, b"%d" % num_labels]
    if len(header) != 3:
        return None
    count, features, labels = map(int, header)
    if max(features, labels) > 2**31:
        return None
    labels = labels if num_labels is None else num_labels
    rows = []
    for line in lines:
        tokens = [token for token in re.split(rb"[ \t]+", line.removesuffix(b"\r")) if token]
        own = []
        if tokens and line[:1] not in (b" ", b"\t") and b":" not in tokens[0]:
            own = tokens.pop(0).split(b",")
        pairs = [token.split(b":") for token in tokens]
        if any(len(pair) != 2 for pair in pairs):
            return None
        number = rb"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?"
        indices = [(index, labels) for index in own] + [(pair[0], features) for pair in pairs]
        if not all(re.fullmatch(b"[0-9]+", i) and int(i) < limit for i, limit in indices):
            return None
        if not all(re.fullmatch(number, pair[1]) for pair in pairs):
            return None
        with np.errstate(over="ignore"):
            values = np.array([float(pair[1]) for pair in pairs], np.float32)
        if not np.isfinite(values).all():
            return None
        rows.append(([int(i) for i in own], [int(pair[0]) for pair in pairs], values))
    while len(rows) > count and not rows[-1][0] and not rows[-1][1]:
        rows.pop()
    return rows if len(rows) == count else None


def test_files(fuzz, tmp_path, monkeypatch):
    read = refused = 0
    path = tmp_path / "rows.txt"

    def check(draw):
        nonlocal read, refused
        content = a_file(draw)
        if draw.random() < 0.7:
            content = damaged(content, draw)
        written, whole = content, True
        if draw.random() < 0.2:
            written = draw.choice([gzip, gzip, gzip, bz2]).compress(content)
            whole = written[:2] == b"\x1f\x8b"
            if draw.random() < 0.5:
                written, whole = damaged(written, draw), None
        path.write_bytes(written)
        num_labels = draw.choice([None, None, 6])
        monkeypatch.setattr(xmc, "CHUNK_BYTES", draw.choice([1, 7, 30, 1 << 20]))
        try:
            found = read_xmc(path, num_labels=num_labels)
        except ValueError as error:
            assert str(path) in str(error), str(error)
            assert not whole or slowly(content, num_labels) is None, f"refused: {error}"
            refused += 1
            return
        read += 1
        if whole is None:  # damage that gzip's sums do not cover
            return
        rows = slowly(content, num_labels)
        assert whole and rows is not None, f"read: {content}"
        assert len(found) == len(rows)
        for i, (labels, features, values) in enumerate(rows):
            own = found.select(np.array([i]))
            assert own.label_indices.tolist() == labels
            assert own.feature_indices.tolist() == features
            # a double that is rounded again may be off by one unit
            np.testing.assert_allclose(own.feature_values, values, rtol=2e-7, atol=2e-45)
        for _ in batches(found, 3, seed=draw.randrange(9), normalise=True):
            pass

    fuzz(check)
    assert read > 10 and refused > 10
