"""The storage checks of `fqgan doctor` on a real S3 server: Ceph's RADOS gateway on loopback."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import s3fs
import torch
from support.radosgw import S3_BUCKET, Gateway

from fqgan_dist.cli import FAILED, main
from fqgan_dist.diagnosis.clock import check_server_clock
from fqgan_dist.diagnosis.storage import check_access, check_speed
from fqgan_dist.diagnosis.verdict import Check, Verdict, run_checks
from fqgan_dist.diagnosis.weights import check_file
from fqgan_dist.storage.storage import Storage
from fqgan_dist.weights.files import save_safetensors

pytestmark = pytest.mark.usefixtures("s3_credentials")

TINY = Path(__file__).resolve().parents[1] / "support" / "tiny.yaml"
ROOT = f"s3://{S3_BUCKET}/doctor/run"
DENIED_BUCKET = "denied-bucket"
DenyActions = Callable[..., str]


@pytest.fixture
def deny(gateway: Gateway) -> Iterator[DenyActions]:
    """Makes a bucket whose policy denies some actions to everybody; gives a root in it."""
    filesystem = s3fs.S3FileSystem(
        endpoint_url=gateway.endpoint,
        key=gateway.access_key,
        secret=gateway.secret_key,
        skip_instance_cache=True,
        use_listings_cache=False,
    )
    filesystem.mkdir(DENIED_BUCKET)

    def apply(*actions: str) -> str:
        resources = [f"arn:aws:s3:::{DENIED_BUCKET}{suffix}" for suffix in ("", "/*")]
        statement = {
            "Effect": "Deny",
            "Principal": "*",
            "Action": list(actions),
            "Resource": resources,
        }
        policy = json.dumps({"Version": "2012-10-17", "Statement": [statement]})
        filesystem.call_s3("put_bucket_policy", Bucket=DENIED_BUCKET, Policy=policy)
        return f"s3://{DENIED_BUCKET}/run"

    yield apply
    filesystem.call_s3("delete_bucket_policy", Bucket=DENIED_BUCKET)
    filesystem.rm(DENIED_BUCKET, recursive=True)


def access(root: str) -> Verdict:
    """The verdict as a user sees it: scrubbed."""
    (verdict,) = run_checks([Check("storage access", 60, lambda: check_access(root))])
    return verdict


def test_a_bucket_that_works_is_left_as_it_was() -> None:
    verdict = access(ROOT)
    assert verdict.status == "ok"
    assert verdict.finding == f"{ROOT}: write, read, create-only, list, delete fine"
    speed = check_speed(ROOT)
    assert speed.status in ("ok", "warning")
    assert "MB/s up" in speed.finding
    assert Storage(ROOT).list() == []


def test_the_servers_clock_is_ours() -> None:
    verdict = check_server_clock()
    assert verdict.status == "ok"
    assert verdict.finding.startswith("agrees with the S3 server")


@pytest.mark.parametrize(
    ("variable", "advice"),
    [
        ("AWS_ACCESS_KEY_ID", "correct AWS_ACCESS_KEY_ID"),
        ("AWS_SECRET_ACCESS_KEY", "correct AWS_SECRET_ACCESS_KEY"),
    ],
)
def test_wrong_credentials_are_told_apart_and_not_shown(
    variable: str, advice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, "wrong-but-still-secret")
    verdict = access(ROOT)
    assert verdict.status == "failed"
    assert "write: " in verdict.finding
    assert "access is refused" in verdict.finding
    assert advice in verdict.advice
    assert "wrong-but-still-secret" not in repr(verdict)


def test_absent_credentials_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    verdict = access(ROOT)
    assert verdict.status == "failed"
    assert "give credentials" in verdict.advice


def test_a_missing_bucket_is_said() -> None:
    verdict = access("s3://no-such-bucket/run")
    assert verdict.status == "failed"
    assert "the bucket does not exist" in verdict.finding
    assert "create the bucket" in verdict.advice


@pytest.mark.parametrize(
    ("actions", "operation", "works"),
    [
        (["s3:PutObject"], "write", ""),
        (["s3:GetObject"], "read", "write fine; "),
        (["s3:ListBucket"], "list", "write, read, create-only fine; "),
        (["s3:DeleteObject"], "delete", "write, read, create-only, list fine; "),
    ],
)
def test_the_right_that_is_missing_is_named(
    deny: DenyActions, actions: list[str], operation: str, works: str
) -> None:
    verdict = access(deny(*actions))
    assert verdict.status == "failed"
    assert f"/run: {works}{operation}: " in verdict.finding
    assert "access is refused" in verdict.finding
    assert "grant s3:PutObject" in verdict.advice


def test_a_server_that_is_not_there_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    verdict = access(ROOT)
    assert verdict.status == "failed"
    assert "127.0.0.1:9 does not answer" in verdict.finding
    assert "AWS_ENDPOINT_URL" in verdict.advice


def test_weights_in_a_bucket_are_compared(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    sha256 = save_safetensors(path, {"weight": torch.ones(1000)})
    Storage(f"s3://{S3_BUCKET}/weights").write_file(path.name, path)
    uri = f"s3://{S3_BUCKET}/weights/{path.name}"
    assert check_file("x", uri, sha256).status == "ok"
    assert check_file("x", uri, "0" * 64).status == "failed"
    assert "no such file" in check_file("x", f"{uri}x", None).finding


def test_the_command_reports_and_shows_no_credential(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-but-still-secret")
    assert main(["doctor", str(TINY), f"storage.root={ROOT}", "--json"]) == FAILED
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    statuses = {each["check"]: each["status"] for each in report["groups"]["this machine"]}
    assert statuses["storage access"] == statuses["storage speed"] == "failed"
    assert "RAY_ADDRESS is not set: only this machine was looked at" in report["notes"][0]
    assert statuses["Python"] == statuses["DeepSpeed"] == statuses["NCCL and gloo"] == "ok"
    for secret in (gateway.access_key, gateway.secret_key, "wrong-but-still-secret"):
        assert secret not in captured.out + captured.err
