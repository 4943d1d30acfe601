"""Notice: given once or often, heeded or not, and asked for in the background."""

from __future__ import annotations

import threading

import pytest
from support.waiting import wait_until

from fqgan_dist.errors import FqganError, NoticeError, exit_code_of
from fqgan_dist.notice import Notice, Notices, watching


def test_the_first_reason_and_the_earliest_deadline_stay() -> None:
    notices = Notices()
    assert notices.given() is None
    notices.give("first")
    notices.give("second", 200.0)
    notices.give("third", 100.0)
    notices.give("fourth", 300.0)
    notices.give("fifth")
    assert notices.given() == Notice("first", 100.0)
    notices.clear()
    assert notices.given() is None


def test_whoever_heeds_ends_with_the_reason() -> None:
    notices = Notices()
    notices.raise_if_given()
    notices.give("SIGTERM")
    with pytest.raises(NoticeError, match=r"SIGTERM.*same command") as caught:
        notices.raise_if_given()
    assert isinstance(caught.value, FqganError)
    assert exit_code_of(caught.value) == 75


def test_blocks_that_heed_may_lie_in_each_other() -> None:
    notices = Notices()
    with notices.heeded():
        with pytest.raises(ValueError, match="stop"), notices.heeded():
            raise ValueError("stop")
        assert notices.is_heeded
    assert not notices.is_heeded


class Source:
    """Gives notice when it is asked for the third time; or hangs."""

    interval_s = 0.001

    def __init__(self, hangs: threading.Event | None = None) -> None:
        self.num_questions = 0
        self.hangs = hangs

    def look(self) -> Notice | None:
        self.num_questions += 1
        if self.hangs is not None:
            self.hangs.wait()
        return Notice("the node ends", 5.0) if self.num_questions == 3 else None


def test_a_source_is_asked_until_it_gives_notice_whatever_the_others_do() -> None:
    notices, never = Notices(), threading.Event()
    source = Source()
    with watching([Source(hangs=never), source], notices):
        wait_until(lambda: notices.given() is not None)
    never.set()
    assert notices.given() == Notice("the node ends", 5.0)
    assert source.num_questions == 3


def test_nobody_is_asked_and_nothing_given_after_the_block() -> None:
    notices, answer = Notices(), threading.Event()
    source = Source(hangs=answer)
    source.num_questions = 2
    with watching([source], notices):
        wait_until(lambda: source.num_questions == 3)
        (thread,) = [each for each in threading.enumerate() if each.name == "notice"]
    answer.set()
    thread.join()
    assert notices.given() is None
