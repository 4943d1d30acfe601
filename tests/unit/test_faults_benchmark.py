from __future__ import annotations

from itertools import islice

import pytest

from benchmarks.fault_campaign.measures import Recorded, find_goodput, find_recoveries
from benchmarks.fault_campaign.settings import parse_settings
from benchmarks.fault_campaign.simulator import (
    Spot,
    daly_interval_s,
    expected_goodput,
    hourly_rate,
    simulate,
    young_interval_s,
)
from benchmarks.fault_campaign.storm import FAULTS, LASTS_S, plan_storm
from fqgan_dist.errors import ConfigError

SPOT = Spot(num_nodes=10, losses_per_node_hour=0.1, recovery_s=60, save_s=10)
"""One loss an hour."""


def test_the_simulation_meets_dalys_expectation() -> None:
    for interval_s in (100.0, 300.0, 1000.0, 4000.0):
        found = simulate(SPOT, interval_s, seed=1)
        assert found == pytest.approx(expected_goodput(SPOT, interval_s), abs=0.01)


def test_the_best_intervals_are_youngs_and_dalys() -> None:
    assert SPOT.mean_time_s == 3600
    assert young_interval_s(SPOT) == pytest.approx(268.3, abs=0.1)
    assert daly_interval_s(SPOT) == pytest.approx(261.7, abs=0.1)
    best = max(range(50, 2000, 5), key=lambda each: expected_goodput(SPOT, each))
    assert best == pytest.approx(daly_interval_s(SPOT), abs=5)


def test_notice_saves_what_was_done_since_the_checkpoint() -> None:
    noticed = Spot(num_nodes=10, losses_per_node_hour=0.1, recovery_s=0, save_s=0, noticed=1)
    assert simulate(noticed, 3000, seed=1) == pytest.approx(1)
    unnoticed = Spot(num_nodes=10, losses_per_node_hour=0.1, recovery_s=0, save_s=0)
    assert simulate(unnoticed, 3000, seed=1) < 0.7


def test_where_recovery_never_ends_nothing_is_done() -> None:
    hopeless = Spot(num_nodes=10**6, losses_per_node_hour=1, recovery_s=60, save_s=10)
    assert simulate(hopeless, 300, seed=1) == expected_goodput(hopeless, 300) == 0


def test_a_rate_of_a_month_is_that_of_its_hours() -> None:
    assert (1 - hourly_rate(0.2) / 1000) ** (730 * 1000) == pytest.approx(0.8, abs=1e-4)


def test_a_storm_follows_from_its_seed_and_has_every_kind() -> None:
    def plan(seed: int) -> list[object]:
        return list(islice(plan_storm(seed, mean_pause_s=5, longest_s=30), 2 * len(FAULTS)))

    assert plan(1) == plan(1)
    assert plan(1) != plan(2)
    storm = list(islice(plan_storm(3, mean_pause_s=5, longest_s=30), 600))
    for first in range(0, 600, len(FAULTS)):
        assert {each.name for each in storm[first : first + len(FAULTS)]} == set(FAULTS)
    assert sum(each.pause_s for each in storm) / 600 == pytest.approx(5, rel=0.2)
    for each in storm:
        low, high = LASTS_S.get(each.name, (0, 0))
        assert min(low, 30) <= each.lasts_s <= min(high, 30)
        assert 0 <= each.choice < 1


def records(first: int, last: int, *, began: float, step_s: float) -> Recorded:
    return [{"step": step, "time": began + step_s * step} for step in range(first, last + 1)]


def test_goodput_is_the_time_of_the_steps_that_count_over_all_time() -> None:
    # 60 steps of half a second, 20 of them done twice, in 100 seconds.
    sessions = [
        records(1, 40, began=0, step_s=0.5),
        records(21, 60, began=40, step_s=0.5),
    ]
    goodput = find_goodput({"tokenizer": sessions}, {"tokenizer": 60}, wall_s=100)
    assert goodput.step_s["tokenizer"] == pytest.approx(0.5)
    assert goodput.useful_s == pytest.approx(30)
    assert goodput.fraction == pytest.approx(0.3)
    assert goodput.num_repeated == 20


def test_the_log_tells_of_recoveries_and_their_parts() -> None:
    log = (
        "00:01 INFO  tokenizer: back at step 26 after 21.6 s (detection 1.9 s, pause 0.0 s, "
        "group start 15.3 s, first step 0.8 s)\nand 00:02 INFO  autoregressive: back at step 3 "
        "after 4.0 s (restore 3.2 s, first step 0.8 s)\n"
    )
    first, second = find_recoveries(log)
    assert (first.stage, first.step) == ("tokenizer", 26)
    assert first.parts == {"detection": 1.9, "pause": 0, "group_start": 15.3, "first_step": 0.8}
    assert first.whole_s == pytest.approx(18)
    assert (second.stage, second.parts) == ("autoregressive", {"restore": 3.2, "first_step": 0.8})


def test_settings_are_checked() -> None:
    assert parse_settings(["minutes=3", "seed=7"]).minutes == 3
    for wrong in ("minutes=0", "minutes", "faults=[kill time]"):
        with pytest.raises(ConfigError):
            parse_settings([wrong])
