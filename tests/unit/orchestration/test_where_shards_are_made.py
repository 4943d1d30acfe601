"""Work on a cluster: by actors, or by the driver where only that can read the inputs."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
from PIL import Image
from support.observers import RecordingObserver

from fqgan_dist.chunks import ChunkWork
from fqgan_dist.orchestration.ray_driver import _run_chunks
from fqgan_dist.sharding.building import build_dataset
from fqgan_dist.sharding.plan import ShardingConfig
from fqgan_dist.sharding.sources.opening import open_source
from fqgan_dist.storage.storage import Storage


class FakePool:
    """Notes what it is given, and does it."""

    def __init__(self) -> None:
        self.given: list[str] = []

    def __call__(self, work: ChunkWork) -> None:
        self.given.append(work.description)
        for chunk in work.chunks():
            work.process(chunk)


@pytest.mark.parametrize(
    ("address", "is_shared", "given"),
    [
        ("10.0.0.1:6379", True, ["writing train shards"]),
        ("10.0.0.1:6379", False, []),
        (None, False, ["writing train shards"]),
    ],
)
def test_shards_of_a_source_that_other_nodes_do_not_see_are_made_by_the_driver(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    address: str | None,
    is_shared: bool,
    given: list[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if address is not None:
        monkeypatch.setenv("RAY_ADDRESS", address)
    (tmp_path / "images" / "a").mkdir(parents=True)
    Image.new("RGB", (20, 20)).save(tmp_path / "images" / "a" / "x.png")
    pool, observer = FakePool(), RecordingObserver()
    with open_source(str(tmp_path / "images"), is_shared=is_shared) as source:
        index, _ = build_dataset(
            source,
            Storage(tmp_path / "out"),
            ShardingConfig(name="x", split="train"),
            run_chunks=partial(_run_chunks, in_pool=pool, observer=observer),
        )
    assert index.num_samples == 1
    assert pool.given == given
    assert observer.lines() == ["writing train shards: 1/1 images"][len(given) :]
    assert ("is_shared=true, all nodes would" in caplog.text) is (not given)
