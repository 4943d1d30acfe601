from __future__ import annotations

import pytest

from fqgan_dist.orchestration.progress_board import BoardActor
from fqgan_dist.telemetry.run_view import MetricsUpdate, WorkUpdate


def work(work_id: str, done: int) -> WorkUpdate:
    return WorkUpdate(
        stage="codes",
        work_id=work_id,
        description="codes",
        unit="images",
        done=done,
        skipped=0,
        total=10,
    )


def metrics(step: int, **values: float) -> MetricsUpdate:
    return MetricsUpdate(stage="tokenizer", step=step, values=values)


@pytest.fixture
def board() -> BoardActor:
    return BoardActor("run")


def test_of_each_work_the_newest_state_is_handed_out_once(board: BoardActor) -> None:
    board.receive([work("a", 1), work("b", 5)])
    board.receive([work("a", 2)])
    assert board.take().updates == [work("a", 2), work("b", 5)]
    assert board.take().updates == []


def test_metrics_of_a_stage_are_merged_by_name(board: BoardActor) -> None:
    board.receive([metrics(1, loss=1.0, psnr=20.0)])
    board.receive([metrics(2, loss=0.5)])
    assert board.take().updates == [metrics(2, loss=0.5, psnr=20.0)]


def test_what_nobody_takes_does_not_grow(board: BoardActor) -> None:
    for done in range(1000):
        board.receive([work("a", done), metrics(done, loss=1.0)])
    assert len(board.take().updates) == 2
