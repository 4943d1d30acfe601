"""Log files, metrics and TensorBoard's files of a run whose root is a bucket."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Iterator

import pytest
from support.radosgw import S3_BUCKET
from support.sessions import resumed_at

from fqgan_dist.storage.storage import Storage
from fqgan_dist.telemetry.json_lines import parse_records
from fqgan_dist.telemetry.log_files import open_log_file, publish_log
from fqgan_dist.telemetry.logging import configure_logging
from fqgan_dist.telemetry.metric_sink import TrackedRun
from fqgan_dist.telemetry.metrics import MetricsFile, parse_metrics
from fqgan_dist.telemetry.sessions import SessionRecords
from fqgan_dist.telemetry.sinks.tensorboard import build_sink
from fqgan_dist.world import World

pytestmark = pytest.mark.usefixtures("s3_credentials")

WRITE_AND_EXIT = """
import logging, sys
from fqgan_dist.storage.storage import Storage
from fqgan_dist.telemetry.log_files import open_log_file
from fqgan_dist.telemetry.logging import configure_logging
from fqgan_dist.world import World

configure_logging(World(), open_log_file(Storage(sys.argv[1]), "driver"))
logging.getLogger("fqgan_dist").info("the last line")
raise RuntimeError("broken")
"""


@pytest.fixture
def storage(request: pytest.FixtureRequest) -> Storage:
    return Storage(f"s3://{S3_BUCKET}/{request.node.name}")


@pytest.fixture
def restored_logging() -> Iterator[None]:
    level = logging.getLogger("fqgan_dist").level
    yield
    root = logging.getLogger()
    for handler in [each for each in root.handlers if (each.name or "").startswith("fqgan_dist.")]:
        root.removeHandler(handler)
        handler.close()
    logging.getLogger("fqgan_dist").setLevel(level)


@pytest.mark.usefixtures("restored_logging")
def test_a_log_is_published_on_demand_and_grows(storage: Storage) -> None:
    configure_logging(World(), open_log_file(storage, "tokenizer-rank-00000"))
    logger = logging.getLogger("fqgan_dist.somewhere")
    for line in ("first", "second"):
        logger.info(line)
        publish_log()
        (name,) = storage.list("logs")
        assert name.startswith("tokenizer-rank-00000-")
        assert line in storage.read_bytes(f"logs/{name}").decode()


def test_the_log_of_a_process_that_fails_is_there_to_its_last_line(storage: Storage) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WRITE_AND_EXIT, storage.root],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert "RuntimeError: broken" in done.stderr
    (name,) = storage.list("logs")
    assert "the last line" in storage.read_bytes(f"logs/{name}").decode()


def test_metrics_and_tensorboard_are_published_and_continued(storage: Storage) -> None:
    scalars: dict[int, int] = {}
    for resumed_step in (0, 1):
        run = TrackedRun(storage=storage, stage="tokenizer", name="trial")
        for sink in (MetricsFile(storage, "tokenizer/metrics.jsonl"), build_sink(run)):
            sink.open(resumed_at(resumed_step))
            sink.write(resumed_step + 1, {"tokenizer/loss/total": 0.5}, images_seen=8)
            sink.flush()
            published = storage.list("tokenizer/tensorboard")
            scalars[resumed_step] = _count_events(storage, published)
            sink.close()
    records = parse_metrics(storage.read_bytes("tokenizer/metrics.jsonl"), name="metrics")
    assert [record["step"] for record in records] == [1, 2]
    assert scalars == {0: 1, 1: 2}


def test_the_ledger_is_published_continued_and_emptied_by_a_new_start(storage: Storage) -> None:
    path = "tokenizer/damaged_samples.jsonl"
    found: list[list[int]] = []
    for resumed_step in (0, 1, 0):
        ledger = SessionRecords(storage, path)
        ledger.open(resumed_at(resumed_step))
        ledger.flush()
        before = storage.read_bytes(path) if storage.exists(path) else b""
        ledger.write({"step": resumed_step + 1})
        ledger.flush()
        ledger.close()
        for data in (before, storage.read_bytes(path)):
            records = parse_records(data, name=path, kind="ledger")
            found.append([record["step"] for record in records])
    assert found == [[], [1], [1], [1, 2], [], [1]]


def _count_events(storage: Storage, names: list[str]) -> int:
    """Count the loss's values in TensorBoard's files as they are in the bucket."""
    data = (storage.read_bytes(f"tokenizer/tensorboard/{name}") for name in names)
    return sum(each.count(b"tokenizer/loss/total") for each in data)
