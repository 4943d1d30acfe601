from __future__ import annotations

import threading

import pytest

from fqgan_dist.training.checkpoint_writer import BackgroundWriter


def _fail() -> None:
    raise OSError("disk full")


def test_submit_does_not_wait_for_its_own_job() -> None:
    writer, gate, done = BackgroundWriter(), threading.Event(), threading.Event()

    def job() -> None:
        gate.wait()
        done.set()

    writer.submit(job)
    assert not done.is_set()
    writer.raise_pending()
    gate.set()
    writer.close()
    assert done.is_set()


def test_jobs_run_one_at_a_time_in_order() -> None:
    writer = BackgroundWriter()
    order: list[int] = []
    for index in range(5):
        writer.submit(lambda index=index: order.append(index))
        writer.wait()
    writer.close()
    assert order == [0, 1, 2, 3, 4]


def test_an_error_comes_out_of_every_later_call() -> None:
    writer = BackgroundWriter()
    writer.submit(_fail)
    for call in (writer.wait, writer.raise_pending, lambda: writer.submit(_fail), writer.close):
        with pytest.raises(OSError, match="disk full"):
            call()


def test_raise_pending_is_silent_before_the_first_job() -> None:
    writer = BackgroundWriter()
    writer.raise_pending()
    writer.wait()
    writer.close()
