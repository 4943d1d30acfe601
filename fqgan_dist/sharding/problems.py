"""What was left out of a dataset: the first few in its index, all in a table beside it.

The index is read by every process of every run, and a source may hold 100,000 files that are no
images.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence

from pydantic import ValidationError

from fqgan_dist.data.dataset import Dataset
from fqgan_dist.data.index import ProblemTable, SourceProblem
from fqgan_dist.errors import DataError
from fqgan_dist.storage.storage import Storage

NUM_INDEXED_PROBLEMS = 100
"""Problems that an index itself names."""

_NUM_LOGGED_PROBLEMS = 20
_MAX_TABLE_BYTES = 2**30
_SHOWN_KINDS = 3
_MAX_PROBLEMS = 300_000
_MAX_PROBLEMS_PER_IMAGE = 4  # a text, a label and other companions of each

logger = logging.getLogger(__name__)


def check_problem_count(source: str, num_problems: int, num_images: int, *, latest: str) -> None:
    """Stop where a source holds hardly anything but what is no image.

    A tar of 5 MB unpacks to a million empty members, and each is named.

    Args:
        source: the source.
        num_problems: its members, so far, that are no usable images.
        num_images: those that are.
        latest: the problem that was found last.

    Raises:
        DataError: there are more problems than any source of so many images has.
    """
    if num_problems > _MAX_PROBLEMS + _MAX_PROBLEMS_PER_IMAGE * num_images:
        raise DataError(
            f"{source}: {num_problems} members that are no usable images beside {num_images} that "
            f"are (the last: {latest}); name the folder that holds the images, or remove the others"
        )


def find_kinds(problems: Sequence[SourceProblem]) -> list[SourceProblem]:
    """Give the first problem of each of a few kinds, and of one more if there are more."""
    kinds: dict[str, SourceProblem] = {}
    for problem in problems:
        kinds.setdefault(problem.reason, problem)
        if len(kinds) > _SHOWN_KINDS:
            break
    return list(kinds.values())


def describe_kinds(problems: Sequence[SourceProblem]) -> str:
    """Name the first problem of each of a few kinds, for an error where nothing can be used."""
    kinds = find_kinds(problems)
    shown = [f"{problem.name!r}: {problem.reason}" for problem in kinds[:_SHOWN_KINDS]]
    return "; ".join(shown) + (" ..." if len(kinds) > _SHOWN_KINDS else "")


def write_problems(
    folder: Storage, stem: str, problems: Sequence[SourceProblem]
) -> ProblemTable | None:
    """Write the table of problems of one plan, and log the first of them.

    Args:
        folder: of the dataset.
        stem: name of the plan's files without their endings.
        problems: what was left out, sorted.

    Returns:
        What the index tells of the table; None where there is no problem, and no table.

    Raises:
        DataError: another table is there.
    """
    if not problems:
        return None
    file = f"{stem}.problems.jsonl"
    for problem in problems[:_NUM_LOGGED_PROBLEMS]:
        logger.warning("%s: %s: %s", problem.name, problem.action, problem.reason)
    if len(problems) > _NUM_LOGGED_PROBLEMS:
        logger.warning("... and %d more; all are in %s", len(problems) - _NUM_LOGGED_PROBLEMS, file)
    data = "".join(
        json.dumps(problem.model_dump(), ensure_ascii=False) + "\n" for problem in problems
    ).encode()
    try:
        folder.create_bytes(file, data)
    except FileExistsError as error:
        raise DataError(
            f"{folder.uri(file)}: the table of problems of another job is there; choose another "
            "destination, or delete it first"
        ) from error
    return ProblemTable(file=file, count=len(problems), sha256=hashlib.sha256(data).hexdigest())


def load_problems(dataset: Dataset) -> list[SourceProblem]:
    """Read all problems of a dataset, plan by plan.

    Raises:
        DataError: a table is missing or damaged.
    """
    index = dataset.index
    if not index.problem_tables:
        return list(index.problems)
    tables = (_load_table(dataset.folder, table) for table in index.problem_tables)
    return [problem for table in tables for problem in table]


def _load_table(folder: Storage, table: ProblemTable) -> list[SourceProblem]:
    uri = folder.uri(table.file)
    try:
        data = folder.read_limited(table.file, _MAX_TABLE_BYTES)
    except FileNotFoundError as error:
        raise DataError(f"{uri}: no such file; the index names it") from error
    found = hashlib.sha256(data).hexdigest()
    if found != table.sha256:
        raise DataError(f"{uri}: damaged: its sha256 is {found}, the index has {table.sha256}")
    try:
        return [SourceProblem.model_validate_json(line) for line in data.splitlines()]
    except ValidationError as error:
        raise DataError(f"{uri}: not a table of problems: {error}") from error
