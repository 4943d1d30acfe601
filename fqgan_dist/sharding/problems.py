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

from fqgan_dist.data.index import DatasetIndex, ProblemTable, SourceProblem, join_path
from fqgan_dist.errors import DataError
from fqgan_dist.storage.storage import Storage

NUM_INDEXED_PROBLEMS = 100
"""Problems that an index itself names."""

_NUM_LOGGED_PROBLEMS = 20

logger = logging.getLogger(__name__)


def write_problems(
    storage: Storage, prefix: str, stem: str, problems: Sequence[SourceProblem]
) -> ProblemTable | None:
    """Write the table of problems of one plan, and log the first of them.

    Args:
        storage: where the dataset is.
        prefix: its folder.
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
    path = join_path(prefix, file)
    try:
        storage.create_bytes(path, data)
    except FileExistsError as error:
        raise DataError(
            f"{storage.uri(path)}: the table of problems of another job is there; choose another "
            "destination, or delete it first"
        ) from error
    return ProblemTable(file=file, count=len(problems), sha256=hashlib.sha256(data).hexdigest())


def load_problems(storage: Storage, prefix: str, index: DatasetIndex) -> list[SourceProblem]:
    """Read all problems of a dataset, plan by plan.

    Raises:
        DataError: a table is missing or damaged.
    """
    if not index.problem_tables:
        return list(index.problems)
    return [
        problem
        for table in index.problem_tables
        for problem in _load_table(storage, join_path(prefix, table.file), table)
    ]


def _load_table(storage: Storage, path: str, table: ProblemTable) -> list[SourceProblem]:
    try:
        data = storage.read_bytes(path)
    except FileNotFoundError as error:
        raise DataError(f"{storage.uri(path)}: no such file; the index names it") from error
    found = hashlib.sha256(data).hexdigest()
    if found != table.sha256:
        raise DataError(
            f"{storage.uri(path)}: damaged: its sha256 is {found}, the index has {table.sha256}"
        )
    try:
        return [SourceProblem.model_validate_json(line) for line in data.splitlines()]
    except ValidationError as error:
        raise DataError(f"{storage.uri(path)}: not a table of problems: {error}") from error
