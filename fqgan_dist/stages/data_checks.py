"""What stages need of a run's images, checked as soon as these are known, not after hours."""

from __future__ import annotations

from collections.abc import Iterable

from fqgan_dist.errors import ConfigError
from fqgan_dist.stages.config import RunConfig
from fqgan_dist.stages.stage import DataSizes, Stage


def check_sizes(stages: Iterable[type[Stage]], config: RunConfig, sizes: DataSizes) -> None:
    """Compare the sizes of both splits with what some stages of a run need.

    Raises:
        ConfigError: every problem, one line each.
    """
    problems = [
        problem
        for stage in stages
        if stage.is_wanted(config)
        for problem in stage.find_data_problems(config, sizes)
    ]
    if problems:
        raise ConfigError("\n  ".join(problems))
