"""A real S3 server for the tests that ask for it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import s3fs
from support.radosgw import S3_BUCKET, Gateway, missing_programs, run_gateway


@pytest.fixture(scope="session")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """Ceph's RADOS gateway on loopback, with one bucket."""
    if missing_programs():
        pytest.skip("no S3 server: install radosgw ceph-mon ceph-osd ceph-common; S3 is untested")
    with run_gateway(tmp_path_factory.mktemp("radosgw")) as gateway:
        s3fs.S3FileSystem(
            endpoint_url=gateway.endpoint, key=gateway.access_key, secret=gateway.secret_key
        ).mkdir(S3_BUCKET)
        yield gateway


@pytest.fixture
def s3_credentials(gateway: Gateway, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The usual AWS variables, and neither the user's own files nor an instance's role."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", gateway.endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", gateway.access_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", gateway.secret_key)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
