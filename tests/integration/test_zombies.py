"""Runs that are stopped (SIGSTOP), believed dead, and go on when another one has finished: they
change no byte of what is there, and write nothing but under their own names.

Each stops itself right before a write, so that it wakes with that write: the worst moment there is.
Three of the moments are in the middle of the tokenizer's training, the last is after its last step,
before its stage is recorded as done.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.small_s3 import run_small_s3
from support.waiting import wait_until

from fqgan_dist.config import load_config
from fqgan_dist.stages.checkpoints import run_checkpoint_action
from fqgan_dist.stages.config import RunConfig
from fqgan_dist.storage.storage import Storage
from fqgan_dist.training.commit_log import CommitLog, StartRecord
from fqgan_dist.training.config import CheckpointTarget

TESTS = Path(__file__).parents[1]
TINY = TESTS / "support" / "tiny.yaml"
TIMEOUT_S = 400
WAKING_MOMENTS = {
    # Of a session's own log: 1 its start, 2 the commit of step 2, 3 that of step 4.
    "a commit": ("/tokenizer/checkpoints/commits/", 3),
    "metrics for readers": ("/tokenizer/metrics.jsonl", 1),
    "a file of a checkpoint": ("/tokenizer/checkpoints/step-", 2),
    "the record of the stage": ("/manifests/tokenizer.json", 1),
}
"""Fragments of names, and at which write of such the run stops; one run each, in this order."""

pytestmark = [
    pytest.mark.full("stops four runs; each fence is proven in unit by itself"),
    pytest.mark.timeout(3 * TIMEOUT_S),
]

Objects = Mapping[str, bytes]


@dataclass
class Root:
    """Where the runs lie."""

    uri: str
    environment: dict[str, str]
    snapshot: Callable[[], Objects]
    """Gives every object by its name below the root."""


@dataclass
class Zombie:
    """A run that was stopped."""

    process: subprocess.Popen[bytes]
    logs: set[str]
    """Log files that came while it lived."""
    attempt: str
    """Id of its attempt at the tokenizer's training."""

    def owns(self, name: str) -> bool:
        """Whether a name is this run's own."""
        session = rf"tokenizer/sessions/\d+-from-\d+-{self.attempt}/"
        checkpoint = rf"tokenizer/checkpoints/step-\d+/attempt-{self.attempt}/"
        events = rf"tokenizer/tensorboard/events\.out\.tfevents\.[^/]*\.{self.process.pid}\.\d+$"
        half_written = rf".*\.writing-[0-9a-f]+-{self.process.pid:x}-"
        own = (session, checkpoint, events, half_written)
        return name in self.logs or any(re.match(pattern, name) for pattern in own)


@pytest.fixture(params=["disk", "bucket"])
def root(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Root]:
    environment = {"OMP_NUM_THREADS": "1"}
    if request.param == "disk":
        folder = tmp_path / "run"

        def snapshot() -> Objects:
            files = (file for file in folder.rglob("*") if file.is_file())
            return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}

        yield Root(str(folder), environment, snapshot)
        return
    with run_small_s3() as server:
        environment |= {
            "AWS_ENDPOINT_URL": server.endpoint,
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        for name, value in environment.items():
            monkeypatch.setenv(name, value)

        def snapshot_of_bucket() -> Objects:
            with server.lock:
                objects = dict(server.objects)
            return {name.removeprefix("/bucket/run/"): data for name, data in objects.items()}

        yield Root("s3://bucket/run", environment, snapshot_of_bucket)


def start(root: Root, *program: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [
            *(sys.executable, "-W", "ignore", *program, "run", str(TINY)),
            f"storage.root={root.uri}",
            # Who slept for so long is not to be taken for one that hangs.
            "watchdog={after_s: 100000, slow_after_s: 100000, warn_after_s: 100000}",
        ],
        env=os.environ | root.environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def is_stopped(process: subprocess.Popen[bytes]) -> bool:
    assert process.poll() is None, "it ended before it was stopped"
    stat = Path(f"/proc/{process.pid}/stat").read_text()
    return stat.rpartition(")")[2].split()[0] == "T"


def starts(root: Root) -> list[str]:
    """List the ids of the attempts at the tokenizer, oldest first."""
    log = CommitLog(Storage(root.uri).child("tokenizer/checkpoints"))
    records = [record for _, record in log.newest_first() if isinstance(record, StartRecord)]
    return [record.attempt for record in reversed(records)]


def stop_at(root: Root, fragment: str, count: int) -> Zombie:
    before = log_names(root)
    process = start(root, str(TESTS / "support" / "stopped_runs.py"), fragment, str(count))
    try:
        wait_until(lambda: is_stopped(process))
    except BaseException:
        end(process)
        raise
    return Zombie(process, log_names(root) - before, starts(root)[-1])


def end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.communicate()


def log_names(root: Root) -> set[str]:
    return {name for name in root.snapshot() if name.startswith("logs/")}


def wake(root: Root, zombie: Zombie) -> str:
    """Let a run go on to its end, check what it changed, and return what it said."""
    before = root.snapshot()
    zombie.process.send_signal(signal.SIGCONT)
    _, said = zombie.process.communicate(timeout=TIMEOUT_S)
    after = root.snapshot()
    zombie.logs |= {name for name in after.keys() - before.keys() if name.startswith("logs/")}
    changed = [name for name, data in before.items() if after.get(name) != data]
    assert [name for name in changed if not zombie.owns(name)] == []
    assert [name for name in after.keys() - before.keys() if not zombie.owns(name)] == []
    return said.decode()


def test_who_was_believed_dead_changes_nothing(root: Root) -> None:
    zombies: dict[str, Zombie] = {}
    try:
        for name, moment in WAKING_MOMENTS.items():
            zombies[name] = stop_at(root, *moment)
        assert len(starts(root)) == len(zombies)
        last = start(root, "-m", "fqgan_dist.cli")
        _, said = last.communicate(timeout=TIMEOUT_S)
        assert last.returncode == 0, said.decode()
        finished = root.snapshot()
        for name, zombie in zombies.items():
            said = wake(root, zombie)
            if name == "the record of the stage":  # all that it would do is done
                assert zombie.process.returncode == 0, said
            else:
                assert zombie.process.returncode == 1, said
                assert "was superseded by the newer attempt" in said, said
    finally:
        for zombie in zombies.values():
            end(zombie.process)
    # What the finished run left is as it was after all of them, and whole.
    after = root.snapshot()
    own = [zombie.owns for zombie in zombies.values()]
    changed = [name for name, data in finished.items() if after.get(name) != data]
    assert [name for name in changed if not any(owns(name) for owns in own)] == []
    config = load_config(TINY, [f"storage.root={root.uri}"], RunConfig)
    result = run_checkpoint_action("verify", config, "tokenizer", CheckpointTarget(ledger=True))
    assert not result.is_damaged, result.text
