"""EC2's notice, asked of a metadata service on loopback."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from support.metadata_service import TERMINATE, MetadataService, run_metadata_service

from fqgan_dist.ec2_notice import Ec2Notice, is_on_ec2

TIME = datetime(2026, 9, 18, 8, 22, tzinfo=UTC).timestamp()


@pytest.fixture
def service() -> Iterator[MetadataService]:
    with run_metadata_service() as server:
        yield server


def test_without_an_action_there_is_no_notice_and_one_token_lasts(service: MetadataService) -> None:
    source = Ec2Notice(service.address)
    assert [source.look() for _ in range(3)] == [None] * 3
    assert service.requests == ["token", "action", "action", "action"]


@pytest.mark.parametrize("action", ["terminate", "stop", "hibernate"])
def test_an_action_is_a_notice_with_its_time(service: MetadataService, action: str) -> None:
    service.action = TERMINATE.replace("terminate", action)
    notice = Ec2Notice(service.address).look()
    assert notice is not None
    assert action in notice.reason
    # Long past: whoever is late has all the more reason.
    assert notice.deadline_s == TIME


@pytest.mark.parametrize("time", ["null", '"soon"', '""', "17"])
def test_an_action_without_a_time_is_a_notice_without_deadline(
    service: MetadataService, time: str
) -> None:
    service.action = f'{{"action": "terminate", "time": {time}}}'
    notice = Ec2Notice(service.address).look()
    assert notice is not None
    assert notice.deadline_s is None


def test_a_token_that_has_expired_is_replaced(service: MetadataService) -> None:
    source = Ec2Notice(service.address)
    source.look()
    service.tokens = []
    service.action = TERMINATE
    assert source.look() is not None
    assert service.requests == ["token", "action", "action", "token", "action"]


@pytest.mark.parametrize("text", ["", "{", "[]", "17", '{"action": "dance"}', "<html>"])
def test_what_is_no_action_is_no_notice_and_said_once(
    service: MetadataService, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    service.action = text
    source = Ec2Notice(service.address)
    with caplog.at_level(logging.WARNING):
        assert [source.look() for _ in range(6)] == [None] * 6
    assert len(caplog.records) == 1


@pytest.mark.parametrize("code", [401, 403, 500, 503])
def test_a_service_that_refuses_is_no_notice_and_said_once(
    service: MetadataService, code: int, caplog: pytest.LogCaptureFixture
) -> None:
    service.code = code
    source = Ec2Notice(service.address)
    with caplog.at_level(logging.WARNING):
        assert [source.look() for _ in range(6)] == [None] * 6
    (record,) = caplog.records
    assert "HttpPutResponseHopLimit" in record.getMessage()
    service.code, service.action = 200, TERMINATE
    assert source.look() is not None


def test_a_service_that_is_switched_off_is_no_notice(service: MetadataService) -> None:
    service.refuses_tokens = True
    service.action = TERMINATE
    assert Ec2Notice(service.address).look() is None
    assert service.requests == ["token"]


def test_a_service_that_is_not_there_is_no_notice() -> None:
    assert Ec2Notice("http://127.0.0.1:9").look() is None
    assert Ec2Notice("no address").look() is None


def test_proxies_of_the_environment_are_passed_by(
    service: MetadataService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    service.action = TERMINATE
    assert Ec2Notice(service.address).look() is not None


def test_the_endpoint_may_come_from_the_environment(
    service: MetadataService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", f"{service.address}/")
    service.action = TERMINATE
    assert Ec2Notice().look() is not None


@pytest.mark.parametrize(
    ("environment", "vendor", "expected"),
    [
        ({}, "Amazon EC2\n", True),
        ({}, "QEMU\n", False),
        ({}, None, False),
        ({"AWS_EC2_METADATA_SERVICE_ENDPOINT": "http://127.0.0.1:1"}, None, True),
        ({"AWS_EC2_METADATA_DISABLED": "True"}, "Amazon EC2\n", False),
    ],
)
def test_ec2_is_told_by_the_firmware_or_the_environment(
    environment: dict[str, str], vendor: str | None, expected: bool, tmp_path: Path
) -> None:
    path = tmp_path / "sys_vendor"
    if vendor is not None:
        path.write_text(vendor)
    assert is_on_ec2(environment, ((path, "amazon ec2"),)) is expected
