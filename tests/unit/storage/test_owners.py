"""Whether the process that a name tells of still lives."""

from __future__ import annotations

import multiprocessing
import os
import re

import pytest
from support.dead_owners import name_dead_owner, name_ended_process, name_foreign_owner

from fqgan_dist.storage import owners
from fqgan_dist.storage.owners import OWNER_PATTERN, is_owner_alive, name_owner


def test_this_process_lives() -> None:
    assert re.fullmatch(OWNER_PATTERN, name_owner())
    assert is_owner_alive(name_owner()) is True


def test_another_process_lives_until_it_ends() -> None:
    _, process_id, _ = name_owner().split("-")
    assert process_id == f"{os.getpid():x}"
    parent = os.getppid()
    name = f"{name_owner().split('-')[0]}-{parent:x}-{owners.read_start(parent) or 0:x}"
    assert is_owner_alive(name) is True
    assert is_owner_alive(name_ended_process()) is False


def test_an_id_that_was_given_again_is_another_process() -> None:
    assert is_owner_alive(name_dead_owner()) is False


def test_a_forked_process_has_a_name_of_its_own() -> None:
    here = name_owner()
    receive, send = multiprocessing.get_context("fork").Pipe()
    if (child := os.fork()) == 0:
        send.send(name_owner())
        os._exit(0)
    os.waitpid(child, 0)
    there = receive.recv()
    assert there != here
    assert is_owner_alive(there) is False


def test_nothing_is_known_of_another_host() -> None:
    assert is_owner_alive(name_foreign_owner()) is None


def test_a_start_that_is_hidden_is_no_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    dead = name_dead_owner()
    monkeypatch.setattr(owners, "read_start", lambda _: None)
    assert is_owner_alive(dead) is True


def test_other_names_are_refused() -> None:
    with pytest.raises(ValueError, match="no name of a process"):
        is_owner_alive("x")
