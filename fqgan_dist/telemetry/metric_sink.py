"""What takes a training's metrics, and what it is told of the run."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

from fqgan_dist.storage.storage import Storage
from fqgan_dist.telemetry.sessions import Session


class MetricSink(Protocol):
    """Takes the metrics of one training; one process opens it."""

    def open(self, session: Session) -> None:
        """Begin, or continue the history of former sessions up to `session.resumed_step`."""
        ...

    def write(self, step: int, numbers: Mapping[str, float], *, images_seen: int) -> None:
        """Take one record; steps may repeat (training and validation) but not decrease.

        Numbers, by `<stage>/<group>/<name>`, may be not finite.
        """
        ...

    def flush(self) -> None:
        """Bring what was written to where it lasts; called before every checkpoint."""
        ...

    def close(self) -> None:
        """End the session; called once, however training ended."""
        ...


@dataclass(frozen=True, kw_only=True)
class TrackedRun:
    """The training whose metrics a sink takes."""

    storage: Storage
    stage: str
    """The stage that trains; its folder in the storage, too."""
    name: str
    """Name of the run, for people."""

    @property
    def folder(self) -> str:
        """Where in the storage sinks may keep what they need."""
        return f"{self.stage}/tracking"

    def load_id(self) -> str:
        """Return the id of this training in every session, made in the first that asks."""
        path = f"{self.folder}/id"
        with suppress(FileExistsError):
            self.storage.create_bytes(path, uuid.uuid4().hex.encode())
        return self.storage.read_bytes(path).decode()
