"""Where the campaign takes place: a Ray cluster of this machine, its S3, and one run on them.

The head is for the driver, three nodes have one slot each. The S3 is the small server of the tests
behind its proxy of faults. In the place of `cluster/submit` stands `Campaign.look`, by its rules:
after exit code 75 or 143 or a kill the same command is given again, after 1 or 2 it is a failure.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from support.fault_proxy import FaultProxy, run_fault_proxy
from support.ray_clusters import start_head
from support.small_s3 import run_small_s3

from benchmarks.fault_campaign.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "tests" / "support" / "tiny.yaml"
NUM_NODES = 3
NUM_RANKS = 2
RANK, POOL_ACTOR = "RayTrainWorker", "PoolActor"
_SCRATCH_BYTES = 64 * 2**20
_AGAIN = (75, 143)


class Failure(Exception):
    """The campaign cannot go on."""


@dataclass
class Cluster:
    """The nodes; the head, and with it all, is replaced when it is killed."""

    head: Any = None
    num_started: int = 0

    def start(self) -> None:
        self.head = start_head(num_cpus=0)
        for _ in range(NUM_NODES):
            self.add_node()
        self.num_started += 1

    def add_node(self) -> None:
        self.head.add_node(num_cpus=1, resources={"worker": 8})

    @property
    def address(self) -> str:
        return str(self.head.address)

    def nodes(self) -> list[Any]:
        return list(self.head.worker_nodes)

    def processes(self, name: str, node: Any = None) -> list[psutil.Process]:
        """Find Ray's processes of a name on one node, or on all."""
        nodes = [node] if node is not None else [self.head.head_node, *self.nodes()]
        found: list[psutil.Process] = []
        for each in nodes:
            for raylet in each.all_processes.get("raylet", []):
                with suppress(psutil.Error):
                    children = psutil.Process(raylet.process.pid).children(recursive=True)
                    found += [child for child in children if name in _title(child)]
        return found

    def kill_node(self, node: Any) -> None:
        """Kill all processes of a node at once; the raylet first, so that nothing is announced."""
        children: list[psutil.Process] = []
        for raylet in node.all_processes.get("raylet", []):
            with suppress(psutil.Error):
                process = psutil.Process(raylet.process.pid)
                children = process.children(recursive=True)
                process.kill()
        for child in children:
            with suppress(psutil.Error):
                child.kill()
        self.head.remove_node(node, allow_graceful=False)

    def stop(self) -> None:
        """Kill all nodes, the head last; nothing to do where there is none."""
        if self.head is None:
            return
        for node in self.nodes():
            with suppress(AssertionError, OSError):
                self.kill_node(node)
        with suppress(AssertionError, OSError):
            self.kill_node(self.head.head_node)
        self.head = None


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


@dataclass
class Campaign:
    """One run, given again and again until it is done."""

    settings: Settings
    cluster: Cluster
    proxy: FaultProxy
    scratch: Path
    """TMPDIR of all processes, a disk of its own where that is possible."""
    root: str = ""
    process: subprocess.Popen[bytes] | None = None
    num_commands: int = 0
    num_by_hand: int = 0
    """Commands that a person would have had to give."""
    codes: list[int] = field(default_factory=list)
    has_disk: bool = False

    def begin(self, root: str) -> None:
        """Give the command for the first time."""
        self.root, self.num_commands, self.num_by_hand, self.codes = root, 0, 0, []
        self._start()

    def _start(self) -> None:
        settings = self.settings
        self.num_commands += 1
        command = [
            *(sys.executable, "-W", "ignore", "-m", "fqgan_dist.cli", "run", str(CONFIG)),
            f"storage.root={self.root}",
            "execution=ray",
            f"ray.train.num_workers={NUM_RANKS}",
            "ray.train.start_timeout_s=30",
            "stages=[shards, teachers, tokenizer, codes, autoregressive]",
            "tokenizer.losses.discriminator_start_step=20",
            "watchdog={after_s: 20, warn_after_s: 8, slow_after_s: 120}",
        ]
        steps = {
            "tokenizer": settings.tokenizer_steps,
            "autoregressive": settings.autoregressive_steps,
        }
        for stage, number in steps.items():
            command += [
                f"{stage}.training.steps={number}",
                f"{stage}.training.evaluate_every=1000",
                f"{stage}.training.checkpoint.every={settings.save_every}",
            ]
        with settings.log.open("ab") as log:
            log.write(f"\n--- command {self.num_commands} of {self.root}\n".encode())
            log.flush()
            self.process = subprocess.Popen(
                command,
                env=os.environ | {"RAY_ADDRESS": self.cluster.address},
                stdout=log,
                stderr=log,
                cwd=ROOT,
            )

    def look(self) -> bool:
        """Give the command again if it ended before it was done; gives whether it is done."""
        process = self.process
        assert process is not None, "begun"
        if (code := process.poll()) is None:
            return False
        if code == 0:
            return True
        if not self.codes or self.codes[-1] != code or self.num_commands > len(self.codes):
            self.codes.append(code)
        if code > 0 and code not in _AGAIN:
            self.num_by_hand += 1
            if self.num_by_hand > 5:
                raise Failure(f"the run fails again and again, see {self.settings.log}")
        time.sleep(1)
        self._start()
        return False

    def wait(self, seconds: float) -> bool:
        """Wait, and look after the run; gives whether it is done."""
        deadline = time.monotonic() + seconds
        while not self.look():
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.2)
        return True

    def end(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()


@contextmanager
def open_campaign(settings: Settings) -> Iterator[Campaign]:
    """Start the cluster and its S3 for a block."""
    with ExitStack() as stack:
        server = stack.enter_context(run_small_s3())
        proxy = stack.enter_context(run_fault_proxy(server.endpoint, seed=settings.seed))
        scratch, has_disk = stack.enter_context(_scratch())
        os.environ.update(
            {
                "AWS_ENDPOINT_URL": proxy.endpoint,
                "AWS_ACCESS_KEY_ID": "key",
                "AWS_SECRET_ACCESS_KEY": "secret",
                "AWS_DEFAULT_REGION": "us-east-1",
                "OMP_NUM_THREADS": "1",
                "TMPDIR": str(scratch),
            }
        )
        cluster = Cluster()
        stack.callback(cluster.stop)
        cluster.start()
        campaign = Campaign(settings, cluster, proxy, scratch, has_disk=has_disk)
        stack.callback(campaign.end)
        yield campaign


@contextmanager
def _scratch() -> Iterator[tuple[Path, bool]]:
    """Give a folder, and whether it is a small disk that can be filled."""
    folder = Path("/tmp") / f"faults-{os.getpid()}"  # short: sockets lie in it
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={_SCRATCH_BYTES}", "tmpfs", str(folder)]
    try:
        has_disk = subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        has_disk = False
    try:
        yield folder, has_disk
    finally:
        if has_disk:
            subprocess.run(["umount", "--lazy", str(folder)], check=False)
        with suppress(OSError):
            folder.rmdir()
