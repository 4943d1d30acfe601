"""A run whose storage goes away for a while, in every stage, waits for it: equal to the bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
from support.fault_proxy import FaultProxy, Faults, run_fault_proxy
from support.small_s3 import SmallS3, run_small_s3

TINY = Path(__file__).parents[1] / "support" / "tiny.yaml"
OUTAGE_S = float(os.environ.get("FQGAN_TEST_OUTAGE_S", "6"))
"""By hand longer ones, see docs/fault-tolerance.md."""
BEGINS: dict[str, str] = {
    "shards": "/data/photographs/train/shard-000001.tar",
    "teachers": "/features/",
    "tokenizer": "/tokenizer/checkpoints/commits/0000000002.json",
    "codes": "/codes/",
    "autoregressive": "/autoregressive/checkpoints/commits/0000000002.json",
    "samples": "/samples/",
    "evaluation": "/evaluation/",
    "report": "/figures/",
}
"""What is written first in a stage, when the storage goes away."""
TIMEOUT_S = 750 + 2 * OUTAGE_S * len(BEGINS)
ON_RAY = ("execution=ray", "ray.train.num_workers=2", "ray.local_cpus=2")


@dataclass
class Outages:
    """Those that there were, by stage, and how many requests each met."""

    num_refused: dict[str, int] = field(default_factory=dict)


@contextmanager
def outages(server: SmallS3, proxy: FaultProxy, kind: Literal["503", "cut"]) -> Iterator[Outages]:
    """Let the storage go away for a while at the beginning of every stage."""
    seen, stop, waiting = Outages(), threading.Event(), dict(BEGINS)

    def watch() -> None:
        while not stop.wait(0.01):
            with server.lock:
                names = list(server.objects)
            begun = [stage for stage, part in waiting.items() if any(part in n for n in names)]
            for stage in begun:
                del waiting[stage]
            if begun:
                before = proxy.num_faults
                proxy.faults = (
                    Faults(slow_down_rate=1)
                    if kind == "503"
                    else Faults(reset_rate=1, reset_after_bytes=0)
                )
                stop.wait(OUTAGE_S)
                proxy.faults = Faults()
                seen.num_refused |= dict.fromkeys(begun, proxy.num_faults - before)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield seen
    finally:
        stop.set()
        thread.join()


def run(root: str, *options: str, endpoint: str = "") -> tuple[dict[str, Any], str]:
    """Give the summary's metrics, and what was logged."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    if endpoint:
        environment |= {
            "AWS_ENDPOINT_URL": endpoint,
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
    command = [sys.executable, "-m", "fqgan_dist.cli", "run", str(TINY), f"storage.root={root}"]
    done = subprocess.run(
        [*command, "--json", *options],
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    summary = json.loads(done.stdout)
    return {name: stage["metrics"] for name, stage in summary.items()}, done.stderr


@pytest.mark.ray
@pytest.mark.full("minutes of outages; a request's patience is proven in unit/storage")
@pytest.mark.timeout(2 * TIMEOUT_S)
@pytest.mark.parametrize(
    ("kind", "options"),
    [("cut", ()), ("503", ON_RAY)],
    ids=["cut here", "503 on Ray"],
)
def test_a_run_waits_for_its_storage_in_every_stage(
    kind: Literal["503", "cut"], options: tuple[str, ...], tmp_path: Path
) -> None:
    calm, _ = run(str(tmp_path / "calm"), *options)
    with (
        run_small_s3() as server,
        run_fault_proxy(server.endpoint) as proxy,
        outages(server, proxy, kind) as seen,
    ):
        found, log = run("s3://bucket/run", *options, endpoint=proxy.endpoint)
    assert found == calm
    assert seen.num_refused.keys() == BEGINS.keys()
    assert min(seen.num_refused.values()) > 0
    assert log.count("object storage: requests repeated") >= 2
    assert "starting again" not in log
