"""Actors killed at random while they make teacher features, codes and scores: the same bytes."""

from __future__ import annotations

import pickle
import random
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import ray
from ray import cloudpickle
from support import pool_work
from support.observers import RecordingObserver
from support.pool_work import TINY, Leash, LeashedWork, list_files, wait_until

from fqgan_dist.config import load_config
from fqgan_dist.errors import DataError
from fqgan_dist.orchestration.config import PoolConfig
from fqgan_dist.orchestration.driver import run_pipeline
from fqgan_dist.orchestration.pools import open_pool
from fqgan_dist.stages.config import RunConfig
from fqgan_dist.stages.run import open_run, run_stage
from fqgan_dist.stages.stage import RunContext, find_stage
from fqgan_dist.stages.teachers import TeacherWork
from fqgan_dist.weights.config import WeightsConfig
from fqgan_dist.world import World

pytestmark = [
    pytest.mark.ray,
    pytest.mark.filterwarnings(
        # torch's event files are left to the garbage collector by tensorboard's own queue thread.
        "ignore:unclosed file:ResourceWarning"
    ),
]

OUTPUTS: dict[str, str] = {
    "teachers": "features",
    "codes": "codes",
    "samples": "samples",
    "evaluation": "evaluation",
}
"""Folder of each stage that works on chunks."""
KILLS: dict[str, int] = {"teachers": 4, "codes": 3, "evaluation": 3}
POOL = PoolConfig(min_actors=2, max_actors=2, max_failures_per_chunk=10)
MANY_CHUNKS = "data.samples_per_shard=4"
ACTOR_TITLE = "ray::PoolActor"
SLACK_FILES = 3
"""How far the work may get beyond the point of the next kill: it is killed amid its work."""


def load(root: Path) -> RunConfig:
    return load_config(TINY, [f"storage.root={root}", MANY_CHUNKS], RunConfig)


@pytest.fixture(scope="module")
def unbroken_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("unbroken") / "run"
    run_pipeline(load(root))
    return root


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    # Actors cannot import `support`: its classes travel as code.
    cloudpickle.register_pickle_by_value(pool_work)
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()
    cloudpickle.unregister_pickle_by_value(pool_work)


@pytest.fixture
def context(unbroken_root: Path, tmp_path: Path) -> RunContext:
    """The unbroken run, without what the stages that work on chunks have made."""
    root = tmp_path / "run"
    shutil.copytree(unbroken_root, root)
    for stage, folder in OUTPUTS.items():
        shutil.rmtree(root / folder)
        records = root / "manifests" / stage
        shutil.rmtree(records) if records.is_dir() else records.with_suffix(".json").unlink()
    return open_run(load(root), World())


class Killer:
    """Kills actors of this process's Ray by SIGKILL, some in each stage, at random moments.

    A kill is due when a random part of a stage's files is there, and comes up to 0.3 s later, to
    whatever the victim is doing then: starting, loading networks, or working.
    """

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self.victims: list[tuple[str, int]] = []

    def haunt(self, stage: str, leash: Leash, num_files: int) -> None:
        """Kill the stage's share of actors, of a pool that will write so many files."""
        # At most half of the files: there is something left to do for the actors that follow.
        dues = [self._random.randrange(1 + num_files // 2) for _ in range(KILLS.get(stage, 0))]
        try:
            for due in sorted(dues):
                leash.set_limit(due + SLACK_FILES)
                wait_until(lambda due=due: leash.count() >= due)
                wait_until(lambda: self._kill_one(stage))
        finally:
            leash.set_limit(sys.maxsize)

    def _kill_one(self, stage: str) -> bool:
        time.sleep(self._random.uniform(0.0, 0.3))
        actors = find_actors()
        if not actors:
            return False  # between two pools
        victim = self._random.choice(actors)
        try:
            victim.kill()
        except psutil.NoSuchProcess:
            return False
        wait_until(lambda: victim not in find_actors())
        self.victims.append((stage, victim.pid))
        return True


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


def read_outputs(root: Path) -> dict[str, bytes]:
    """Read everything that the chunked stages have written."""
    return {
        str(path.relative_to(root)): path.read_bytes()
        for folder in OUTPUTS.values()
        for path in list_files(root / folder)
    }


def run_haunted(context: RunContext, stage: str, killer: Killer, num_files: int) -> None:
    root = Path(context.storage.root)
    leash = Leash(root.with_name("leash"), root / OUTPUTS[stage])

    with (
        ThreadPoolExecutor(1) as thread,
        open_pool(stage, POOL, observer=RecordingObserver()) as run_chunks,
    ):
        haunting = thread.submit(killer.haunt, stage, leash, num_files)
        run_stage(find_stage(stage)(context), lambda work: run_chunks(LeashedWork(work, leash)))
        haunting.result()


@pytest.mark.full("ten random kills; each kind of loss has a test of its own in test_actor_pools")
def test_ten_random_kills_change_no_byte(
    local_ray: None, unbroken_root: Path, context: RunContext
) -> None:
    root = Path(context.storage.root)
    killer = Killer(seed=20)
    for stage in OUTPUTS:
        run_haunted(context, stage, killer, len(list_files(unbroken_root / OUTPUTS[stage])))
    assert Counter(stage for stage, _ in killer.victims) == KILLS
    assert len({pid for _, pid in killer.victims}) == 10
    expected, found = read_outputs(unbroken_root), read_outputs(root)
    assert sorted(found) == sorted(expected)
    assert [name for name in expected if found[name] != expected[name]] == []


@pytest.mark.full("makes a run; chunks of toys travel in test_actor_pools")
def test_work_travels_without_its_networks(context: RunContext) -> None:
    work = TeacherWork(context)
    assert "_teachers" in work.__dict__  # its fingerprint needs them
    data = pickle.dumps(work)
    assert len(data) < 50_000
    copy = pickle.loads(data)
    assert "_teachers" not in copy.__dict__
    assert copy.store.fingerprint == work.store.fingerprint


@pytest.mark.full("makes a run; chunks of toys travel in test_actor_pools")
def test_node_with_other_weights_is_refused(context: RunContext) -> None:
    copy: TeacherWork = pickle.loads(pickle.dumps(TeacherWork(context)))
    dinov2, clip = context.config.teachers.networks
    other = dinov2.model_copy(update={"weights": WeightsConfig(source="random", seed=7)})
    teachers = context.config.teachers.model_copy(update={"networks": (other, clip)})
    config = context.config.model_copy(update={"teachers": teachers})
    copy.context = replace(context, config=config)
    with pytest.raises(DataError, match="teacher 'dinov2': the network loaded on this node is"):
        copy.process(0)
    assert not copy.is_done(0)
