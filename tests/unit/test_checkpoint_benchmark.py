from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.checkpointing import command, contenders, training
from benchmarks.checkpointing.contenders import (
    COPY,
    DCP,
    DCP_ASYNC,
    OURS,
    TORCH,
    TORCH_UNSYNCED,
    State,
)
from benchmarks.checkpointing.restoring import RAW, RAW_NEW, drop_from_cache, read_raw
from benchmarks.checkpointing.settings import Settings
from benchmarks.checkpointing.training import NO_SAVES
from benchmarks.paired import Finding, WrongResultError, run_measures
from benchmarks.reporting import MISSED, NOT_JUDGED, WRONG_USAGE

TARGETS = {
    ("stall", COPY): ">= 0.667x",
    ("stall", TORCH): ">= 8x",
    ("stall", DCP_ASYNC): ">= 1.25x",
    ("writing", TORCH): ">= 1.8x",
    ("training", NO_SAVES): ">= 0.909x",
    ("restore, warm", RAW): ">= 0.769x",
    ("restore, cold", RAW): ">= 0.769x",
}


@pytest.fixture
def state() -> State:
    return contenders.make_state(5_000)


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """The command sets the number for its process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_the_table_has_all_contenders_and_all_targets(tmp_path: Path) -> None:
    memory, results = tmp_path / "memory", tmp_path / "results"
    memory.mkdir()
    options = ["params_m=1", "steps=4", "every=2", "step_s=0.001", "rounds=1", "loops=1"]
    places = [f"folder={tmp_path / 'disk'}", f"memory_folder={memory}", f"results={results}"]
    command.main([*options, *places])
    table = (results / "checkpoint.txt").read_text()
    report = json.loads((results / "checkpoint.json").read_text())
    assert {"torch", "processor", "date"} <= report["machine"].keys()
    assert report["command"].startswith("python benchmarks/checkpoint.py params_m=1 ")
    found = report["findings"]
    for place in ("disk", "memory"):
        names = {each["what"] for each in found if each["subject"] == f"{place}: stall"}
        assert names == {COPY, TORCH_UNSYNCED, TORCH, DCP, DCP_ASYNC, OURS}
        names = {each["what"] for each in found if each["subject"] == f"{place}: writing"}
        assert names == {TORCH_UNSYNCED, TORCH, DCP, DCP_ASYNC, OURS}
        targets = {
            (each["subject"].removeprefix(f"{place}: "), each["over"]): each["target"]
            for each in found
            if each["target"] and each["subject"].startswith(place)
        }
        is_disk = place == "disk"
        assert targets == {key: TARGETS[key] for key in TARGETS if is_disk or "cold" not in key[0]}
        assert f"{place}: restore, warm" in table
    assert {each["what"] for each in found} >= {RAW, RAW_NEW, NO_SAVES}
    assert all(each["value"] > 0 for each in found)
    assert all(each["what"].startswith(OURS) for each in found if each["target"])
    assert list(memory.iterdir()) == list((tmp_path / "disk").iterdir()) == []


def test_a_part_that_ran_alone_has_a_file_of_its_own(tmp_path: Path) -> None:
    options = ["params_m=0.1", "rounds=1", "subject=restore", f"folder={tmp_path / 'disk'}"]
    command.main([*options, f"memory_folder={tmp_path}", f"results={tmp_path}"])
    assert (tmp_path / "checkpoint_restore.txt").is_file()


def test_every_contender_gives_back_its_last_save(state: State, tmp_path: Path) -> None:
    with contenders.quiet_dcp():
        for name, contender in contenders.build_contenders(state, tmp_path).items():
            contenders.check(name, contender, state)
            state["weights"]["layers.0.bias"].add_(1)
            with pytest.raises(WrongResultError, match=r"weights layers\.0\.bias"):
                contenders.compare(name, contender.read_back(), state)
            contenders.check(name, contender, state)
            contender.close()


def test_wrong_results_are_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise WrongResultError("torn")

    monkeypatch.setattr(command, "check", fail)
    settings = Settings(params_m=0.1, folder=tmp_path, memory_folder=tmp_path)
    findings = command.measure(settings)
    assert [(each.subject, each.verdict, each.note) for each in findings] == [
        ("disk", "wrong", "torn"),
        ("memory", "wrong", "torn"),
    ]
    assert command.find_exit_code(findings) == MISSED


def test_without_room_it_says_how_much_is_needed(tmp_path: Path) -> None:
    assert command.find_lack_of_room("disk", tmp_path, 10**3) == ""
    assert "free" in command.find_lack_of_room("disk", tmp_path, 10**15)
    assert "no such folder" in command.find_lack_of_room("memory", tmp_path / "none", 10**3)
    finding = Finding(subject="memory", what="all", verdict="not run")
    assert command.find_exit_code([finding]) == NOT_JUDGED


@pytest.mark.parametrize("wrong", ["rounds=0", "steps=5", "folder", "subject=speed"])
def test_wrong_options_are_named(wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([wrong]) == WRONG_USAGE
    assert wrong.partition("=")[0] in capsys.readouterr().err


def test_a_state_has_adams_moments_and_the_parameters_asked_for() -> None:
    state = contenders.make_state(1_000_000)
    assert contenders.count_bytes(state) == pytest.approx(12e6, rel=0.03)
    assert len(state["optimizer"]) == 2 * len(state["weights"])


def test_a_loop_saves_so_often_and_tells_of_each(tmp_path: Path, state: State) -> None:
    settings = Settings(steps=7, every=2, step_s=0.001)
    seen = training.LoopTimes()
    ours = contenders.Ours(state, tmp_path)
    costs = training.run_loop(ours, lambda: None, settings, seen)
    ours.close()
    assert len(seen.stalls) == len(seen.waits) == 3
    assert 0 < costs["step"] < costs["loop"]


def test_raw_reads_take_whole_files(tmp_path: Path) -> None:
    files = [tmp_path / "a", tmp_path / "b"]
    for number, path in enumerate(files):
        path.write_bytes(bytes([number]) * 10_000)
        drop_from_cache(path)
    buffer = np.full(20_000, 9, np.uint8)
    read_raw(files, buffer)
    assert np.array_equal(buffer, np.repeat([0, 1], 10_000))
    with pytest.raises(WrongResultError, match="20000 of 20001"):
        read_raw(files, np.zeros(20_001, np.uint8))


def test_a_run_may_give_several_measures() -> None:
    runs = {"whole": {"a": 4.0, "b": 2.0}, "half": {"a": 2.0}}
    contestants = {name: lambda costs=costs: costs for name, costs in runs.items()}
    measures = run_measures(contestants, control="whole", rounds=3)
    assert measures["a"].costs == {"whole": [4.0] * 3, "half": [2.0] * 3}
    assert measures["b"].costs == {"whole": [2.0] * 3}
    assert measures["b"].control_ratios() == (1.0, 1.0)
