from __future__ import annotations

import io
import random
from concurrent.futures import Future

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fqgan_dist.storage import object_stream
from fqgan_dist.storage.object_stream import ObjectStream

DATA = random.Random(0).randbytes(5000)


class Source:
    """Answers ranges at once, and remembers them."""

    def __init__(self, *, failures: int = 0) -> None:
        self.ranges: list[tuple[int, int]] = []
        self.failures = failures

    def read(self, offset: int, size: int) -> Future[bytes]:
        self.ranges.append((offset, size))
        future: Future[bytes] = Future()
        if self.failures:
            self.failures -= 1
            future.set_exception(OSError("gone"))
        else:
            future.set_result(DATA[offset : offset + size])
        return future


@pytest.fixture(autouse=True, scope="module")
def _small_blocks() -> object:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(object_stream, "_FIRST_BLOCK_BYTES", 100)
        patch.setattr(object_stream, "_BLOCK_BYTES", 400)
        yield


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["read", "seek", "forward", "end"]), st.integers(0, 6000)),
        max_size=20,
    ),
    st.sampled_from([1, 64, 1000]),
)
def test_it_reads_as_a_file_does(actions: list[tuple[str, int]], buffer_bytes: int) -> None:
    stream = io.BufferedReader(ObjectStream(Source().read, len(DATA)), buffer_bytes)
    file = io.BytesIO(DATA)
    for action, amount in actions:
        match action:
            case "read":
                assert stream.read(amount) == file.read(amount)
            case "seek":
                assert stream.seek(amount) == file.seek(amount)
            case "forward":
                assert stream.seek(amount, io.SEEK_CUR) == file.seek(amount, io.SEEK_CUR)
            case _:
                amount = min(amount, len(DATA))
                assert stream.seek(-amount, io.SEEK_END) == file.seek(-amount, io.SEEK_END)
        assert stream.tell() == file.tell()


def test_in_order_every_byte_is_asked_for_once() -> None:
    source = Source()
    with ObjectStream(source.read, len(DATA)) as stream:
        assert stream.readall() == DATA
    assert source.ranges[:4] == [(0, 100), (100, 200), (300, 400), (700, 400)]
    assert sum(size for _, size in source.ranges) == len(DATA)


def test_little_is_asked_for_where_it_is_read_here_and_there() -> None:
    source = Source()
    with ObjectStream(source.read, len(DATA)) as stream:
        for offset in (4000, 1000, 3000):
            stream.seek(offset)
            assert stream.read(10) == DATA[offset : offset + 10]
    assert source.ranges == [(4000, 100), (1000, 100), (3000, 100)]


def test_what_is_ahead_is_bounded() -> None:
    source = Source()
    with ObjectStream(source.read, len(DATA)) as stream:
        position = 0
        while piece := stream.read(70):
            position += len(piece)
            ahead = sum(size for _, size in source.ranges) - position
            assert ahead <= 4 * 400


def test_after_an_error_it_asks_anew() -> None:
    source = Source(failures=1)
    with ObjectStream(source.read, len(DATA)) as stream:
        with pytest.raises(OSError, match="gone"):
            stream.read(10)
        assert stream.read(10) == DATA[:10]


def test_a_negative_position_is_refused() -> None:
    with (
        ObjectStream(Source().read, len(DATA)) as stream,
        pytest.raises(ValueError, match="must not be negative"),
    ):
        stream.seek(-1)
