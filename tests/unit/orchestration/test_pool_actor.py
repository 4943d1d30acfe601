"""Exceptions on their way from an actor to the driver."""

from __future__ import annotations

import pickle

import pytest
import torch
from support.pool_work import UnpicklableError

from fqgan_dist.errors import DataError
from fqgan_dist.orchestration.pool_actor import Failure


def catch(error: Exception) -> Failure:
    """What an actor answers when its work raises."""
    try:
        raise error
    except Exception as raised:  # noqa: BLE001  as in the actor
        return pickle.loads(pickle.dumps(Failure.of(raised)))


class UnrestorableError(ValueError):
    """Pickles, but cannot be made from what was pickled."""

    def __init__(self, name: str, size: int) -> None:
        super().__init__(f"{name} has {size}")


def test_error_comes_back_as_it_was() -> None:
    error = catch(DataError("a.tar: damaged")).restore()
    assert type(error) is DataError
    assert str(error) == "a.tar: damaged"


def test_error_that_cannot_be_pickled_comes_back_as_the_nearest_of_ours() -> None:
    error = catch(UnpicklableError("a.tar", 3)).restore()
    assert type(error) is DataError
    assert str(error) == "a.tar: line 3 is wrong"


def test_error_that_cannot_be_restored_comes_back_with_its_name_and_text() -> None:
    error = catch(UnrestorableError("a.tar", 3)).restore()
    assert type(error) is RuntimeError
    assert str(error) == "UnrestorableError: a.tar has 3"


def test_traceback_and_causes_are_kept() -> None:
    cause = KeyError("sample")
    error = DataError("a.tar: no sample")
    error.__cause__ = cause
    failure = catch(error)
    assert "KeyError: 'sample'" in failure.traceback_text
    assert "in catch" in failure.traceback_text


@pytest.mark.parametrize(
    ("error", "is_of_process"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (DataError("a.tar: damaged"), False),
        (TypeError("a mistake"), False),
    ],
)
def test_only_errors_of_the_process_are_tried_again(error: Exception, is_of_process: bool) -> None:
    assert catch(error).is_of_process is is_of_process
