"""Small images and archives, as sources of datasets."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path

from PIL import Image

Member = tuple[tarfile.TarInfo | str, bytes]

_MODES = {".tar": "w", ".gz": "w:gz", ".tgz": "w:gz", ".bz2": "w:bz2", ".xz": "w:xz"}


def png(color: int = 0) -> bytes:
    """Make an image of 20x10 pixels whose bytes differ by colour."""
    file = io.BytesIO()
    Image.new("RGB", (20, 10), (color, 0, 0)).save(file, "PNG")
    return file.getvalue()


def tar_bytes(members: Iterable[Member], *, mode: str = "w") -> bytes:
    """Pack members as a tar."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode) as tar:
        for member, data in members:
            info = tarfile.TarInfo(member) if isinstance(member, str) else member
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


def write_tar(path: Path, members: Iterable[Member]) -> Path:
    """Write a tar, compressed as its name says."""
    path.write_bytes(tar_bytes(members, mode=_MODES[path.suffix]))
    return path


def special_member(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    """Make the header of a link, device or pipe."""
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def write_files(folder: Path, files: Iterable[tuple[str, bytes]]) -> Path:
    """Write files below a folder."""
    for name, data in files:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder
