"""Checkpoints as they were before their manifests had hashes of blocks."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from fqgan_dist.storage.storage import Storage
from fqgan_dist.training.checkpoint_format import checkpoint_folder
from fqgan_dist.training.commit_log import CommitLog, CommitRecord, canonical_json, seal, sha256_hex


def make_old(root: Path) -> None:
    """Rewrite the manifests of all checkpoints below a folder in format 1, and commit those."""
    log = CommitLog(Storage(root))
    for number in log.numbers():
        record = log.read(number)
        if not isinstance(record, CommitRecord):
            continue
        folder = root / checkpoint_folder(record.step, record.attempt)
        manifest = json.loads((folder / "manifest.json").read_bytes())
        manifest["format"] = 1
        for file in manifest["files"]:
            del file["blocks"]
            file["sha256"] = hashlib.sha256((folder / file["file"]).read_bytes()).hexdigest()
            for tensor in file["tensors"].values():
                del tensor["offset"]
        data = canonical_json(manifest)
        (folder / "manifest.json").write_bytes(data)
        committed = record.model_copy(update={"manifest_sha256": sha256_hex(data)})
        (root / f"commits/{number:010d}.json").write_bytes(seal(committed))
