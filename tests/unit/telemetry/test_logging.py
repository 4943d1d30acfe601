from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fqgan_dist.telemetry.logging import configure_logging
from fqgan_dist.world import World


@pytest.fixture(autouse=True)
def restored_logging() -> Iterator[None]:
    root = logging.getLogger()
    handlers = list(root.handlers)
    levels = {name: logging.getLogger(name).level for name in ("fqgan_dist", "data_tools")}
    yield
    for handler in set(root.handlers) - set(handlers):
        root.removeHandler(handler)
        handler.close()
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


def own_logger() -> logging.Logger:
    return logging.getLogger("fqgan_dist.somewhere")


def test_main_rank_shows_info_on_the_console(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging(World(), None)
    own_logger().info("step %d", 7)
    assert "step 7" in capsys.readouterr().err


def test_other_ranks_show_only_errors_on_the_console(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging(World(rank=3, world_size=8, node_rank=1), None)
    own_logger().info("quiet")
    own_logger().warning("also quiet")
    own_logger().error("loud")
    text = capsys.readouterr().err
    assert "quiet" not in text
    assert text.startswith("[rank 3/8 node1] ")
    assert "loud" in text


def test_every_line_of_a_traceback_carries_the_rank(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging(World(rank=3, world_size=8, node_rank=1), None)
    try:
        raise RuntimeError("first line\nsecond line")
    except RuntimeError:
        own_logger().exception("failed")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) > 4
    assert all(line.startswith("[rank 3/8 node1] ") for line in lines)


def test_every_rank_writes_everything_to_its_own_file(tmp_path: Path) -> None:
    file = tmp_path / "rank-2.log"
    configure_logging(World(rank=2, world_size=4), logging.FileHandler(file, encoding="utf-8"))
    own_logger().info("kept")
    text = file.read_text(encoding="utf-8")
    assert "kept" in text
    assert "fqgan_dist.somewhere" in text
    assert "[rank" not in text


def test_foreign_info_lines_are_not_shown(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging(World(), None)
    logging.getLogger("some.library").info("chatter")
    logging.getLogger("some.library").warning("important")
    text = capsys.readouterr().err
    assert "chatter" not in text
    assert "important" in text


def test_configuring_twice_does_not_double_lines(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging(World(), None)
    configure_logging(World(), None)
    own_logger().info("once")
    assert capsys.readouterr().err.count("once") == 1


def test_handlers_of_others_stay(capsys: pytest.CaptureFixture[str]) -> None:
    foreign = logging.NullHandler()
    logging.getLogger().addHandler(foreign)
    configure_logging(World(), None)
    assert foreign in logging.getLogger().handlers


def test_other_handlers_of_the_console_go(capsys: pytest.CaptureFixture[str]) -> None:
    # Ray Train gives the root logger of every train worker one.
    logging.getLogger().addHandler(logging.StreamHandler(sys.stderr))
    configure_logging(World(rank=1, world_size=2), None)
    own_logger().info("of another rank")
    assert capsys.readouterr().err == ""


def test_a_process_that_is_no_rank_is_named_in_its_errors(
    capsys: pytest.CaptureFixture[str],
) -> None:
    configure_logging(World(), None, label="teachers actor 2")
    own_logger().info("quiet")
    own_logger().error("loud")
    text = capsys.readouterr().err
    assert "quiet" not in text
    assert text.startswith("[teachers actor 2] ")
