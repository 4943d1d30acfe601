"""What loader workers tell the process that they work for: that they wait, and how to end them.

A worker waits for the storage in its own process, where nobody looks; so each leaves a note in a
folder that both know. A note that is not renewed says nothing: its worker is stopped or gone.
"""

from __future__ import annotations

import json
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fqgan_dist.activity import ACTIVITY, Helper
from fqgan_dist.stopped_processes import ProcessId, endable_process
from fqgan_dist.waiting import WAITS

_RENEWED_S = 2.0
_STALE_S = 10.0
_PREFIX = "helper-"


def leave_notes(folder: Path) -> None:
    """Tell of this process from now on, from a thread, and let it be ended."""
    threading.Thread(target=_write_notes, args=(folder,), name="notes", daemon=True).start()


def read_notes(folder: Path) -> Helper:
    """Read what the processes that leave notes in a folder tell now."""
    notes = [note for path in folder.glob(f"{_PREFIX}*.json") if (note := _read(path)) is not None]
    fresh = [note for note in notes if note["age_s"] < _STALE_S]
    return Helper(
        waiting=next((note["waiting"] for note in fresh if note["waiting"]), ""),
        still_s=min((note["still_s"] + note["age_s"] for note in fresh), default=None),
        processes=tuple(ProcessId(**note["process"]) for note in notes),
    )


def _write_notes(folder: Path) -> None:
    with endable_process() as process:
        path = folder / f"{_PREFIX}{process.pid}.json"
        while True:
            note = {
                "waiting": WAITS.known(),
                "still_s": ACTIVITY.storage_still_s,
                "process": asdict(process),
                "written_at": time.monotonic(),
            }
            part = path.with_suffix(".part")
            try:
                part.write_text(json.dumps(note), encoding="utf-8")
                part.replace(path)
            except FileNotFoundError:
                return  # the folder goes when the loader is closed
            time.sleep(_RENEWED_S)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        note: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    # The clock is one for all processes of a machine, and stands still where it sleeps.
    return note | {"age_s": time.monotonic() - note["written_at"]}
