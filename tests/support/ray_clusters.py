"""Real Ray clusters of several nodes on this machine, started as a user starts them.

Every node is a `ray start` of its own, with its own HOME, TMPDIR and caches, and, where asked for,
its own file system at some folders (a mount namespace with a tmpfs there). Token authentication is
on. Ports are free ones, so that several clusters may run side by side.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ray.cluster_utils import Cluster

ROOT = Path(__file__).parents[2]
_BIN = Path(sys.executable).parent
_START_TIMEOUT_S = 90.0
_STOP_TIMEOUT_S = 15.0
_FIRST_PORT, _LAST_PORT = 20_000, 30_000  # above Ray's worker ports, below the kernel's own


@dataclass(frozen=True)
class NodeSpec:
    """One node of a cluster."""

    num_cpus: int = 1
    private_folders: Sequence[Path] = ()
    """Folders where the node has an empty file system of its own."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables of this node only."""


@dataclass(frozen=True)
class RayCluster:
    """A running cluster; `environment` is what a user who may use it has set."""

    address: str
    dashboard: str
    token: str
    folder: Path
    """Of the nodes' own folders."""
    temp_dir: Path
    """Of Ray itself, its logs among others."""

    def environment(self, *, with_token: bool = True) -> dict[str, str]:
        """Give the variables of a process on the head node."""
        own = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        own |= _separate_folders(self.folder / "user") | {"RAY_AUTH_MODE": "token"}
        return own | ({"RAY_AUTH_TOKEN": self.token} if with_token else {})

    def submit(
        self,
        *command: str,
        with_token: bool = True,
        wait: bool = True,
        working_dir: Path | None = None,
        timeout_s: float = 300,
    ) -> subprocess.CompletedProcess[str]:
        """Run `ray job submit`, and wait for the job's end or only for its acceptance."""
        options = ["--address", self.dashboard, "--log-style", "record"]
        options += [] if wait else ["--no-wait"]
        options += [] if working_dir is None else ["--working-dir", str(working_dir)]
        return subprocess.run(
            [str(_BIN / "ray"), "job", "submit", *options, "--", *command],
            cwd=ROOT,
            env=self.environment(with_token=with_token),
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    def list_jobs(self) -> list[dict[str, str]]:
        """Ask the head for its jobs, newest last."""
        request = urllib.request.Request(
            f"{self.dashboard}/api/jobs/", headers={"Authorization": f"Bearer {self.token}"}
        )
        with urllib.request.urlopen(request, timeout=10) as answer:
            return sorted(json.load(answer), key=lambda job: job["start_time"] or 0)

    def count_nodes(self) -> int:
        """Count the nodes that are alive."""
        return _count_nodes(self)

    def log_files(self, pattern: str = "*") -> list[Path]:
        """Find Ray's log files of all nodes, jobs and workers."""
        return [
            path for path in self.temp_dir.glob(f"session_2*/logs/**/{pattern}") if path.is_file()
        ]


def can_separate_file_systems() -> bool:
    """Whether this user may make mount namespaces."""
    if shutil.which("unshare") is None:
        return False
    probe = ["unshare", "-m", "sh", "-c", "mount -t tmpfs none /mnt"]
    return subprocess.run(probe, capture_output=True, check=False).returncode == 0


@contextmanager
def run_ray_cluster(
    nodes: Sequence[NodeSpec], *, autoscaled: Mapping[str, Any] | None = None
) -> Iterator[RayCluster]:
    """Run a cluster for a block; the first node is the head.

    Args:
        nodes: what is started.
        autoscaled: a node type (Ray's `available_node_types`) of nodes that come when they are
            needed and go when they are idle.

    Raises:
        RuntimeError: a node does not start; the message holds its output.
    """
    token = secrets.token_hex(32)
    ip = _own_address()
    port, dashboard_port, client_port = _free_ports(3)
    head = [
        "--head",
        f"--port={port}",
        f"--node-ip-address={ip}",
        "--dashboard-host=0.0.0.0",
        f"--dashboard-port={dashboard_port}",
        f"--ray-client-server-port={client_port}",
    ]
    with ExitStack() as stack:
        # Sockets lie in it, Ray's own and Python's, and their paths have at most 107 characters.
        folder = stack.enter_context(_short_folder())
        temp_dir = folder / "ray"
        head.append(f"--temp-dir={temp_dir}")
        if autoscaled is not None:
            config = folder / "autoscaling.json"
            content = json.dumps(_autoscaling_config(ip, port, autoscaled))
            config.write_text(content, encoding="utf-8")
            head.append(f"--autoscaling-config={config}")
        cluster = RayCluster(
            f"{ip}:{port}", f"http://{ip}:{dashboard_port}", token, folder, temp_dir
        )
        for index, spec in enumerate(nodes):
            options = head if index == 0 else [f"--address={cluster.address}"]
            process = _start_node(folder / f"node-{index}", spec, options, token)
            stack.callback(_stop_node, process)
            _wait_for_nodes(cluster, index + 1, process, folder / f"node-{index}" / "log")
        yield cluster


def _start_node(
    folder: Path, spec: NodeSpec, options: Sequence[str], token: str
) -> subprocess.Popen[bytes]:
    folder.mkdir(parents=True)
    environment = {name: value for name, value in os.environ.items() if "RAY_" not in name}
    environment |= _separate_folders(folder)
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token, "OMP_NUM_THREADS": "1"}
    # Of the autoscaler, where there is one: its fake nodes, and how often it looks.
    environment |= {"PYTHONPATH": str(ROOT / "tests"), "AUTOSCALER_UPDATE_INTERVAL_S": "1"}
    if any(option.startswith("--autoscaling-config") for option in options):
        environment["RAY_FAKE_CLUSTER"] = "1"
    environment["PATH"] = f"{_BIN}:{environment['PATH']}"
    command = [
        str(_BIN / "ray"),
        "start",
        *options,
        f"--num-cpus={spec.num_cpus}",
        f"--dashboard-agent-listen-port={_free_ports(1)[0]}",
        "--object-store-memory=100000000",
        "--disable-usage-stats",
        "--block",
    ]
    if spec.private_folders:
        mounts = "".join(f"mount -t tmpfs none '{path}' && " for path in spec.private_folders)
        command = ["unshare", "-m", "sh", "-c", f'{mounts}exec "$@"', "sh", *command]
    with (folder / "log").open("wb") as log:
        return subprocess.Popen(
            command,
            env=environment | dict(spec.environment),
            cwd=folder,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _stop_node(process: subprocess.Popen[bytes]) -> None:
    process.terminate()  # `ray start --block` ends its processes
    try:
        process.wait(_STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _wait_for_nodes(
    cluster: RayCluster, count: int, process: subprocess.Popen[bytes], log: Path
) -> None:
    deadline = time.monotonic() + _START_TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        if _count_nodes(cluster) >= count:
            return
        time.sleep(0.2)
    raise RuntimeError(f"node {count - 1} of the Ray cluster did not start:\n{log.read_text()}")


def _count_nodes(cluster: RayCluster) -> int:
    request = urllib.request.Request(
        f"{cluster.dashboard}/nodes?view=summary",
        headers={"Authorization": f"Bearer {cluster.token}"},
    )
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            summary = json.load(answer)["data"]["summary"]
    except OSError:
        return 0  # the head does not answer yet
    return sum(node.get("raylet", {}).get("state") == "ALIVE" for node in summary)


def _autoscaling_config(ip: str, port: int, node_type: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "cluster_name": "loopback",
        "max_workers": 8,
        "upscaling_speed": 1.0,
        "idle_timeout_minutes": 0.1,
        "provider": {
            "type": "external",
            "module": "support.loopback_nodes.LoopbackNodeProvider",
            "gcs_address": f"{ip}:{port}",
            "head_address": ip,
        },
        "available_node_types": {
            "ray.head.default": {"resources": {}, "node_config": {}, "max_workers": 0},
            "worker": dict(node_type),
        },
        "head_node_type": "ray.head.default",
        "auth": {},
        "file_mounts": {},
        "cluster_synced_files": [],
        "file_mounts_sync_continuously": False,
        "rsync_exclude": [],
        "rsync_filter": [],
        "initialization_commands": [],
        "setup_commands": [],
        "head_setup_commands": [],
        "worker_setup_commands": [],
        "head_start_ray_commands": [],
        "worker_start_ray_commands": [],
    }


def _separate_folders(folder: Path) -> dict[str, str]:
    variables = {}
    for variable, name in (
        ("HOME", "home"),
        ("TMPDIR", "tmp"),
        ("XDG_CACHE_HOME", "cache"),
        ("HF_HOME", "huggingface"),
        ("TORCH_HOME", "torch"),
    ):
        path = folder / name
        path.mkdir(parents=True, exist_ok=True)
        variables[variable] = str(path)
    return variables


@contextmanager
def _short_folder() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="ray"))
    try:
        yield folder
    finally:
        # Ray's last processes may still write their logs.
        shutil.rmtree(folder, ignore_errors=True)


def _own_address() -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing; chooses the interface
        except OSError:
            return "127.0.0.1"
        return str(probe.getsockname()[0])


def start_head(**resources: Any) -> Cluster:
    """Start a cluster whose nodes are children of this process; the caller shuts it down.

    Its dashboard has a port of its own: Ray 2.60 tests whether a port is free, 8265 unless told,
    and leaves the socket open where another cluster's dashboard has it.

    Args:
        resources: of the head, as `ray.init` takes them.
    """
    (port,) = _free_ports(1)
    return Cluster(initialize_head=True, head_node_args={**resources, "dashboard_port": port})


def _free_ports(count: int) -> list[int]:
    ports: list[int] = []
    while len(ports) < count:
        port = _FIRST_PORT + secrets.randbelow(_LAST_PORT - _FIRST_PORT)
        with socket.socket() as probe:
            if port not in ports and probe.connect_ex(("127.0.0.1", port)):
                ports.append(port)
    return ports
