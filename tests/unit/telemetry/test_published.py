from __future__ import annotations

from pathlib import Path

from fqgan_dist.storage.storage import Storage
from fqgan_dist.telemetry.published import PublishedFolder


class Bucket(Storage):
    """A storage whose files cannot be written in place, kept in a folder."""

    def local_path(self, path: str) -> Path | None:
        return None


def test_a_folder_is_published_with_all_below_it(tmp_path: Path) -> None:
    folder = PublishedFolder(Bucket(tmp_path), "toy/tracking")
    (folder.local / "deep").mkdir()
    (folder.local / "deep" / "events").write_bytes(b"1")
    (folder.local / "newest").symlink_to(folder.local / "deep")
    folder.publish()
    folder.close()
    published = [file for file in (tmp_path / "toy").rglob("*") if file.is_file()]
    assert published == [tmp_path / "toy" / "tracking" / "deep" / "events"]


def test_below_a_local_root_files_are_where_they_last(tmp_path: Path) -> None:
    folder = PublishedFolder(Storage(tmp_path), "toy/tracking")
    (folder.local / "events").write_bytes(b"1")
    folder.publish()
    folder.close()
    assert (tmp_path / "toy" / "tracking" / "events").read_bytes() == b"1"
