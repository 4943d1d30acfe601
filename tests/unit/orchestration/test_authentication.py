"""A Ray that a run starts for itself wants a token; what the user has set stays."""

from __future__ import annotations

import logging
import os
import sys

import pytest

from fqgan_dist.orchestration.authentication import (
    MODE_VARIABLE,
    TOKEN_PATH_VARIABLE,
    TOKEN_VARIABLE,
    require_token,
)


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (MODE_VARIABLE, TOKEN_VARIABLE, TOKEN_PATH_VARIABLE):
        monkeypatch.setenv(name, "")  # so that what the test sets is taken away after it
        monkeypatch.delenv(name)
    monkeypatch.delitem(sys.modules, "ray", raising=False)


def test_a_token_is_drawn_for_every_run() -> None:
    require_token()
    assert os.environ[MODE_VARIABLE] == "token"
    first = os.environ.pop(TOKEN_VARIABLE)
    del os.environ[MODE_VARIABLE]
    require_token()
    assert len(first) == 64
    assert os.environ[TOKEN_VARIABLE] != first


def test_the_user_s_mode_and_token_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(MODE_VARIABLE, "disabled")
    require_token()
    assert os.environ[MODE_VARIABLE] == "disabled"
    assert TOKEN_VARIABLE not in os.environ


def test_the_user_s_token_file_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOKEN_PATH_VARIABLE, "somewhere")
    require_token()
    assert os.environ[MODE_VARIABLE] == "token"
    assert TOKEN_VARIABLE not in os.environ


def test_ray_that_was_imported_before_is_warned_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "ray", sys)
    with caplog.at_level(logging.WARNING):
        require_token()
    assert "without a token" in caplog.text
    assert MODE_VARIABLE not in os.environ
