from __future__ import annotations

import io
import logging
import sys
from dataclasses import replace

import pytest
from rich.console import Console

from fqgan_dist.telemetry.run_view import (
    MetricsUpdate,
    RunProgress,
    StageView,
    WorkUpdate,
    render_run,
    show_run,
)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def update(done: int, **changes: object) -> WorkUpdate:
    base = WorkUpdate(
        stage="teachers",
        work_id="first",
        description="teacher features",
        unit="images",
        done=done,
        skipped=0,
        total=100,
    )
    return replace(base, **changes)


def view_of(ledger: RunProgress, stage: str) -> StageView:
    return next(view for view in ledger.stages() if view.name == stage)


def text_of(stages: tuple[StageView, ...], width: int = 140) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(render_run(stages, title="run [1]"))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_stages_wait_run_and_end_in_their_order() -> None:
    clock = Clock()
    ledger = RunProgress(["shards", "teachers", "codes"], clock=clock)
    ledger.finish("shards", "skipped")
    clock.now = 10
    ledger.apply(update(5))
    clock.now = 25
    assert [(view.name, view.state, view.seconds) for view in ledger.stages()] == [
        ("shards", "skipped", None),
        ("teachers", "running", 15),
        ("codes", "waiting", None),
    ]
    ledger.finish("teachers", "done")
    clock.now = 99
    assert view_of(ledger, "teachers").seconds == 15


def test_rate_and_time_left_leave_out_earlier_sessions() -> None:
    clock = Clock()
    ledger = RunProgress(["teachers"], clock=clock)
    ledger.apply(update(60, skipped=60))
    work = view_of(ledger, "teachers").work
    assert work is not None
    assert work.rate is None
    clock.now = 10
    ledger.apply(update(80, skipped=60))
    work = view_of(ledger, "teachers").work
    assert work is not None
    assert work.rate == 2.0
    assert work.left_s == 10.0


def test_a_new_attempt_replaces_the_old_one_whose_late_messages_count_no_more() -> None:
    ledger = RunProgress(["teachers"])
    ledger.apply(update(50, fields={"loss": 1.0}))
    ledger.apply(MetricsUpdate(stage="teachers", step=5, values={"teachers/loss/total": 1.0}))
    ledger.apply(update(20, work_id="second"))
    ledger.apply(update(51))
    work = view_of(ledger, "teachers").work
    assert work is not None
    assert work.done == 20
    assert work.fields == {}


def test_the_last_message_of_a_stage_may_come_after_its_end() -> None:
    clock = Clock()
    ledger = RunProgress(["teachers"], clock=clock)
    ledger.apply(update(1))
    clock.now = 5
    ledger.finish("teachers", "done")
    clock.now = 6
    ledger.apply(update(100))
    view = view_of(ledger, "teachers")
    assert (view.state, view.seconds) == ("done", 5)
    assert view.work is not None
    assert view.work.done == 100


def test_the_loss_and_the_throughput_are_shown() -> None:
    ledger = RunProgress(["tokenizer"])
    ledger.apply(update(3, stage="tokenizer", unit="steps", description="training"))
    values = {"tokenizer/loss/total": 0.5, "tokenizer/loss/other": 9.0, "train/images_per_s": 70.0}
    ledger.apply(MetricsUpdate(stage="tokenizer", step=3, values=values))
    text = text_of(ledger.stages())
    assert "loss 0.500" in text
    assert "images/s 70" in text
    assert "9.0" not in text


def test_the_table_has_a_line_per_stage_and_reads_no_markup() -> None:
    clock = Clock()
    ledger = RunProgress(["shards", "teachers"], clock=clock)
    ledger.apply(update(25, description="[red]features"))
    clock.now = 5
    ledger.apply(update(50, description="[red]features"))
    lines = text_of(ledger.stages()).splitlines()
    assert lines[0].strip() == "run [1]"
    (shards,) = [line for line in lines if "shards" in line]
    assert shards.split() == ["shards", "waiting"]
    (teachers,) = [line for line in lines if "teachers" in line]
    for part in ("running", "50/100 images", "5.0/s", "10.0 s", "[red]features"):
        assert part in teachers


def test_the_table_fits_a_narrow_terminal() -> None:
    ledger = RunProgress(["teachers"])
    ledger.apply(update(50, fields={"a long name of a field": 1.0}))
    assert max(len(line) for line in text_of(ledger.stages(), width=80).splitlines()) <= 80


def test_without_a_terminal_the_end_of_each_work_is_one_log_line(
    caplog: pytest.LogCaptureFixture,
) -> None:
    clock = Clock()
    ledger = RunProgress(["teachers"], clock=clock)
    console = Console(file=io.StringIO(), force_terminal=False)
    with (
        caplog.at_level(logging.INFO, "fqgan_dist"),
        show_run(ledger.stages, title="run", console=console, clock=clock),
    ):
        ledger.apply(update(0))
        clock.now = 4
        ledger.apply(update(100))
    assert caplog.messages == ["teachers: teacher features: 100/100 images, 25.0 images/s, 4.0 s"]


def test_on_a_terminal_lines_pass_above_the_table(caplog: pytest.LogCaptureFixture) -> None:
    ledger = RunProgress(["teachers"])
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=120)
    # As Ray's own handler: it holds the stream that was standard error when it was made.
    early = logging.StreamHandler(sys.stderr)
    logger = logging.getLogger("somebody.early")
    logger.propagate = False
    logger.addHandler(early)
    before = early.stream
    try:
        with show_run(ledger.stages, title="run", console=console):
            ledger.apply(update(50))
            sys.stdout.write("a forwarded line\n")
            sys.stderr.write("another one\n")
            logger.warning("of an early handler")
    finally:
        logger.removeHandler(early)
    text = file.getvalue()
    for line in ("a forwarded line", "another one", "of an early handler", "50/100 images"):
        assert line in text
    assert text.rindex("of an early handler") < text.rindex("50/100 images")
    assert early.stream is before


def test_the_last_state_is_shown_when_the_block_fails() -> None:
    ledger = RunProgress(["teachers"])
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=120)

    def fail() -> None:
        ledger.finish("teachers", "failed")
        raise RuntimeError("broken")

    with (
        pytest.raises(RuntimeError, match="broken"),
        show_run(ledger.stages, title="run", console=console),
    ):
        fail()
    assert "failed" in file.getvalue()
