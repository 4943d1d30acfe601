"""Actors killed at random while they make teacher features, codes and scores: the same bytes."""

from __future__ import annotations

import pickle
import random
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import ray
from support.pool_work import TINY, RecordingObserver

from fqgan_dist.config import load_config
from fqgan_dist.data.storage import Storage
from fqgan_dist.errors import DataError
from fqgan_dist.orchestration.driver import run_pipeline
from fqgan_dist.orchestration.pools import run_chunks_on_pool
from fqgan_dist.orchestration.registry import build_stage
from fqgan_dist.stages.config import RunConfig
from fqgan_dist.stages.execution import PoolConfig
from fqgan_dist.stages.names import StageName
from fqgan_dist.stages.run import open_run, run_stage
from fqgan_dist.stages.stage import ChunkWork, RunContext
from fqgan_dist.stages.teachers import TeacherWork
from fqgan_dist.world import World

pytestmark = [
    pytest.mark.ray,
    pytest.mark.filterwarnings(
        # torch's event files are left to the garbage collector by tensorboard's own queue thread.
        "ignore:unclosed file:ResourceWarning"
    ),
]

OUTPUTS: dict[StageName, str] = {
    "teachers": "features",
    "codes": "codes",
    "samples": "samples",
    "evaluation": "evaluation",
}
"""Folder of each stage that works on chunks."""
KILLS: dict[StageName, int] = {"teachers": 4, "codes": 3, "evaluation": 3}
POOL = PoolConfig(min_actors=2, max_actors=2, max_failures_per_chunk=10)
# Many small chunks: kills fall between and into them.
MANY_CHUNKS = ("data.samples_per_shard=4", "evaluation.chunk_size=3", "evaluation.batch_size=3")
ACTOR_TITLE = "ray::PoolActor"
TIMEOUT_S = 300.0


def load(root: Path) -> RunConfig:
    return load_config(TINY, [f"storage.root={root}", *MANY_CHUNKS], RunConfig)


@pytest.fixture(scope="module")
def unbroken_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("unbroken") / "run"
    run_pipeline(load(root))
    return root


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture
def context(unbroken_root: Path, tmp_path: Path) -> RunContext:
    """The unbroken run, without what the stages that work on chunks have made."""
    root = tmp_path / "run"
    shutil.copytree(unbroken_root, root)
    for stage, folder in OUTPUTS.items():
        shutil.rmtree(root / folder)
        (root / "manifests" / f"{stage}.json").unlink()
    return open_run(load(root), World())


class Killer:
    """Kills actors of this process's Ray by SIGKILL, some of each stage, at random moments.

    A kill is due when a random share of a stage's files is there, and comes up to half a second
    later, to whatever the victim is doing then: starting, loading networks, or working.
    """

    def __init__(self, root: Path, seed: int) -> None:
        self._root = root
        self._random = random.Random(seed)
        self.victims: list[tuple[StageName, int, str]] = []

    def haunt(self, stage: StageName, num_files: int, is_over: threading.Event) -> None:
        """Kill the stage's share of victims."""
        # At most half of the files: there is something left to do for the actors that follow.
        dues = [self._random.randrange(1 + num_files // 2) for _ in range(KILLS.get(stage, 0))]
        for due in sorted(dues):
            while not (victims := find_actors()) or self._count_files(stage) < due:
                if is_over.wait(0.01):
                    return
            time.sleep(self._random.uniform(0.0, 0.5))
            victim = self._random.choice(victims)
            try:
                title = victim.name()
                victim.kill()
                victim.wait(10)
            except psutil.NoSuchProcess:
                continue
            self.victims.append((stage, victim.pid, title))

    def _count_files(self, stage: StageName) -> int:
        return count_files(self._root / OUTPUTS[stage])


def find_actors() -> list[psutil.Process]:
    """List the processes of pool actors."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if process.name().startswith(ACTOR_TITLE):
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


def count_files(folder: Path) -> int:
    return sum(path.is_file() for path in folder.rglob("*"))


def read_outputs(root: Path) -> dict[str, bytes]:
    """Read everything that the chunked stages have written."""
    return {
        str(path.relative_to(root)): path.read_bytes()
        for folder in OUTPUTS.values()
        for path in sorted((root / folder).rglob("*"))
        if path.is_file()
    }


def run_haunted(context: RunContext, stage: StageName, killer: Killer, num_files: int) -> None:
    def run_chunks(work: ChunkWork) -> None:
        run_chunks_on_pool(work, POOL, observer=RecordingObserver())

    is_over = threading.Event()
    thread = threading.Thread(target=killer.haunt, args=(stage, num_files, is_over))
    thread.start()
    try:
        run_stage(build_stage(stage, context), context, run_chunks)
    finally:
        is_over.set()
        thread.join()


@pytest.mark.timeout(TIMEOUT_S)
def test_ten_random_kills_change_no_byte(
    local_ray: None, unbroken_root: Path, context: RunContext
) -> None:
    root = Path(context.storage.root)
    killer = Killer(root, seed=20)
    for stage in OUTPUTS:
        run_haunted(context, stage, killer, count_files(unbroken_root / OUTPUTS[stage]))
    assert len(killer.victims) == 10, killer.victims
    expected, found = read_outputs(unbroken_root), read_outputs(root)
    assert sorted(found) == sorted(expected)
    assert [name for name in expected if found[name] != expected[name]] == []


def test_work_travels_without_its_networks(context: RunContext) -> None:
    work = TeacherWork(context)
    assert "_teachers" in work.__dict__  # its fingerprint needs them
    data = pickle.dumps(work)
    assert len(data) < 50_000
    copy = pickle.loads(data)
    assert "_teachers" not in copy.__dict__
    assert copy.store.fingerprint == work.store.fingerprint


def test_node_with_other_weights_is_refused(context: RunContext) -> None:
    copy: TeacherWork = pickle.loads(pickle.dumps(TeacherWork(context)))
    path, other = context.storage.root, "teachers.networks.0.weights.seed=7"
    networks = [item.model_dump() for item in context.config.teachers.networks]
    networks[0]["weights"]["seed"] = 7
    teachers = type(context.config.teachers)(networks=networks)  # pyright: ignore
    config = context.config.model_copy(update={"teachers": teachers})
    copy.context = RunContext(
        config=config, storage=Storage(path), world=World(), device=context.device
    )
    with pytest.raises(DataError, match="teacher 'dinov2': the network loaded on this node is"):
        copy.process(0)
    assert not copy.is_done(0), other
