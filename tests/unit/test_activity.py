"""What counts as a move, and for how long a process has made none."""

from __future__ import annotations

import pytest
from support.clocks import Clock

from fqgan_dist.activity import Activity, Helper
from fqgan_dist.training.hooks import mark_steps
from fqgan_dist.waiting import Waits


@pytest.fixture
def clock() -> Clock:
    return Clock(100.0)


@pytest.fixture
def waits(clock: Clock) -> Waits:
    return Waits(clock=clock)


@pytest.fixture
def activity(clock: Clock, waits: Waits) -> Activity:
    return Activity(waits=waits, clock=clock)


def test_a_phase_stands_still_from_its_last_move(activity: Activity, clock: Clock) -> None:
    activity.enter("step 7", pace="steady")
    clock.now += 5
    assert (activity.glance().phase, activity.glance().still_s) == ("step 7", 5)
    activity.move()
    assert activity.glance().still_s == 0


def test_a_pace_is_known_after_three_units_and_is_their_median(
    activity: Activity, clock: Clock
) -> None:
    for seconds in (60.0, 2.0, 1.0):
        assert activity.glance().median_s is None
        activity.begin_unit()
        activity.enter("step", pace="steady")
        assert activity.glance().pace == "slow"
        clock.now += seconds
        activity.end_unit()
    assert (activity.glance().pace, activity.glance().median_s) == ("steady", 2.0)
    activity.forget_pace()
    assert activity.glance().median_s is None


@pytest.mark.parametrize(
    ("is_loading", "expected"), [(True, 1.0), (False, 9.0)], ids=["loading", "in a step"]
)
def test_an_answer_of_the_storage_moves_only_what_may_wait_for_it(
    activity: Activity, clock: Clock, is_loading: bool, expected: float
) -> None:
    for _ in range(3):
        activity.begin_unit()
        activity.end_unit()
    activity.enter("step 7", pace="steady", is_loading=is_loading)
    clock.now += 8
    activity.note_storage()
    with activity.aside():
        clock.now += 1
        activity.note_storage()
    assert activity.glance().still_s == expected


def test_a_wait_that_is_known_is_told_and_its_end_is_a_move(
    activity: Activity, clock: Clock, waits: Waits
) -> None:
    activity.enter("step 7", pace="steady")
    with waits.during("batches from the loader", is_symptom=True):
        assert activity.glance().waiting == ""
        with waits.during("object storage: 503"):
            clock.now += 50
            assert "object storage: 503" in activity.glance().waiting
        clock.now += 3
        assert (activity.glance().waiting, activity.glance().still_s) == ("", 3)
    assert activity.glance().still_s == 3


def test_helpers_wait_and_move_for_the_process_that_they_load_for(
    activity: Activity, clock: Clock
) -> None:
    activity.enter("batch", pace="steady", is_loading=True)
    clock.now += 50
    with activity.helped_by(lambda: Helper(waiting="a disk", still_s=4.0)):
        assert (activity.glance().waiting, activity.glance().still_s) == ("a disk", 4.0)
    assert (activity.glance().waiting, activity.glance().still_s) == ("", 50)


def test_what_was_done_before_a_block_goes_on_after_it(activity: Activity, clock: Clock) -> None:
    activity.enter("step 7", pace="steady")
    with activity.during("evaluation"):
        clock.now += 5
        assert (activity.glance().phase, activity.glance().pace) == ("evaluation", "slow")
    assert (activity.glance().phase, activity.glance().still_s) == ("step 7", 0)


def test_every_step_and_the_wait_for_its_batch_are_marked(
    monkeypatch: pytest.MonkeyPatch, activity: Activity
) -> None:
    monkeypatch.setattr("fqgan_dist.training.hooks.ACTIVITY", activity)
    seen: list[tuple[str, bool]] = []

    def load() -> object:
        for _ in range(5):
            glance = activity.glance()
            seen.append((glance.phase, glance.is_loading))
            yield

    steps = mark_steps(load(), 4)  # pyright: ignore[reportArgumentType]
    for _ in range(2):
        next(steps)
        glance = activity.glance()
        seen.append((glance.phase, glance.is_loading))
    steps.close()
    assert seen == [
        ("step 5, its batch", True),
        ("step 5", False),
        ("step 6, its batch", True),
        ("step 6", False),
    ]
    assert activity.glance().phase == "the end of training"
