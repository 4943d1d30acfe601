"""SIGTERM ends commands like Ctrl-C: a line, an exit code, and the same command continues."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.source_files import png, write_files
from support.waiting import wait_until

from fqgan_dist import termination
from fqgan_dist.errors import NoticeError
from fqgan_dist.notice import NOTICES
from fqgan_dist.storage.storage import Storage
from fqgan_dist.termination import TerminatedError, clean_termination
from fqgan_dist.training.checkpoint import CheckpointStore

TINY = Path(__file__).parents[1] / "support" / "tiny.yaml"


def terminate_when(is_under_way: Callable[[], bool], *command: str) -> tuple[int, str, float]:
    """Give exit code, output, and the seconds that the end took."""
    process = subprocess.Popen(
        [sys.executable, *command],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        wait_until(lambda: is_under_way() or process.poll() is not None)
        sent = time.monotonic()
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=60)
        return process.returncode, said, time.monotonic() - sent
    finally:
        process.kill()


def check_clean(code: int, said: str) -> None:
    assert code == 143, said
    assert said.rstrip().endswith("terminated; the same command continues")
    assert "Traceback" not in said
    assert "SIGTERM received" not in said


def check_saved(root: Path) -> None:
    """Check that the last step that the training did is committed."""
    (records,) = (root / "tokenizer" / "sessions").glob("*/metrics.jsonl")
    last_step = json.loads(records.read_text().splitlines()[-1])["step"]
    loaded = CheckpointStore(Storage(root), "tokenizer/checkpoints").load_latest()
    assert loaded is not None
    assert loaded.step == last_step


@pytest.mark.full("trains; distributed/test_training_run.py does the same")
def test_a_training_is_terminated(tmp_path: Path) -> None:
    root = tmp_path / "run"
    command = ("-m", "fqgan_dist.cli", "run", str(TINY), f"storage.root={root}")
    more = ("stages=[shards, teachers, tokenizer]", "tokenizer.training.steps=100000")
    code, said, _ = terminate_when(
        (root / "tokenizer/checkpoints/commits/0000000002.json").exists, *command, *more
    )
    check_clean(code, said)
    check_saved(root)


def test_a_dataset_in_the_making_is_terminated(tmp_path: Path) -> None:
    write_files(tmp_path / "src", [(f"a/{color}.png", png(color % 256)) for color in range(2000)])
    source, target = tmp_path / "src", tmp_path / "dst"
    command = ("-m", "data_tools.cli", "shard", str(source), str(target), "name=x", "split=train")
    code, said, _ = terminate_when(
        lambda: target.exists() and any(target.rglob("*.tar")),
        *command,
        "samples_per_shard=20",
        "workers=2",
    )
    check_clean(code, said)


def test_what_was_installed_before_comes_back() -> None:
    seen: list[int] = []
    former = signal.signal(signal.SIGTERM, lambda number, _: seen.append(number))
    try:
        with clean_termination(), clean_termination():
            pass
        os.kill(os.getpid(), signal.SIGTERM)
        assert seen == [signal.SIGTERM]
        with pytest.raises(TerminatedError), clean_termination():
            os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)  # ignored from here on
    finally:
        signal.signal(signal.SIGTERM, former)


@pytest.fixture
def handlers() -> Iterator[None]:
    """Bring back what handled signals before the test, whatever it leaves."""
    formers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    # Tests that run in the background of a shell inherit an ignored SIGINT.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, former in formers.items():
        signal.signal(number, former)
    NOTICES.clear()


def wait_for_the_end() -> None:
    wait_until(lambda: False)  # a signal ends it


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize(
    ("number", "error", "name"),
    [(signal.SIGTERM, TerminatedError, "SIGTERM"), (signal.SIGINT, KeyboardInterrupt, "Ctrl-C")],
)
def test_what_heeds_notice_ends_by_itself(
    number: signal.Signals, error: type[BaseException], name: str
) -> None:
    with pytest.raises(error) as caught, clean_termination(), NOTICES.heeded():  # noqa: PT012
        os.kill(os.getpid(), number)
        notice = NOTICES.given()
        assert notice is not None
        assert notice.reason == name
        assert notice.deadline_s is not None
        NOTICES.raise_if_given()
    assert type(caught.value) is error
    if number == signal.SIGTERM:
        os.kill(os.getpid(), number)  # what cleans up is let be
    assert isinstance(caught.value.__cause__, NoticeError)
    assert NOTICES.given() is None


@pytest.mark.usefixtures("handlers")
def test_notice_of_others_stays_what_it_is() -> None:
    with pytest.raises(NoticeError), clean_termination(), NOTICES.heeded():  # noqa: PT012
        NOTICES.give("the node ends")
        NOTICES.raise_if_given()


@pytest.mark.usefixtures("handlers")
def test_signals_at_once_are_one_and_a_later_one_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TerminatedError), clean_termination(), NOTICES.heeded():  # noqa: PT012
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
            os.kill(os.getpid(), number)
        monkeypatch.setattr(termination, "_ECHO_S", 0.0)
        os.kill(os.getpid(), signal.SIGTERM)
        wait_for_the_end()


@pytest.mark.usefixtures("handlers")
def test_grace_has_an_end() -> None:
    with pytest.raises(TerminatedError), clean_termination(0.01), NOTICES.heeded():  # noqa: PT012
        os.kill(os.getpid(), signal.SIGTERM)
        wait_for_the_end()


@pytest.mark.usefixtures("handlers")
def test_without_grace_everything_ends_at_once() -> None:
    with pytest.raises(TerminatedError), clean_termination(0.0), NOTICES.heeded():
        os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.usefixtures("handlers")
def test_what_heeds_nothing_is_interrupted_at_once() -> None:
    with pytest.raises(KeyboardInterrupt) as caught, clean_termination():
        os.kill(os.getpid(), signal.SIGINT)
    assert type(caught.value) is KeyboardInterrupt


@pytest.mark.usefixtures("handlers")
def test_a_command_in_the_background_goes_on_ignoring_ctrl_c() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with clean_termination():
        os.kill(os.getpid(), signal.SIGINT)


def test_other_threads_leave_signals_alone() -> None:
    def use() -> None:
        with clean_termination():
            pass

    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
