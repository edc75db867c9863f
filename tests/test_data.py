import bz2
import gzip
import lzma
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT

from slide_torch.data import SparseRows, batches, read_xmc, xmc
from slide_torch.metrics import propensities

NUM_FEATURES, NUM_LABELS = 50, 20
FIELDS = tuple(SparseRows.__dataclass_fields__)
TINY = ROOT / "examples" / "data"
PLAIN = [b"1,2 3:0.5 4:1", b"0 1:1"]  # two rows without fault


def write(path, rows, *, header=None, newline=b"\n", last=b"\n"):
    header = header or b"%d %d %d" % (len(rows), NUM_FEATURES, NUM_LABELS)
    path.write_bytes(newline.join([header, *rows]) + last)
    return path


def parse_naively(rows):
    """The same arrays, a row at a time in plain Python."""
    features, values, labels, feature_indptr, label_indptr = [], [], [], [0], [0]
    for row in rows:
        tokens = row.decode().split()
        if tokens and not row[:1].isspace() and ":" not in tokens[0]:
            labels += [int(label) for label in tokens.pop(0).split(",")]
        for token in tokens:
            index, value = token.split(":")
            features.append(int(index))
            values.append(float(value))
        feature_indptr.append(len(features))
        label_indptr.append(len(labels))
    return SparseRows(
        np.array(feature_indptr, np.int64),
        np.array(features, np.int32),
        np.array(values, np.float32),
        np.array(label_indptr, np.int64),
        np.array(labels, np.int32),
    )


def random_rows(seed, count=200):
    """Rows of every kind: without labels, features or both, all number formats, stray blanks."""
    generator = np.random.default_rng(seed)
    formats = ("{:.6f}", "{:g}", "{:.3e}", "{:.17g}", "{:.0f}.", "+{:.2E}", "-{:.4f}", "000{:f}")
    rows = []
    for _ in range(count):
        labels = generator.integers(0, NUM_LABELS, generator.choice([0, 1, 3])).tolist()
        tokens = []
        for index in generator.integers(0, NUM_FEATURES, generator.choice([0, 1, 8])):
            value = generator.random() * 10.0 ** generator.integers(-12, 12)
            tokens.append(f"{index}:{generator.choice(formats).format(value)}")
        blank = str(generator.choice([" ", " ", "  ", "\t"]))
        text = blank.join(tokens) + str(generator.choice(["", "", " "]))
        if labels or generator.random() < 0.5:
            text = ",".join(map(str, labels)) + blank + text if text else ",".join(map(str, labels))
        rows.append(text.encode())
    return rows


def assert_same(first, second):
    for field in FIELDS:
        array, other = getattr(first, field), getattr(second, field)
        assert array.dtype == other.dtype, field
        np.testing.assert_array_equal(array, other, err_msg=field)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("newline", [b"\n", b"\r\n"])
def test_read_as_naively(tmp_path, seed, newline):
    rows = [*random_rows(seed), b"1 2:3"]  # an empty row at the end needs its newline
    expected = parse_naively(rows)
    assert len(set(np.diff(expected.label_indptr))) > 2
    for last in (newline, b""):
        data = read_xmc(write(tmp_path / "rows.txt", rows, newline=newline, last=last))
        assert_same(data, expected)
        assert len(data) == len(rows)
        assert (data.num_features, data.num_labels) == (NUM_FEATURES, NUM_LABELS)


@pytest.mark.parametrize("chunk_bytes", [1, 7, 100, 4096])
def test_chunks_change_nothing(tmp_path, monkeypatch, chunk_bytes):
    rows = random_rows(9)
    path = write(tmp_path / "rows.txt", rows)
    monkeypatch.setattr(xmc, "CHUNK_BYTES", chunk_bytes)
    assert_same(read_xmc(path), parse_naively(rows))


def test_odd_rows(tmp_path):
    rows = [b"3", b"3 ", b"", b" ", b" 1:2", b"1:2", b"\t1:2 ", b"4,4 1:1 1:2", b"07 08:1", b"\r"]
    data = read_xmc(write(tmp_path / "rows.txt", rows))
    assert np.diff(data.label_indptr).tolist() == [1, 1, 0, 0, 0, 0, 0, 2, 1, 0]
    assert np.diff(data.feature_indptr).tolist() == [0, 0, 0, 0, 1, 1, 1, 2, 1, 0]
    assert data.feature_indices.tolist() == [1, 1, 1, 1, 1, 8]  # repeated features stay
    assert data.label_counts().tolist() == [0, 0, 0, 2, 2, 0, 0, 1] + [0] * 12


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0.084556", 0.084556),
        (".5", 0.5),
        ("5.", 5.0),
        ("+1E+2", 100.0),
        ("-0", -0.0),
        ("1e-60", 0.0),
        ("-1e-400", -0.0),
        ("0e999999999999999999999", 0.0),
        ("1e-40", 1e-40),  # below the normal numbers
        ("3.4028234663852886e38", 3.4028234663852886e38),
        ("123456789012345678901234567890", 123456789012345678901234567890.0),
        ("0." + "0" * 400 + "1e401", 1.0),
        # Rounded once: by way of a double it would be 16777216.
        ("16777217.0000000001", 16777218.0),
    ],
)
def test_values_are_the_nearest_float(tmp_path, text, expected):
    data = read_xmc(write(tmp_path / "rows.txt", [f"1 2:{text}".encode()]))
    assert data.feature_values.tobytes() == np.array([expected], np.float32).tobytes()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (b"20 1:1", r"label index must be an integer in [0, 20), got '20'"),
        (b"-1 1:1", r"label index must be an integer in [0, 20), got '-1'"),
        (b"99999999999999999999 1:1", r"label index .* got '99999999999999999999'"),
        (b"one 1:1", r"label index must be an integer in [0, 20), got 'one'"),
        (b"1.0 1:1", r"label index must be an integer in [0, 20), got '1.0'"),
        (b"1, 1:1", r"label index must be an integer in [0, 20), got ''"),
        (b"1,,2 1:1", r"label index must be an integer in [0, 20), got ''"),
        (b", 1:1", r"label index must be an integer in [0, 20), got ''"),
        (b"1 50:1", r"feature index must be an integer in [0, 50), got '50'"),
        (b"50:1", r"feature index must be an integer in [0, 50), got '50'"),
        (b"1 -1:1", r"feature index must be an integer in [0, 50), got '-1'"),
        (b"1 x:1", r"feature index must be an integer in [0, 50), got 'x'"),
        (b"1 :1", r"feature index must be an integer in [0, 50), got ''"),
        (b"1,2:1", r"feature index must be an integer in [0, 50), got '1,2'"),
        (b"1 2 3:1", r"expected feature:value, got '2' without a colon"),
        (b" 1,2 3:1", r"expected feature:value, got '1,2' without a colon"),
        (b"1 2:1 3", r"expected feature:value, got '3' without a colon"),
        (b"1 2:", r"feature value must be a finite float32 number, got ''"),
        (b"1 2: 3", r"feature value must be a finite float32 number, got ''"),
        (b"1 2:.", r"feature value must be a finite float32 number, got '.'"),
        (b"1 2:1e", r"feature value must be a finite float32 number, got '1e'"),
        (b"1 2:+-1", r"feature value must be a finite float32 number, got '+-1'"),
        (b"1 2:0x1", r"feature value must be a finite float32 number, got '0x1'"),
        (b"1 2:1:3", r"feature value must be a finite float32 number, got '1:3'"),
        (b"1 2:1,3:4", r"feature value must be a finite float32 number, got '1,3:4'"),
        (b"1 2:nan", r"feature value must be a finite float32 number, got 'nan'"),
        (b"1 2:-inf", r"feature value must be a finite float32 number, got '-inf'"),
        (b"1 2:1e39", r"feature value must be a finite float32 number, got '1e39'"),
        (b"1 2:1e400", r"feature value must be a finite float32 number, got '1e400'"),
        (b"1 2:1\r 3:1", r"feature value must be a finite float32 number, got '1?'"),
        (b"1 2:\xff\x00", r"feature value must be a finite float32 number, got '??'"),
        (b"1 2:" + b"9" * 99, "got '" + "9" * 40 + "...'"),
    ],
)
@pytest.mark.parametrize("chunk_bytes", [1, 1 << 20])
def test_malformed_rows_name_file_and_line(tmp_path, monkeypatch, row, message, chunk_bytes):
    monkeypatch.setattr(xmc, "CHUNK_BYTES", chunk_bytes)
    path = write(tmp_path / "rows.txt", [*PLAIN, row, *PLAIN, b"worse"])
    pattern = (
        re.escape(f"read_xmc: {path}, line 4: ") + ".*" + re.escape(message).replace(r"\.\*", ".*")
    )
    with pytest.raises(ValueError, match=pattern):
        read_xmc(path)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_first_fault_is_named_whatever_the_threads(tmp_path, threads):
    rows = PLAIN * 10_000
    for fault in (19_000, 12_345, 19_999):
        rows[fault] = b"1 1:?"
    path = write(tmp_path / "rows.txt", rows)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with pytest.raises(ValueError, match="line 12347: feature value"):
            read_xmc(path)
        path = write(path, PLAIN * 10_000)
        assert_same(read_xmc(path), parse_naively(PLAIN * 10_000))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"3 50 20", "line 3: expected 3 rows as in the header, got the end of the file after 2"),
        (b"1 50 20", "line 3: expected 1 rows as in the header, got one more"),
        (b"0 50 20", "line 2: expected 0 rows as in the header, got one more"),
        (b"2 50", "line 1: expected a header 'rows features labels'"),
        (b"2 50 20 1", "line 1: expected a header"),
        (b"2 50 -1", "line 1: expected a header"),
        (b"1,2 3:0.5", "line 1: expected a header"),
        (b"\n", "line 1: expected a header"),
        (
            b"2 50 2147483649",
            r"num_labels: expected an integer in \[0, 2147483648\], got 2147483649",
        ),
    ],
)
@pytest.mark.parametrize("chunk_bytes", [1, 1 << 20])
def test_bad_headers(tmp_path, monkeypatch, header, message, chunk_bytes):
    monkeypatch.setattr(xmc, "CHUNK_BYTES", chunk_bytes)
    path = write(tmp_path / "rows.txt", PLAIN, header=header)
    with pytest.raises(ValueError, match=re.escape(f"read_xmc: {path}") + "[,:] " + message):
        read_xmc(path)


@pytest.mark.parametrize("extra", [b"\n", b"\n\n\n", b"\r\n \t\r\n", b" "])
@pytest.mark.parametrize("chunk_bytes", [1, 20, 1 << 20])
def test_blank_lines_at_the_end(tmp_path, monkeypatch, extra, chunk_bytes):
    monkeypatch.setattr(xmc, "CHUNK_BYTES", chunk_bytes)
    path = write(tmp_path / "rows.txt", PLAIN, last=b"\n" + extra)
    assert_same(read_xmc(path), parse_naively(PLAIN))
    path.write_bytes(path.read_bytes() + b"\n1 2:3\n")
    line = 2 + path.read_bytes().count(b"\n") - 2
    with pytest.raises(ValueError, match=f"line {line}: expected 2 rows as in the header, got one"):
        read_xmc(path)
    path = write(path, [], last=b"\n" + extra)
    assert len(read_xmc(path)) == 0


def test_byte_order_marks(tmp_path):
    path = write(tmp_path / "rows.txt", PLAIN)
    text = path.read_text()
    path.write_text(text, encoding="utf-8-sig")
    assert_same(read_xmc(path), parse_naively(PLAIN))
    path.write_text(text, encoding="utf-16")
    with pytest.raises(ValueError, match="expected text or gzip, got UTF-16: save it as UTF-8"):
        read_xmc(path)


def test_a_header_of_two_numbers(tmp_path):
    path = write(tmp_path / "rows.txt", [b"3:0.5 4:1", b"1:1"], header=b"2 50")
    with pytest.raises(ValueError, match=r"three integers, got two, b'2 50.*give num_labels"):
        read_xmc(path)
    data = read_xmc(path, num_labels=0)
    assert (len(data), data.num_features, data.num_labels) == (2, 50, 0)
    path = write(path, PLAIN, header=b"2 50")
    assert_same(read_xmc(path, num_labels=20), parse_naively(PLAIN))
    path = write(path, PLAIN, header=b"50 20")  # features and labels
    with pytest.raises(
        ValueError, match="expected 50 rows as in the header, got the end of the file after 2"
    ):
        read_xmc(path, num_labels=20)


def test_other_compressions_and_names(tmp_path):
    text = write(tmp_path / "rows.txt", PLAIN).read_bytes()
    for name, content in (("packed.txt", gzip.compress(text)), ("plain.gz", text)):
        (tmp_path / name).write_bytes(content)
        assert_same(read_xmc(tmp_path / name), parse_naively(PLAIN))
    for module, kind in ((bz2, "bzip2"), (lzma, "xz")):
        (tmp_path / "rows").write_bytes(module.compress(text))
        with pytest.raises(ValueError, match=f"rows: expected text or gzip, got {kind}: unpack it"):
            read_xmc(tmp_path / "rows")
    with zipfile.ZipFile(tmp_path / "rows.zip", "w") as archive:
        archive.writestr("rows.txt", text)
    with pytest.raises(ValueError, match="got a zip archive: unpack it"):
        read_xmc(tmp_path / "rows.zip")


@pytest.mark.parametrize("cut", [1, 11, 300, -9, -4, -1])
def test_damaged_gzip_names_the_file(tmp_path, cut):
    path = write(tmp_path / "rows.txt", random_rows(3))
    content = gzip.compress(path.read_bytes())
    path.write_bytes(content[:cut])
    advice = "header" if cut == 1 else "the gzip data are damaged or cut off"
    with pytest.raises(ValueError, match=f"read_xmc: {re.escape(str(path))}[:,].*{advice}"):
        read_xmc(path)
    damaged = bytearray(content)
    damaged[cut] ^= 0x55
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match=f"read_xmc: {re.escape(str(path))}[:,]"):
        read_xmc(path)


def test_empty_files(tmp_path):
    path = tmp_path / "rows.txt"
    path.touch()
    with pytest.raises(ValueError, match="line 1: expected a header"):
        read_xmc(path)
    data = read_xmc(write(path, [], header=b" 0\t0 0 ", last=b""))
    assert len(data) == 0
    assert_same(data, parse_naively([]))
    assert list(batches(data, 2)) == []


def test_numbers_of_features_and_labels_can_be_given(tmp_path):
    path = write(tmp_path / "rows.txt", PLAIN, header=b"2 4 2")
    data = read_xmc(path, num_features=5, num_labels=3)
    assert (data.num_features, data.num_labels) == (5, 3)
    assert data.label_counts().tolist() == [1, 1, 1]
    with pytest.raises(ValueError, match=r"line 2: label index must be an integer in \[0, 2\)"):
        read_xmc(path, num_features=5)
    with pytest.raises(ValueError, match=r"line 2: feature index must be an integer in \[0, 4\)"):
        read_xmc(path, num_labels=3)
    with pytest.raises(
        ValueError, match=r"num_features: expected an integer in \[0, 2147483648\], got -1"
    ):
        read_xmc(path, num_features=-1)


def test_compressed_file_and_progress(tmp_path, capsys):
    rows = random_rows(3)
    path = tmp_path / "rows.txt.gz"
    path.write_bytes(gzip.compress(write(tmp_path / "rows.txt", rows).read_bytes()))
    assert_same(read_xmc(path), parse_naively(rows))
    assert capsys.readouterr().err == ""
    read_xmc(path, progress=True)
    assert "Reading rows.txt.gz: 100%" in capsys.readouterr().err


def test_operator():
    text = torch.frombuffer(bytearray(b"1,2 3:0.5 4:1\n\n 1:2"), dtype=torch.uint8)
    parse = torch.ops.slide_torch.parse_xmc
    expected = ([0, 2, 2, 3], [3, 4, 1], [0.5, 1.0, 2.0], [0, 2, 2, 2], [1, 2])
    assert tuple(tensor.tolist() for tensor in parse(text, 5, 3)) == expected
    with pytest.raises(RuntimeError, match=r"parse_xmc: line 7: label index .* \[0, 2\), got '2'"):
        parse(text, 5, 2, 7)
    with pytest.raises(RuntimeError, match="text: expected dtype Byte, got Int"):
        parse(text.int(), 5, 3)
    with pytest.raises(RuntimeError, match="text must be contiguous"):
        parse(text[::2], 5, 3)
    with pytest.raises(RuntimeError, match=r"num_labels: expected 0 to 2\^31, got -1"):
        parse(text, 5, -1)


def test_select(tmp_path):
    rows = random_rows(1)
    data = read_xmc(write(tmp_path / "rows.txt", rows))
    order = np.array([5, 0, 5, 199])
    picked = data.select(order)
    assert_same(picked, parse_naively([rows[row] for row in order]))
    assert type(picked) is type(data)
    assert (picked.num_features, picked.num_labels) == (NUM_FEATURES, NUM_LABELS)
    assert len(data.select(order[:0])) == 0


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([0, -1], r"expected values in \[0, 2\), got -1 \(1 such\)"),
        ([2], r"expected values in \[0, 2\), got 2"),
        (np.array([7, 2**63], np.uint64), r"got 7 \(2 such\)"),
        ([0.0], r"expected integers of one dimension, got float64 of shape \(1,\)"),
        ([[0]], r"expected integers of one dimension, got int64 of shape \(1, 1\)"),
        (0, r"expected integers of one dimension, got int64 of shape \(\)"),
        ([True, False], r"got bool of shape \(2,\); of a mask give np.flatnonzero\(mask\)"),
    ],
)
def test_select_refuses_other_than_rows(tmp_path, rows, message):
    data = read_xmc(write(tmp_path / "rows.txt", PLAIN))
    with pytest.raises(ValueError, match="SparseRows.select: rows: .*" + message):
        data.select(rows)
    assert len(data.select([])) == 0 and len(data.select(torch.tensor([1, 1, 0]))) == 3


@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("drop_last", [False, True])
def test_batches_as_naively(tmp_path, seed, normalise, drop_last):
    rows = [*random_rows(2), b"1 2:0 3:0", b"2 2:1e30 3:1e30"]
    data = read_xmc(write(tmp_path / "rows.txt", rows))
    order = np.arange(len(rows))
    if seed is not None:
        np.random.default_rng(seed).shuffle(order)
    size, options = 16, {"seed": seed, "drop_last": drop_last, "normalise": normalise}
    got = list(batches(data, size, **options))
    assert len(got) == (len(rows) // size if drop_last else -(-len(rows) // size))
    for start, (indices, offsets, values, labels) in enumerate(got):
        few = [parse_naively([rows[row]]) for row in order[start * size : (start + 1) * size]]
        assert [tensor.dtype for tensor in (indices, offsets, labels)] == [torch.int64] * 3
        assert values.dtype == torch.float32
        assert (
            offsets.tolist() == np.cumsum([0] + [len(row.feature_indices) for row in few]).tolist()
        )
        assert indices.tolist() == [index for row in few for index in row.feature_indices]
        for row, begin, end in zip(few, offsets[:-1], offsets[1:], strict=True):
            expected = row.feature_values.astype(np.float64)
            if normalise:
                expected /= np.linalg.norm(expected) or 1
            np.testing.assert_allclose(values[begin:end].numpy(), expected, rtol=1e-6)
        most = max(len(row.label_indices) for row in few)
        padded = [[*row.label_indices, *[-100] * (most - len(row.label_indices))] for row in few]
        assert labels.tolist() == padded


def test_batches_without_labels_or_features(tmp_path):
    data = read_xmc(write(tmp_path / "rows.txt", [b"", b"1:2", b""]))
    (indices, offsets, values, labels), last = batches(data, 2, normalise=True)
    assert (indices.tolist(), offsets.tolist(), values.tolist()) == ([1], [0, 0, 1], [1.0])
    assert labels.shape == (2, 0)
    assert last[3].shape == (1, 0)
    with pytest.raises(ValueError, match="batch_size: expected an integer of at least 1, got 0"):
        next(batches(data, 0))
    with pytest.raises(ValueError, match="skip: expected an integer of at least 0"):
        next(batches(data, 1, skip=0.5))
    assert len(list(batches(data, np.int64(2)))) == 2


def test_tiny_files_are_what_their_readme_makes(tmp_path, monkeypatch):
    snippet = re.search(r"```python\n(.*?)```", (TINY / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(snippet[1], {})
    for name, num_rows in (("tiny_train.txt", 60), ("tiny_test.txt", 20)):
        assert Path(name).read_bytes() == (TINY / name).read_bytes()
        data = read_xmc(TINY / name)
        assert (len(data), data.num_features, data.num_labels) == (num_rows, 30, 12)
        assert np.flatnonzero(np.diff(data.label_indptr) == 0).tolist() == [7]
        assert np.flatnonzero(np.diff(data.feature_indptr) == 0).tolist() == [11]
        if name == "tiny_train.txt":
            assert data.label_counts().min() > 0
            assert propensities(data.label_counts(), len(data)).max() < 1
        for indices, offsets, values, labels in batches(data, 8, seed=0):
            bag = torch.nn.EmbeddingBag(30, 3, mode="sum", include_last_offset=True)
            assert bag(indices, offsets, per_sample_weights=values).shape == (len(labels), 3)
