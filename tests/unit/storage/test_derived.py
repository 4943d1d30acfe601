from __future__ import annotations

from pathlib import Path

import pytest

from fqgan_dist.errors import DataError
from fqgan_dist.storage.derived import try_replace, write_derived
from fqgan_dist.storage.storage import Storage


def test_what_is_there_is_replaced_only_if_it_is_what_it_was(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    assert try_replace(storage, "a", b"1", former=None)
    assert not try_replace(storage, "a", b"2", former=None)
    assert not try_replace(storage, "a", b"2", former=b"0")
    assert try_replace(storage, "a", b"2", former=b"1")
    assert storage.read_bytes("a") == b"2"


def test_a_state_that_is_over_never_comes_back(tmp_path: Path) -> None:
    storage, sources = Storage(tmp_path), [b"old", b"new"]
    storage.write_bytes("sum", b"begin")

    def build() -> bytes:
        data = sources.pop(0)
        if data == b"old":
            storage.write_bytes("sum", b"new")  # another process, while this one sleeps
        return data

    write_derived(storage, "sum", build)
    assert storage.read_bytes("sum") == b"new"
    assert sources == []


def test_others_that_write_it_all_the_time_are_an_error(tmp_path: Path) -> None:
    storage, numbers = Storage(tmp_path), iter(range(100))

    def build() -> bytes:
        storage.write_bytes("sum", str(next(numbers)).encode())
        return b"mine"

    with pytest.raises(DataError, match="sum: other processes write it all the time"):
        write_derived(storage, "sum", build)
