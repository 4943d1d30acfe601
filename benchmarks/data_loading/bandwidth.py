"""How much of a throttled network the storage layer uses, and the time to a first batch.

A real S3 server (Ceph's gateway) is read through the fault proxy of the tests, which gives every
connection a bandwidth of its own and delays every answer. What counts is the bytes that were asked
for over seconds x connections x bandwidth, with the number of connections that we opened. Plain
connections of `http.client` to signed addresses, as many as we opened, are the control: where not
even these get their bandwidth, the machine is too slow to judge.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from http.client import HTTPConnection
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from benchmarks.data_loading.contestants import view_config
from benchmarks.data_loading.images import make_shards, read_images, select_typical, write_tree
from benchmarks.data_loading.settings import Settings
from benchmarks.paired import (
    CONTROL_RANGE,
    Finding,
    WrongResultError,
    judge_limit,
    measure_contention,
)
from fqgan_dist.data.dataset import Dataset
from fqgan_dist.data.loader import ImageLoader
from fqgan_dist.storage.storage import Storage

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))  # of `support`

from support.fault_proxy import Faults, run_fault_proxy
from support.radosgw import (
    ACCESS_KEY,
    S3_BUCKET,
    SECRET_KEY,
    Gateway,
    missing_programs,
    run_gateway,
)

SUBJECT = "bandwidth"
Span = tuple[int, int]
"""Offset and length of a part of the object."""

_OBJECT = "large/shard-000000.tar"
_FRACTION = 0.9
_FIRST_BATCH_S = 2.0
_AWS_BYTES_PER_S = 90e6
"""What one connection to Amazon S3 gets (its user guide)."""
_RANGE_BYTES = (60_000, 160_000)
"""Least and greatest size of the ranges, as of ImageNet's JPEGs."""
_RANGES_FRACTION = 0.5
"""Part of the object that the ranges cover."""
_DATASET_SHARDS = 8
_BLOCK_BYTES = 2**20


class ProxyProcess:
    """A fault proxy in a process of its own: it shares no interpreter lock with the client."""

    def __init__(self, upstream: str, faults: Faults) -> None:
        """Start the proxy; leave the `with` block to stop it."""
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve_proxy, args=(theirs, upstream, faults))
        self._process.start()
        self.endpoint: str = self._connection.recv()

    def count_connections(self) -> int:
        """Give the greatest number of connections that were open at once."""
        self._connection.send("count")
        return self._connection.recv()

    def __enter__(self) -> ProxyProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.send("stop")
        self._process.join()
        self._connection.close()


def measure(settings: Settings, folder: Path) -> list[Finding]:
    """Measure a download, many ranges and a first batch.

    Raises:
        WrongResultError: other bytes came than were stored.
    """
    if missing := missing_programs():
        note = f"no S3 server: {', '.join(missing)} not installed (radosgw ceph-mon ceph-osd)"
        return [Finding(subject=SUBJECT, what="all", verdict="not run", note=note)]
    content = np.random.default_rng(0).bytes(settings.shard_mib * 2**20)
    with run_gateway(folder / "gateway") as gateway, _credentials(folder):
        _client(gateway.endpoint).create_bucket(Bucket=S3_BUCKET)
        with _endpoint(gateway.endpoint):
            _upload(folder, content)
        return [
            _measure_download(settings, folder, gateway, content),
            _measure_ranges(settings, gateway, content),
            _measure_first_batch(settings, folder, gateway),
        ]


def _measure_download(
    settings: Settings, folder: Path, gateway: Gateway, content: bytes
) -> Finding:
    target = folder / "downloaded"
    storage = Storage(f"s3://{S3_BUCKET}")

    def download() -> None:
        target.unlink(missing_ok=True)
        storage.download(_OBJECT, target)

    faults = Faults(
        bytes_per_s=settings.connection_mb_per_s * 1e6, first_byte_s=settings.first_byte_ms / 1e3
    )
    finding = _judge_bandwidth(
        f"whole object of {settings.shard_mib} MiB",
        download,
        spans=lambda connections: split(len(content), connections),
        gateway=gateway,
        faults=faults,
        repeats=settings.repeats,
    )
    if target.read_bytes() != content:
        raise WrongResultError("the downloaded object differs from the stored one")
    return finding


def _measure_ranges(settings: Settings, gateway: Gateway, content: bytes) -> Finding:
    ranges = draw_ranges(len(content))
    storage = Storage(f"s3://{S3_BUCKET}")
    parts: list[bytes] = []

    def read() -> None:
        parts[:] = storage.read_ranges(ranges)

    finding = _judge_bandwidth(
        f"{len(ranges)} ranges of 60 to 160 kB",
        read,
        spans=lambda _: [(start, size) for _, start, size in ranges],
        gateway=gateway,
        # No delay: with one, small ranges measure the delay, whoever reads them.
        faults=Faults(bytes_per_s=settings.connection_mb_per_s * 1e6),
        repeats=settings.repeats,
    )
    if parts != [content[start : start + size] for _, start, size in ranges]:
        raise WrongResultError("a range differs from the stored object")
    return finding


def _judge_bandwidth(
    what: str,
    read: Callable[[], None],
    *,
    spans: Callable[[int], Sequence[Span]],
    gateway: Gateway,
    faults: Faults,
    repeats: int,
) -> Finding:
    """Time a read through a throttled proxy, and plain connections as the control.

    Args:
        what: what is read.
        read: reads it.
        spans: for a number of connections, the parts of the object that plain ones read.
        gateway: the server.
        faults: the throttle.
        repeats: how often it is read.
    """
    throttle = faults.bytes_per_s or 0.0
    with ProxyProcess(gateway.endpoint, faults) as proxy, _endpoint(proxy.endpoint):
        read()  # opens the connections
        cpu = time.process_time()
        seconds = [_time(read) for _ in range(repeats)]
        cpu = time.process_time() - cpu
        connections = proxy.count_connections()
    with ProxyProcess(gateway.endpoint, faults) as proxy:
        plain = spans(connections)
        plain_s = _time(lambda: _read_plainly(proxy.endpoint, plain, connections))
    size = sum(length for _, length in plain)
    control = size / (plain_s * connections * throttle)
    return judge_limit(
        SUBJECT,
        f"{what}: part of the connections' bandwidth",
        [size / (each * connections * throttle) for each in seconds],
        unit="",
        at_least=_FRACTION,
        quiet=control >= CONTROL_RANGE[0],
        note=f"{connections} connections x {throttle / 1e6:g} MB/s, first byte after "
        f"{1e3 * faults.first_byte_s:g} ms; our process used {cpu / sum(seconds):.0%} of a core; "
        f"plain connections (control): {control:.2f}",
    )


def draw_ranges(size: int) -> list[tuple[str, int, int]]:
    """Draw disjoint ranges of the object, in a random order: path, offset and length."""
    generator = np.random.default_rng(1)
    ranges: list[tuple[str, int, int]] = []
    position = 0
    while True:
        length = int(generator.integers(*_RANGE_BYTES))
        if position + length > size:
            break
        ranges.append((_OBJECT, position, length))
        position += int(length / _RANGES_FRACTION)
    return [ranges[row] for row in generator.permutation(len(ranges))]


def _measure_first_batch(settings: Settings, folder: Path, gateway: Gateway) -> Finding:
    images = select_typical(read_images(settings.images, settings.max_images))
    write_tree(images, folder / "tree", copies=-(-settings.batch_size // len(images)))
    count = sum(1 for _ in (folder / "tree").rglob("*.jpg"))
    per_shard = max(1, count // _DATASET_SHARDS)
    make_shards(folder / "tree", folder / "dataset", f"samples_per_shard={per_shard}")
    with _endpoint(gateway.endpoint):
        dataset = Storage(f"s3://{S3_BUCKET}/dataset")
        for file in sorted((folder / "dataset").iterdir()):
            dataset.write_file(file.name, file)
    faults = Faults(bytes_per_s=_AWS_BYTES_PER_S, first_byte_s=settings.first_byte_ms / 1e3)
    with ProxyProcess(gateway.endpoint, faults) as proxy, _endpoint(proxy.endpoint):
        contention = measure_contention()
        seconds = [_time_first_batch(settings) for _ in range(settings.repeats)]
    return judge_limit(
        SUBJECT,
        f"first batch of {settings.batch_size} from a bucket",
        seconds,
        unit="s",
        at_most=_FIRST_BATCH_S,
        quiet=contention <= CONTROL_RANGE[1],
        note=f"from opening the dataset, with new connections; {_AWS_BYTES_PER_S / 1e6:g} MB/s per "
        f"connection, first byte after {settings.first_byte_ms:g} ms; imports do not count",
    )


def _time_first_batch(settings: Settings) -> float:
    start = time.perf_counter()
    loader = ImageLoader(
        Dataset.open(Storage(f"s3://{S3_BUCKET}/dataset")),
        seed=0,
        view=view_config(settings.image_size),
        num_views=None,
        micro_batch_size=settings.batch_size,
        micro_batches_per_step=1,
        window_shards=8,
        loader_workers=0,
        max_damaged_in_a_row=1,
    )
    batches = loader.batches(0, [0])
    (batch,) = next(batches)
    seconds = time.perf_counter() - start
    batches.close()
    if tuple(batch.images.shape) != (settings.batch_size, 3, *[settings.image_size] * 2):
        raise WrongResultError(f"a first batch of {tuple(batch.images.shape)}")
    return seconds


def _time(run: Callable[[], None]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def split(size: int, parts: int) -> list[Span]:
    """Cut an object into equal parts, but for the last one."""
    step = -(-size // parts)
    return [(first, min(step, size - first)) for first in range(0, size, step)]


def _read_plainly(endpoint: str, spans: Sequence[Span], connections: int) -> None:
    """Read parts of the object, each connection every n-th of them, one after the other."""
    url = urlsplit(
        _client(endpoint).generate_presigned_url(
            "get_object", Params={"Bucket": S3_BUCKET, "Key": _OBJECT}
        )
    )

    def read(number: int) -> int:
        connection = HTTPConnection(url.hostname or "", url.port)
        count = 0
        for start, length in spans[number::connections]:
            bounds = f"bytes={start}-{start + length - 1}"
            connection.request("GET", f"{url.path}?{url.query}", headers={"Range": bounds})
            answer = connection.getresponse()
            while block := answer.read(_BLOCK_BYTES):
                count += len(block)
        connection.close()
        return count

    with ThreadPoolExecutor(connections) as pool:
        if sum(pool.map(read, range(connections))) != sum(length for _, length in spans):
            raise WrongResultError("plain connections got another number of bytes")


def _serve_proxy(connection: Connection, upstream: str, faults: Faults) -> None:
    with run_fault_proxy(upstream, faults=faults) as proxy:
        connection.send(proxy.endpoint)
        while connection.recv() == "count":
            connection.send(proxy.max_open)


def _upload(folder: Path, content: bytes) -> None:
    (folder / "content").write_bytes(content)
    Storage(f"s3://{S3_BUCKET}").write_file(_OBJECT, folder / "content")
    (folder / "content").unlink()


def _client(endpoint: str) -> Any:
    import botocore.session

    return botocore.session.get_session().create_client(
        "s3", endpoint_url=endpoint, region_name="us-east-1"
    )


def _endpoint(endpoint: str) -> AbstractContextManager[None]:
    return _environment({"AWS_ENDPOINT_URL": endpoint})


def _credentials(folder: Path) -> AbstractContextManager[None]:
    """Set the server's credentials for a while, and hide the user's own files and role."""
    return _environment(
        {
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_CONFIG_FILE": str(folder / "none"),
            "AWS_SHARED_CREDENTIALS_FILE": str(folder / "none"),
            "AWS_EC2_METADATA_DISABLED": "true",
        }
    )


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
