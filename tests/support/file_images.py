"""Files of a checkpoint, written outside of an attempt."""

from __future__ import annotations

from collections.abc import Sequence

from fqgan_dist.storage.storage import Storage
from fqgan_dist.training.checkpoint_files import FileImage
from fqgan_dist.training.checkpoint_format import FileRecord
from fqgan_dist.training.writer_process import WriterHere


def write_images(storage: Storage, folder: str, images: Sequence[FileImage]) -> list[FileRecord]:
    hashes = WriterHere().write(storage, folder, images)
    return [image.describe(hashes[image.name]) for image in images]
