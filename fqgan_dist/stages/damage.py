"""What chunks of work found damaged: a note of each chunk that did, and a stage's ledger of all.

A chunk may be done by any process, or again after a kill, so nobody counts while it happens: its
note is written before its output is, and the ledger is made of all notes in the end.

    <stage>/damage/<fingerprint of the work>/chunk-NNNNNN.json
    <stage>/damaged_samples.jsonl
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence

from pydantic import ValidationError

from fqgan_dist.config import Config
from fqgan_dist.errors import DataError
from fqgan_dist.stages.stage import RunContext
from fqgan_dist.storage.documents import read_document
from fqgan_dist.storage.storage import Storage

logger = logging.getLogger(__name__)


class DamagedSample(Config):
    """A sample that is left out."""

    split: str
    """`train` or `val`."""
    shard: str
    """Its tar file."""
    key: str
    """Its key."""
    reason: str
    """What is wrong with it."""


class _Note(Config):
    """What one chunk found."""

    damaged: tuple[DamagedSample, ...]


class DamageNotes:
    """The notes of one piece of work."""

    def __init__(self, storage: Storage, stage: str, fingerprint: str) -> None:
        """Name the notes without touching them."""
        self._storage = storage
        self._folder = f"{stage}/damage/{fingerprint}"

    def write(self, chunk: int, damaged: Sequence[DamagedSample]) -> None:
        """Write a chunk's note, before its output; without damage there is none."""
        path = f"{self._folder}/{_name(chunk)}"
        if damaged:
            note = _Note(damaged=tuple(damaged)).model_dump_json(indent=1)
            self._storage.write_bytes(path, note.encode())
        else:
            # An attempt before this one may have been killed, and the shard copied again since.
            self._storage.delete(path)

    def read(self, chunks: Sequence[int]) -> list[DamagedSample]:
        """Read what chunks found, in their order.

        Raises:
            DataError: a note cannot be read.
        """
        names = set(self._storage.list(self._folder))
        found: list[DamagedSample] = []
        for chunk in chunks:
            if _name(chunk) in names:
                found += self._read(f"{self._folder}/{_name(chunk)}").damaged
        return found

    def _read(self, path: str) -> _Note:
        try:
            return _Note.model_validate_json(read_document(self._storage, path))
        except ValidationError as error:
            raise DataError(f"{self._storage.uri(path)}: not a note of damage ({error})") from error


def publish_damage(context: RunContext, stage: str, damaged: Sequence[DamagedSample]) -> int:
    """Write a stage's ledger and warn of it; return how many samples there are in it.

    A sample that several chunks found, as views of it, has one line: the first one's. The main rank
    writes.
    """
    path = f"{stage}/damaged_samples.jsonl"
    distinct: dict[tuple[str, str, str], DamagedSample] = {}
    for sample in damaged:
        distinct.setdefault((sample.split, sample.shard, sample.key), sample)
    if distinct:
        logger.warning("%s: %d damaged samples are left out, see %s", stage, len(distinct), path)
    if context.world.is_main:
        lines = "".join(f"{json.dumps(sample.model_dump())}\n" for sample in distinct.values())
        if lines:
            context.storage.write_bytes(path, lines.encode())
        else:
            context.storage.delete(path)
    return len(distinct)


def _name(chunk: int) -> str:
    return f"chunk-{chunk:06d}.json"
