"""A tensor comes out of the store bit for bit, in any slice, and only for the attempt that counts."""

import itertools
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import delete, func, select

from attnlab_storage import queue, results, tensors
from attnlab_storage.database import Store
from attnlab_storage.tables import TensorChunk


@pytest.fixture
def claim(store: Store, point: Callable[..., dict[str, Any]]) -> queue.Claim:
    queue.submit(store, name="n", spec={}, spec_hash="h", points=[point()])
    claimed = queue.claim(store, "me")
    assert claimed is not None
    return claimed


def write(store: Store, claim: queue.Claim, array: np.ndarray, name: str = "query", **options: Any) -> int:
    with results.recording(store, claim) as session:
        return tensors.write_tensor(session, claim, name, 0, array, **options)


def odd(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Float32 of any bits: NaN payloads, infinities, subnormals and negative zero among them."""
    return np.random.default_rng(seed).integers(0, 2**32, shape, np.uint32).view(np.float32)


def test_every_bit_comes_back(store: Store, claim: queue.Claim):
    shapes = [(1, 1, 1), (3, 7, 5), (2, 64, 8), (1, 65, 64), (3, 63)]
    for number, (shape, chunk_tokens) in enumerate(itertools.product(shapes, (1, 16, 64, 2048))):
        array, name = odd(shape, seed=number), f"{shape} in {chunk_tokens}"
        assert write(store, claim, array, name, chunk_tokens=chunk_tokens) == array.nbytes
        for head in range(shape[0]):
            found = tensors.read_tensor(store, claim.run_id, name, 0, head)
            assert found.dtype == np.float32, name
            assert found.tobytes() == array[head].tobytes(), name


def test_any_slice_is_the_slice_of_the_array(sliced: tuple[Store, np.ndarray]):
    store, array = sliced

    @settings(max_examples=60, deadline=None)
    @given(head=st.integers(0, 1), ends=st.tuples(st.integers(0, 77), st.integers(0, 77)))
    def check(head: int, ends: tuple[int, int]) -> None:
        start, stop = sorted(ends)
        found = tensors.read_tensor(store, 1, "query", 0, head, start, stop)
        np.testing.assert_array_equal(found, array[head, start:stop])
        assert found.shape == (stop - start, 3)

    check()


@pytest.fixture
def sliced(store: Store, claim: queue.Claim) -> tuple[Store, np.ndarray]:
    array = np.random.default_rng(0).standard_normal((2, 77, 3), np.float32)
    write(store, claim, array, chunk_tokens=16)
    return store, array


def test_a_tensor_is_in_memory_once_while_it_is_read(store: Store, claim: queue.Claim):
    array = odd((1, 1 << 15, 32))
    write(store, claim, array, chunk_tokens=1024)
    tensors.read_tensor(store, 1, "query", 0, 0)
    tracemalloc.start()
    try:
        tensors.read_tensor(store, 1, "query", 0, 0)
        assert tracemalloc.get_traced_memory()[1] < 1.25 * array.nbytes
    finally:
        tracemalloc.stop()


def test_half_precision_is_decoded_exactly(store: Store, claim: queue.Claim):
    values = np.random.default_rng(0).standard_normal((2, 9, 4), np.float32)
    halves = values.astype(np.float16)
    brains = (values.view(np.uint32) >> 16).astype(np.uint16)
    write(store, claim, halves, "half", dtype="float16")
    write(store, claim, brains, "brain", dtype="bfloat16", chunk_tokens=4)
    np.testing.assert_array_equal(tensors.read_tensor(store, 1, "half", 0, 1), halves[1].astype(np.float32))
    expected = (values.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    np.testing.assert_array_equal(tensors.read_tensor(store, 1, "brain", 0, 1), expected[1])


def test_double_precision_stays_double(store: Store, claim: queue.Claim):
    array = np.random.default_rng(0).standard_normal((2, 9))
    write(store, claim, array, "lse", dtype="float64", chunk_tokens=4)
    found = tensors.read_tensor(store, 1, "lse", 0, 1)
    assert found.dtype == np.float64
    np.testing.assert_array_equal(found, array[1])


def test_a_strided_view_is_stored_as_what_it_shows(store: Store, claim: queue.Claim):
    array = odd((5, 2, 3)).transpose(1, 0, 2)
    write(store, claim, array, chunk_tokens=2)
    assert tensors.read_tensor(store, 1, "query", 0, 1).tobytes() == array[1].tobytes()


def test_a_row_is_one_head_and_one_block(store: Store, claim: queue.Claim):
    write(store, claim, odd((3, 33, 2)), chunk_tokens=16)
    with store.read() as session:
        sizes = session.execute(
            select(TensorChunk.head, TensorChunk.block, func.length(TensorChunk.data)).order_by(
                TensorChunk.head, TensorChunk.block
            )
        ).all()
    assert [tuple(row) for row in sizes] == [
        (head, block, size) for head in range(3) for block, size in enumerate((128, 128, 8))
    ]


def test_info_says_what_is_stored(store: Store, claim: queue.Claim):
    write(store, claim, odd((3, 33, 2)), chunk_tokens=16)
    write(store, claim, odd((3, 33)), "lse")
    found = [
        (
            row.name,
            row.layer,
            row.heads,
            row.tokens,
            row.head_dim,
            row.dtype,
            row.codec,
            row.chunk_tokens,
            row.nbytes,
        )
        for row in tensors.tensor_info(store, 1)
    ]
    assert found == [
        ("lse", 0, 3, 33, None, "float32", "raw", 2048, 396),
        ("query", 0, 3, 33, 2, "float32", "raw", 16, 792),
    ]
    assert tensors.stored_bytes(store, 1) == 1188
    assert tensors.stored_bytes(store, 4711) == 0


def test_a_tensor_of_a_losing_attempt_is_gone_with_its_bytes(store: Store, claim: queue.Claim):
    write(store, claim, odd((2, 8, 4)))
    queue.give_back(store, claim, error_kind="crashed", reason="signal 11", backoff_seconds=0)
    assert tensors.tensor_info(store, 1) == []
    with pytest.raises(tensors.TensorError, match="nothing is stored"):
        tensors.read_tensor(store, 1, "query", 0, 0)
    with store.read() as session:
        assert session.scalar(select(func.count()).select_from(TensorChunk)) == 0
    again = queue.claim(store, "me")
    assert again is not None
    array = odd((2, 8, 4), seed=1)
    write(store, again, array)
    queue.finish(store, again, "succeeded")
    assert tensors.read_tensor(store, 1, "query", 0, 1).tobytes() == array[1].tobytes()


@pytest.mark.skipif(
    not Path("/proc/self/io").exists(), reason="only Linux counts what a process reads and writes"
)
def test_a_layer_of_a_long_capture_goes_into_the_log_once(
    sqlite_store: Store, point: Callable[..., dict[str, Any]]
):
    """Pages that do not fit the cache are written early, and all checksums then made anew from what is read back."""
    queue.submit(sqlite_store, name="n", spec={}, spec_hash="h", points=[point()])
    claim = queue.claim(sqlite_store, "me")
    assert claim is not None
    shapes = {"query": (9, 8192, 64), "key": (3, 8192, 64), "value_norm": (3, 8192)}
    layer = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    before = io_of_this_process()
    with results.recording(sqlite_store, claim) as session:
        for name, array in layer.items():
            tensors.write_tensor(session, claim, name, 0, array)
    read, written = (after - old for after, old in zip(io_of_this_process(), before, strict=True))
    held = sum(array.nbytes for array in layer.values())
    assert read < held / 10
    assert held <= written < 1.1 * held


def io_of_this_process() -> tuple[int, int]:
    """Bytes asked of the system to read and to write, whatever it had in memory."""
    counts = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(counts["rchar"]), int(counts["wchar"])


def test_a_tensor_is_stored_once(store: Store, claim: queue.Claim):
    write(store, claim, odd((2, 8, 4)))
    with pytest.raises(Exception, match=r"(?i)unique"):
        write(store, claim, odd((2, 8, 4)))


@pytest.mark.parametrize(
    ("array", "options", "says"),
    [
        (np.zeros((1, 2, 3)), {}, "array must be float32 to be stored as float32, got float64"),
        (
            np.zeros((1, 2, 3), np.float32),
            {"dtype": "int8"},
            "got 'int8'; choices: float64, float32, float16, bfloat16",
        ),
        (
            np.zeros((1, 2, 3), np.float32),
            {"dtype": "bfloat16"},
            "array must be uint16 to be stored as bfloat16",
        ),
        (
            np.zeros(3, np.float32),
            {},
            r"must be \[heads, tokens, head_dim\] or \[heads, tokens\], got shape \(3,\)",
        ),
        (np.zeros((1, 0, 3), np.float32), {}, r"must hold numbers, got shape \(1, 0, 3\)"),
        (np.zeros((1, 2, 3), np.float32), {"chunk_tokens": 0}, "chunk_tokens must be at least 1, got 0"),
    ],
)
def test_a_wrong_array_is_refused(
    sqlite_store: Store, point: Any, array: np.ndarray, options: dict[str, Any], says: str
):
    queue.submit(sqlite_store, name="n", spec={}, spec_hash="h", points=[point()])
    claim = queue.claim(sqlite_store, "me")
    assert claim is not None
    with pytest.raises(tensors.TensorError, match=says):
        write(sqlite_store, claim, array, **options)
    assert tensors.tensor_info(sqlite_store, 1) == []


def test_what_is_not_there_is_said_with_the_choices(sliced: tuple[Store, np.ndarray]):
    wrong: list[tuple[tuple[Any, ...], str]] = [
        (("key", 0, 0), "run 1 has no tensor 'key' of layer 0; choices: layers 0 to 0, names query"),
        (("query", 3, 0), "run 1 has no tensor 'query' of layer 3"),
        (("query", 0, 2), "head must be from 0 to 1, got 2"),
        (("query", 0, -1), "head must be from 0 to 1, got -1"),
        (("query", 0, 0, 5, 78), "tokens must be a range within 0:77, got 5:78"),
        (("query", 0, 0, -1, 7), "tokens must be a range within 0:77, got -1:7"),
        (("query", 0, 0, 9, 7), "tokens must be a range within 0:77, got 9:7"),
        (("query", 0, 0, 78, None), "tokens must be a range within 0:77, got 78:77"),
    ]
    for arguments, says in wrong:
        with pytest.raises(tensors.TensorError, match=says):
            tensors.read_tensor(sliced[0], 1, *arguments)


def test_rows_that_are_lost_are_never_read_as_numbers(store: Store, claim: queue.Claim):
    write(store, claim, odd((1, 40)), chunk_tokens=16)
    with store.write() as session:
        session.execute(delete(TensorChunk).where(TensorChunk.block == 1))
    with pytest.raises(tensors.TensorError, match="tokens 0:40 must all be stored, found only 24 of them"):
        tensors.read_tensor(store, claim.run_id, "query", 0, 0)
    assert len(tensors.read_tensor(store, claim.run_id, "query", 0, 0, 0, 16)) == 16


def test_chunks_can_be_walked_as_they_are_stored(sliced: tuple[Store, np.ndarray]):
    store, array = sliced
    (info,) = tensors.tensor_info(store, 1)
    with store.read() as session:
        chunks = list(tensors.iter_chunks(session, info.id))
    assert [(chunk.head, chunk.block) for chunk in chunks] == [
        (head, block) for head in (0, 1) for block in range(5)
    ]
    assert b"".join(chunk.data for chunk in chunks) == array.tobytes()
