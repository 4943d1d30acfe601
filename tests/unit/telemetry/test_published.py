from __future__ import annotations

from pathlib import Path

import pytest

from fqgan_dist.storage.storage import Storage
from fqgan_dist.telemetry.json_lines import parse_records
from fqgan_dist.telemetry.published import PublishedFolder, PublishedRecords


class Bucket(Storage):
    """A storage whose files cannot be written in place, kept in a folder."""

    def local_path(self, path: str) -> Path | None:
        return None


@pytest.mark.parametrize("kind", [Storage, Bucket])
def test_records_last_after_a_flush_and_are_continued(kind: type[Storage], tmp_path: Path) -> None:
    storage, path = kind(tmp_path), "toy/ledger.jsonl"
    killed = PublishedRecords(storage, path)
    killed.open(0)
    for step in range(1, 4):
        killed.write({"step": step})
    killed.flush()
    resumed = PublishedRecords(storage, path)
    resumed.open(2)
    assert resumed.num_records == 2
    resumed.write({"step": 3, "again": True})
    resumed.flush()
    resumed.close()
    resumed.close()
    killed.close()
    records = parse_records(storage.read_bytes(path), name=path, kind="ledger")
    assert records == [{"step": 1}, {"step": 2}, {"step": 3, "again": True}]


def test_of_a_bucket_nothing_stays_on_the_local_disk(tmp_path: Path) -> None:
    records = PublishedRecords(Bucket(tmp_path), "toy/ledger.jsonl")
    local = records.open(0)
    records.write({"step": 1})
    assert local.exists()
    assert not (tmp_path / "toy").exists()  # a kill now loses what was not published
    records.flush()
    records.close()
    assert not local.parent.exists()
    assert (tmp_path / "toy" / "ledger.jsonl").read_text() == '{"step": 1}\n'


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
