"""Reader, writer and digests against the safetensors library and public hash tools."""

from __future__ import annotations

import hashlib
import json
import threading
from itertools import pairwise

import blake3
import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from nf4cli.checkpoint.digest import OrderedDigest, ShardDigest, digest_shard
from nf4cli.checkpoint.reader import ByteReader, count_tensors, read_shard
from nf4cli.checkpoint.writer import ShardWriter, lay_out
from nf4cli.engines import cpu
from nf4cli.errors import InputError
from nf4cli.format.dtypes import ITEMSIZE
from nf4cli.threads import run

ENTRIES = st.lists(
    st.tuples(
        st.text(min_size=1, max_size=12).filter(lambda s: s != "__metadata__" and s.isprintable()),
        st.sampled_from(sorted(set(ITEMSIZE) - {"C64"})),
        st.lists(st.integers(0, 7), max_size=3).map(tuple),
    ),
    min_size=1, max_size=12, unique_by=lambda entry: entry[0],
)  # fmt: skip


@settings(max_examples=80, deadline=None)
@given(ENTRIES, st.integers(0, 12), st.randoms(use_true_random=False))
def test_what_is_written_the_library_reads(tmp_path_factory, entries, cut, random):
    root = tmp_path_factory.mktemp("w")
    layout = lay_out("x.safetensors", entries[:cut], entries[cut:])
    writer = ShardWriter(root, layout)
    content = {k: random.randbytes(t.nbytes) for k, t in layout.tensors.items()}
    pieces = [(k, i, content[k][i : i + 7]) for k in content for i in range(0, len(content[k]), 7)]
    random.shuffle(pieces)
    for key, offset, data in pieces:
        writer.write(key, offset, np.frombuffer(data, np.uint8))
    writer.finish()
    shard = read_shard(root / "x.safetensors")
    assert count_tensors(shard.path) == len(shard.tensors)
    data = shard.path.read_bytes()
    assert len(data) == layout.size
    with safe_open(shard.path, "numpy") as file:
        assert set(file.keys()) == set(content)
        for key, dtype, shape in entries:
            view = file.get_slice(key)
            assert (view.get_dtype(), tuple(view.get_shape())) == (dtype, shape)
    for tensor in shard.tensors:
        assert data[tensor.start : tensor.stop] == content[tensor.name]
        if tensor.nbytes:
            place = tensor.start - shard.data_start
            assert place % ITEMSIZE[tensor.dtype] == 0
    digest, tensors = digest_shard(shard, "blake3")
    assert digest == blake3.blake3(data).hexdigest()
    assert tensors == {k: xxhash.xxh3_128_hexdigest(v) for k, v in content.items()}


@pytest.mark.parametrize(
    "metadata", [None, {}, {"format": "pt"}, {"a": '{"b\\"{": {"{": {}}}', '"{"': "{\\", "\\": "}"}]
)
@pytest.mark.parametrize("indent", [None, 1])
def test_tensors_are_counted_without_parsing_the_header(tmp_path, metadata, indent):
    header = {} if metadata is None else {"__metadata__": metadata}
    for place, name in enumerate(['w"{', "{", "\\", "data_offsets", 'x\\"', "plain"]):
        header[name] = {"dtype": "U8", "shape": [1], "data_offsets": [place, place + 1]}
    text = json.dumps(header, indent=indent).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(6))
    assert count_tensors(path) == len(read_shard(path).tensors) == 6


@pytest.mark.parametrize("text", [b"", b"{", b'"{{', b"\\", b'"\\"' * 50_000])
def test_counting_tensors_needs_no_valid_header(tmp_path, text):
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    assert count_tensors(path) == 0


def test_streamed_weights_come_first_and_in_order():
    bodies = [("a", "BF16", (4, 4)), ("odd", "BF16", (3,)), ("b", "F32", (2,))]
    layout = lay_out("x", bodies, [("c", "F32", (3,))])
    assert list(layout.tensors) == ["a", "b", "c", "odd"]
    assert layout.streamed == {"a", "b"}


def test_a_writer_refuses_bytes_outside_of_the_tensor(tmp_path):
    writer = ShardWriter(tmp_path, lay_out("x", [("a", "U8", (8,))], []))
    with pytest.raises(ValueError, match="a: 5"):
        writer.write("a", 5, np.zeros(4, np.uint8))
    writer.close()


@pytest.mark.parametrize(("algorithm", "threads"), [("sha256", 1), ("blake3", 1), ("blake3", 3)])
def test_threads_in_any_order_give_the_digest_of_the_file(algorithm, threads):
    """And BLAKE3's own threads, which take part from 128 KiB on."""
    layout = lay_out("x", [(f"t{i}", "U8", (30_000 * i + 8,)) for i in range(40)], [])
    data = np.random.default_rng(0).integers(0, 256, layout.size).astype(np.uint8)
    digest = ShardDigest(layout.tensors.values(), algorithm, threads)
    turns = OrderedDigest(digest)
    edges = [0, *(t.stop for t in layout.tensors.values())]
    edges[1:1] = [layout.size - sum(t.nbytes for t in layout.tensors.values())]
    pieces = list(pairwise(edges))
    run(pieces, lambda: lambda p: turns.update(p[0], data[p[0] : p[1]]), 7, turns.abort)
    whole = hashlib.sha256(data) if algorithm == "sha256" else blake3.blake3(data)
    assert digest.hexdigest() == whole.hexdigest()
    for name, tensor in layout.tensors.items():
        assert digest.tensors[name] == xxhash.xxh3_128_hexdigest(data[tensor.start : tensor.stop])


@pytest.mark.parametrize("workers", [1, 4])
def test_the_first_failure_stops_everybody(workers):
    started: list[int] = []
    released = threading.Event()

    def work(item: int) -> None:
        started.append(item)
        if item == 3:
            raise KeyError("three")
        if item > 3:
            assert released.wait(10)

    with pytest.raises(KeyError, match="three"):
        run(range(1000), lambda: work, workers, released.set)
    assert len(started) < 20


def test_a_reader_checks_the_size(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(bytes(100))
    with ByteReader(path, 100) as reader:
        assert reader.read(90, 10).nbytes == 10


@pytest.fixture(params=["compiled", "not compiled"])
def library(request, tmp_path, monkeypatch):
    """The library, and none, as where it could not be built."""
    if request.param == "not compiled":
        monkeypatch.setattr(cpu, "LIBRARY", tmp_path / "absent.so")
    cpu._library.cache_clear()
    yield
    cpu._library.cache_clear()


@pytest.mark.usefixtures("library")
def test_rows_are_read_a_stride_apart(tmp_path):
    data = np.arange(1000, dtype=np.uint16).view(np.uint8)
    (tmp_path / "x").write_bytes(data.tobytes())
    with ByteReader(tmp_path / "x", 2000) as reader:
        block = np.zeros((7, 30), np.uint8)
        reader.read_rows(block, 100, 200)
        assert all(np.array_equal(block[i], data[100 + 200 * i :][:30]) for i in range(7))
        with pytest.raises(InputError, match="ended at byte 2,000"):
            reader.read_rows(block, 790, 200)


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("itemsize", [1, 2, 4, 8])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (64, 64), (7, 130), (201, 9), (65, 33)])
def test_columns_are_turned_as_they_are_read(tmp_path, itemsize, rows, columns):
    total, left = columns + 11, 5
    matrix = np.random.default_rng(0).integers(0, 256, (rows, total * itemsize), np.uint8)
    (tmp_path / "x").write_bytes(b"abc" + matrix.tobytes())
    stored = matrix.view(f"u{itemsize}")
    place, stride = 3 + left * itemsize, total * itemsize
    with ByteReader(tmp_path / "x", 3 + matrix.nbytes) as reader:
        found = np.zeros((columns, rows), f"u{itemsize}")
        reader.read_columns(found, place, stride)
        assert np.array_equal(found, stored[:, left : left + columns].T)
        with pytest.raises(InputError, match=f"ended at byte {3 + matrix.nbytes:,}"):
            reader.read_columns(found, place + 7 * itemsize, stride)  # of the last row
