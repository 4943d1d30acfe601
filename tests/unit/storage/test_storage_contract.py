"""The promises of every store, on a disk, in memory, and on a small S3 server in this process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.memory_store import open_memory_bucket
from support.small_s3 import ErrorAnswer, run_small_s3, set_credentials
from support.storage_contract import StorageContract, Store


@pytest.fixture
def local_store(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Store]:
    root = tmp_path / "root"

    def refuse() -> None:
        root.chmod(0)
        request.getfixturevalue("without_root")

    yield Store(str(root), refuse)
    if root.exists():
        root.chmod(0o700)


@pytest.fixture
def memory_store(monkeypatch: pytest.MonkeyPatch) -> Store:
    bucket = open_memory_bucket(monkeypatch)

    def refuse() -> None:
        bucket.is_refusing = True

    return Store(f"{bucket.root}/run", refuse)


@pytest.fixture
def small_s3_store(monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    with run_small_s3() as server:
        set_credentials(monkeypatch, server.endpoint)

        def refuse() -> None:
            server.error = ErrorAnswer(403, "AccessDenied")

        yield Store("s3://bucket/run", refuse)


class TestLocal(StorageContract):
    store_fixture = "local_store"


class TestMemory(StorageContract):
    store_fixture = "memory_store"


class TestSmallS3(StorageContract):
    store_fixture = "small_s3_store"
