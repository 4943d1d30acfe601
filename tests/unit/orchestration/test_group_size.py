"""How many train workers a start has, and when a training makes way for more; no Ray is started."""

from __future__ import annotations

import pytest

from fqgan_dist.orchestration.config import TrainWorkersConfig
from fqgan_dist.orchestration.group_size import GrowthWatch, count_fitting, largest_fitting

NODES = ({"CPU": 8.0, "GPU": 2.0}, {"CPU": 5.0, "GPU": 4.0}, {"CPU": 64.0})
AFTER_S = 60.0


@pytest.mark.parametrize(
    ("placement", "expected"),
    [("PACK", 4), ("SPREAD", 4), ("STRICT_PACK", 2), ("STRICT_SPREAD", 2)],
)
def test_workers_fit_whole_on_nodes_as_the_placement_says(placement: str, expected: int) -> None:
    # Two GPUs and five CPUs are the bounds of the first two nodes; the third has no GPU at all.
    workers = TrainWorkersConfig.model_validate({"gpus": 1, "cpus": 2, "placement": placement})
    assert count_fitting(NODES, workers) == expected


def test_fractions_that_are_a_little_off_count_whole() -> None:
    assert count_fitting([{"CPU": 0.1 + 0.2}], TrainWorkersConfig(cpus=0.3)) == 1
    assert count_fitting([{"CPU": 3 * 0.1}], TrainWorkersConfig(cpus=0.1)) == 3
    assert count_fitting([], TrainWorkersConfig()) == 0


@pytest.mark.parametrize(
    ("num_fitting", "size"), [(0, None), (1, None), (2, 2), (3, 2), (5, 4), (9, 6)]
)
def test_the_largest_valid_size_that_fits_is_taken(num_fitting: int, size: int | None) -> None:
    assert largest_fitting([2, 4, 6], num_fitting) == size


class Watched:
    """A watch over sizes 1, 2 and 4, and its clock."""

    def __init__(self) -> None:
        self.now = 0.0
        self.watch = GrowthWatch((1, 2, 4), AFTER_S, clock=lambda: self.now)

    def start(self, size: int, *, after_s: float = 0.0) -> None:
        self.now += after_s
        self.watch.begin(size)

    def seconds_to_growth(self, num_fitting: int) -> float | None:
        """Look every ten seconds for two hours, as long as there is room for so many."""
        began = self.now
        while self.now < began + 7200:
            if self.watch.look(num_fitting) is not None:
                return self.now - began
            self.now += 10.0
        return None


@pytest.fixture
def watched() -> Watched:
    return Watched()


def test_a_group_makes_way_when_room_has_lasted(watched: Watched) -> None:
    watched.start(1)
    assert watched.watch.could_grow
    assert watched.watch.look(3) is None
    watched.now = AFTER_S
    assert watched.watch.look(3) == 2  # 3 is not valid
    assert not watched.watch.could_grow  # it is said once


def test_room_that_is_not_enough_for_a_valid_size_is_no_room(watched: Watched) -> None:
    watched.start(2)
    assert watched.seconds_to_growth(3) is None


def test_room_that_goes_away_counts_from_its_return(watched: Watched) -> None:
    watched.start(1)
    watched.watch.look(2)
    watched.now = AFTER_S - 1
    assert watched.watch.look(1) is None
    watched.now = AFTER_S
    assert watched.watch.look(2) is None
    watched.now += AFTER_S
    assert watched.watch.look(2) == 2


def test_a_complete_group_does_not_grow(watched: Watched) -> None:
    watched.start(4)
    assert not watched.watch.could_grow


def test_each_loss_of_workers_doubles_the_wait_up_to_a_bound(watched: Watched) -> None:
    watched.start(2)
    waits = [watched.seconds_to_growth(4)]
    for _ in range(8):
        watched.start(2)  # it asked for room that was gone again
        waits.append(watched.seconds_to_growth(4))
    assert waits == [60, 120, 240, 480, 960, 1920, 3840, 3840, 3840]


def test_a_shrink_doubles_the_wait_and_a_complete_group_forgives_it(watched: Watched) -> None:
    watched.start(2)
    watched.start(1, after_s=5)
    assert watched.seconds_to_growth(2) == 2 * AFTER_S
    watched.start(4)
    watched.start(2)
    assert watched.seconds_to_growth(4) == 2 * AFTER_S


def test_a_start_that_lasts_forgives(watched: Watched) -> None:
    watched.start(2)
    watched.start(1)
    watched.start(1, after_s=65 * AFTER_S)
    assert watched.seconds_to_growth(2) == AFTER_S


def test_a_restart_at_the_same_size_is_no_loss_of_workers(watched: Watched) -> None:
    watched.start(1)
    watched.start(1)
    assert watched.seconds_to_growth(2) == AFTER_S
