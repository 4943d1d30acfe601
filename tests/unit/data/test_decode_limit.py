"""A decoder that goes astray ends its process, with an error that names the image."""

from __future__ import annotations

import io
import subprocess
import sys
import textwrap
from collections.abc import Iterator

import pytest
from PIL import Image
from support.loader_workers import AstrayLoad
from support.waiting import wait_until

from fqgan_dist.data import decode_limit, decoding, view_loading
from fqgan_dist.data.config import ViewConfig
from fqgan_dist.data.prefetch import load_in_processes
from fqgan_dist.errors import DataError
from fqgan_dist.waiting import WAITS

HANG = """
import threading, time
from fqgan_dist.data import decode_limit
decode_limit.LIMIT_S = 1
"""


def run(program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", HANG + textwrap.dedent(program)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_process_ends_and_names_the_image() -> None:
    result = run("""
        with decode_limit.limit_decoding("a.tar: sample 'x\\x1b[2J'"):
            time.sleep(60)
    """)
    assert result.returncode == 1
    assert result.stderr.startswith("error: a.tar: sample 'x")
    assert "still being decoded after 1 s" in result.stderr
    assert "\x1b" not in result.stderr
    assert result.stderr.count("\n") == 1


def test_image_of_another_thread_is_seen() -> None:
    result = run("""
        def decode():
            with decode_limit.limit_decoding("the other"):
                time.sleep(60)
        threading.Thread(target=decode).start()
        for _ in range(600):
            with decode_limit.limit_decoding("quick"):
                time.sleep(0.1)
    """)
    assert result.returncode == 1
    assert "the other: still" in result.stderr


def test_many_quick_images_are_no_slow_one() -> None:
    result = run("""
        for _ in range(30):
            with decode_limit.limit_decoding("quick"), decode_limit.limit_decoding("within"):
                time.sleep(0.1)
        print("done")
    """)
    assert (result.returncode, result.stdout, result.stderr) == (0, "done\n", "")


def test_forked_process_has_a_limit_of_its_own() -> None:
    result = run("""
        import os, sys
        with decode_limit.limit_decoding("before"):
            child = os.fork()
            if not child:
                with decode_limit.limit_decoding("in the child"):
                    time.sleep(60)
        sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) + 40)
    """)
    assert result.returncode == 41
    assert "in the child: still" in result.stderr


def test_loader_whose_worker_was_ended_names_the_image() -> None:
    loaded: Iterator[int] = load_in_processes(AstrayLoad, iter(range(99)), workers=2)
    assert [next(loaded) for _ in range(5)] == list(range(5))
    with pytest.raises(DataError, match="sample '5': still being decoded after 2 s"):
        next(loaded)


def test_both_modes_and_whole_images_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[str] = []
    limit = decode_limit.limit_decoding

    def note(name: str) -> object:
        begun.append(name)
        return limit(name)

    monkeypatch.setattr(decoding, "limit_decoding", note)
    monkeypatch.setattr(view_loading, "limit_decoding", note)
    file = io.BytesIO()
    Image.new("RGB", (90, 80)).save(file, "JPEG", progressive=True)
    data = file.getvalue()
    decoding.decode_image(data, name="whole")
    for mode in ("reference", "fast"):
        config = ViewConfig.model_validate({"policy": "center", "image_size": 64, "mode": mode})
        view_loading.load_view(data, config, seed=0, key="k", view=0, name=mode)
    assert begun == ["whole", "reference", "reference", "fast"]


def test_a_decoder_that_takes_long_is_known_to_be_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(decode_limit, "_SHOWN_S", 1)
    with decode_limit.limit_decoding("a.tar: sample 'x'"):
        wait_until(lambda: "the decoder of a.tar: sample 'x'" in WAITS.known())
    assert WAITS.known() == ""
