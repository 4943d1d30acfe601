"""A real S3 server for tests: Ceph's gateway with one monitor and one in-memory disk, on loopback.

apt-get install -y --no-install-recommends radosgw ceph-mon ceph-osd ceph-common
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

PROGRAMS = (
    "radosgw",
    "radosgw-admin",
    "ceph",
    "ceph-mon",
    "ceph-osd",
    "ceph-authtool",
    "monmaptool",
)
S3_BUCKET = "test-bucket"
ACCESS_KEY = "test-access-key"
SECRET_KEY = "test-secret-key"  # of a server that lives for one test session, on loopback
_START_SECONDS = 90
_STOP_SECONDS = 20


@dataclass(frozen=True)
class Gateway:
    """A running server."""

    endpoint: str
    access_key: str = ACCESS_KEY
    secret_key: str = SECRET_KEY


def missing_programs() -> list[str]:
    """Name the programs that are not installed."""
    return [program for program in PROGRAMS if shutil.which(program) is None]


@contextlib.contextmanager
def run_gateway(folder: Path) -> Iterator[Gateway]:
    """Start a server whose files lie in a new folder, and stop it at the end."""
    port, monitor_v2, monitor_v1 = _free_ports(3)
    monitor = f"[v2:127.0.0.1:{monitor_v2},v1:127.0.0.1:{monitor_v1}]"
    for name in ("mon", "osd", "rgw", "run"):
        (folder / name).mkdir(parents=True)
    (folder / "ceph.conf").write_text(_configuration(folder, port, monitor))
    try:
        _start_monitor(folder, monitor)
        _start_disk(folder)
        _start_server(folder, port)
        yield Gateway(f"http://127.0.0.1:{port}")
    finally:
        _stop(folder)


def _configuration(folder: Path, port: int, monitor: str) -> str:
    # One replica on one memory disk; pools need few placement groups; little free disk is fine.
    return f"""
[global]
fsid = {uuid.uuid4()}
mon initial members = a
mon host = {monitor}
public network = 127.0.0.0/8
ms bind ipv6 = false
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 4
osd crush chooseleaf type = 0
osd objectstore = memstore
memstore device bytes = 4294967296
mon allow pool size one = true
mon max pg per osd = 1000
mon data avail warn = 2
mon data avail crit = 1
mon data = {folder}/mon
osd data = {folder}/osd
keyring = {folder}/keyring
run dir = {folder}/run
pid file = {folder}/run/$name.pid
admin socket = {folder}/run/$name.$pid.asok
log file = {folder}/$name.log
[client.rgw]
rgw data = {folder}/rgw
rgw frontends = beast endpoint=127.0.0.1:{port}
"""


def _start_monitor(folder: Path, monitor: str) -> None:
    keyring, monmap = str(folder / "keyring"), str(folder / "monmap")
    rights = {
        "mon.": ["mon", "allow *"],
        "client.admin": ["mon", "allow *", "osd", "allow *"],
        "osd.0": ["mon", "allow profile osd", "mgr", "allow profile osd", "osd", "allow *"],
        "client.rgw": ["mon", "allow rw", "osd", "allow rwx"],
    }
    _call("ceph-authtool", "--create-keyring", keyring)
    for name, pairs in rights.items():
        caps = [
            text
            for service, right in zip(pairs[::2], pairs[1::2], strict=True)
            for text in ("--cap", service, right)
        ]
        _call("ceph-authtool", keyring, "--gen-key", "-n", name, *caps)
    fsid = next(
        line.split(" = ")[1]
        for line in (folder / "ceph.conf").read_text().splitlines()
        if line.startswith("fsid")
    )
    _call("monmaptool", "--create", "--addv", "a", monitor, "--fsid", fsid, monmap)
    options = ("-i", "a", "--monmap", monmap, "--keyring", keyring)
    _ceph(folder, "ceph-mon", "--mkfs", *options)
    _ceph(folder, "ceph-mon", "-i", "a")


def _start_disk(folder: Path) -> None:
    key = _call("ceph-authtool", str(folder / "keyring"), "-n", "osd.0", "-p").strip()
    disk = str(uuid.uuid4())
    secret = json.dumps({"cephx_secret": key})
    _ceph(folder, "ceph", "osd", "new", disk, "0", "-i", "-", text=secret)
    _ceph(folder, "ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", disk)
    _ceph(folder, "ceph-osd", "-i", "0")
    _wait("the disk", lambda: "1 up" in _ceph(folder, "ceph", "osd", "stat"))


def _start_server(folder: Path, port: int) -> None:
    _ceph(folder, "radosgw", "-n", "client.rgw")
    _wait("the gateway", lambda: _answers(port))
    user = ("--uid=test", "--display-name=test")
    keys = (f"--access-key={ACCESS_KEY}", f"--secret-key={SECRET_KEY}")
    _ceph(folder, "radosgw-admin", "-n", "client.rgw", "user", "create", *user, *keys)


def _stop(folder: Path) -> None:
    pids = [int(file.read_text()) for file in sorted((folder / "run").glob("*.pid"))]
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + _STOP_SECONDS
    for pid in pids:
        while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _ceph(folder: Path, program: str, *arguments: str, text: str | None = None) -> str:
    return _call(program, "-c", str(folder / "ceph.conf"), *arguments, text=text)


def _call(*command: str, text: str | None = None) -> str:
    done = subprocess.run(
        command, input=text, capture_output=True, text=True, timeout=_START_SECONDS, check=False
    )
    if done.returncode != 0:
        raise RuntimeError(f"{command[0]} failed: {done.stderr[-2000:]}")
    return done.stdout


def _wait(what: str, is_ready: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while not is_ready():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} did not start in {_START_SECONDS} s")
        time.sleep(0.3)


def _answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}", timeout=2):
            return True
    except urllib.error.HTTPError as error:
        error.close()
        return True
    except OSError:
        return False


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
