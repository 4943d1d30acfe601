"""Random trees and archives: what is brought is in the dataset with its label, or named."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.containers import CONTAINERS, Images, write_folder, write_manifest
from support.source_files import png

from fqgan_dist.data.dataset import Dataset
from fqgan_dist.data.index import SourceProblem, image_digest, load_samples
from fqgan_dist.errors import DataError
from fqgan_dist.sharding.building import build_dataset
from fqgan_dist.sharding.plan import ShardingConfig
from fqgan_dist.sharding.sources.opening import open_source
from fqgan_dist.storage.storage import Storage
from fqgan_dist.terminal import printable

_CLEAN = [
    "cat",
    "dog",
    "n01440764",
    "polar bear",
    "Å",
    "犬",
    "100%",
    "x:y",
    "a,b;c",
    "-dash",
    "n'q",
]
"""Names that every container takes as they are."""
_NUMBERS = ["0", "1", "2", "10"]
_ODD = [
    *[
        "__MACOSX",
        "@eaDir",
        ".ipynb_checkpoints",
        ".Trash-1000",
        "lost+found",
        "Thumbs.db",
        "a.idx",
    ],
    *["-1", "-1.0", "nan", "NaN", "null", "<NA>", "None", "007", "1.0", "1e5", "99999999999"],
    *[
        "a\\b",
        "a\nb",
        "\x1b[31mred",
        "a\tb",
        "\u202ebidi",
        "a\x7f",
        " ",
        "..",
        "~",
        "C:",
        "A\u030a",
    ],
]
_ANY_TEXT = st.text(
    st.characters(exclude_characters="/\0", exclude_categories=("Cs",)), min_size=1, max_size=8
).filter(lambda name: name != ".")
_CLASSES = st.sampled_from(_CLEAN + _NUMBERS) | st.sampled_from(_ODD) | _ANY_TEXT
_WHOLE = {png(color) for color in range(250)}
_DAMAGED = [b"", b"no image", png(1)[:40], b"\x89PNG\r\n\x1a\n", png(2)[:-20], b"\xff\xd8\xff"]
_IMAGES = st.lists(
    st.tuples(_CLASSES, st.sampled_from(sorted(_WHOLE)) | st.sampled_from(_DAMAGED)),
    min_size=1,
    max_size=12,
    unique_by=lambda image: image[1],  # so that each is found again by its bytes
)


def _read(dataset: Dataset) -> dict[bytes, str]:
    """Give the class of every sample by the digest of its image."""
    found = {}
    for entry in dataset.index.shards:
        table = load_samples(dataset.folder, entry)
        names = [dataset.index.classes[label] for label in table.labels.tolist()]
        found |= dict(zip(map(np.ndarray.tobytes, table.digests), names, strict=True))
    return found


def _is_outside(name: str, write: Callable[[Path, Images], Path]) -> bool:
    return name == ".." and write in (
        write_folder,
        write_manifest,
    )  # a disk's, not a name of a file


def _is_named(row: int, name: str, problems: list[SourceProblem]) -> bool:
    """Whether a problem is of a row of the images, or of the folder or tar of its class."""
    for problem in problems:
        first, _, last = problem.name.partition("/")
        number = re.search(r"([0-9]+)(\.[a-z]+)?$", last or first) or re.match(
            "row ([0-9]+)", first
        )
        if first.removesuffix(".tar") == printable(name) or (number and int(number[1]) == row):
            return True
    return False


def _is_same_class(found: str, given: str) -> bool:
    found, given = found.strip(), given.strip()
    return found == given or (given.replace(".", "").isdecimal() and float(found) == float(given))


@pytest.mark.parametrize("write", CONTAINERS.values(), ids=CONTAINERS)
@settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow])
@given(images=_IMAGES)
def test_every_image_is_in_the_dataset_with_its_label_or_named(
    write: Callable[[Path, Images], Path], images: Images
) -> None:
    has_clean = any(name in _CLEAN + _NUMBERS and data in _WHOLE for name, data in images)
    with tempfile.TemporaryDirectory() as folder:
        source = write(Path(folder) / "x", images)
        made = Storage(f"{folder}/made")
        try:
            with open_source(str(source)) as listing:
                _, report = build_dataset(listing, made, ShardingConfig(name="x", split="train"))
        except DataError:
            assert not has_clean  # else some of it is usable
            return
        classes = _read(Dataset.open(made))
    problems = report.problems
    for row, (name, data) in enumerate(images):
        found = classes.pop(image_digest(data), None)
        if found is None:
            assert name not in _CLEAN + _NUMBERS or data not in _WHOLE
            assert _is_outside(name, write) or _is_named(row, name, problems), (row, name)
        else:
            assert _is_same_class(found, name)
    assert not classes
