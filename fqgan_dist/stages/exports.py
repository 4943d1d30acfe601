"""The `exports` stage: samples as files for other tools: one `.npz`, PNG files, or WebDataset.

    samples/exports/<fingerprint>/
      samples.npz                    arr_0 (n, H, W, 3) uint8 and arr_1 (n,) int64 labels, by id
      png/NNNNNNNN.png               by id; the labels are in png/chunk-NNNNNN.csv
      webdataset/shard-NNNNNN.tar    <id>.cls and <id>.png

`samples.npz` is what ADM's evaluator takes. The images are those that the evaluation judges. One
chunk of samples is in memory at a time, and a killed export goes on at the chunk that it was at.
"""

from __future__ import annotations

import functools
import io
import logging
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from webdataset.writer import TarWriter

from fqgan_dist.chunks import RunChunks
from fqgan_dist.data.tensor_files import TensorFiles
from fqgan_dist.fingerprint import fingerprint
from fqgan_dist.stages.config import RunConfig
from fqgan_dist.stages.id_ranges import IdRanges
from fqgan_dist.stages.samples import Samples, sample_files
from fqgan_dist.stages.stage import RunContext, Stage, StageOutcome, StageOutput
from fqgan_dist.stages.tokenizer import TrainedTokenizer, decode_in_batches, load_tokenizer
from fqgan_dist.storage.disk_errors import clear_disk_errors
from fqgan_dist.storage.disk_waits import wait_for_disk
from fqgan_dist.storage.scratch import ScratchFolder
from fqgan_dist.tokenizer.model import FactorizedTokenizer

logger = logging.getLogger(__name__)

ExportFormat = Literal["npz", "png", "webdataset"]
NamedSample = tuple[str, NDArray[np.uint8], int]
"""Name, image (H, W, 3) and label."""

NPZ_NAME = "samples.npz"
_FOLDER = "samples/exports"
# The earliest that a zip can hold: equal samples give equal bytes.
_ZIP_TIME = (1980, 1, 1, 0, 0, 0)


class ExportedSamples(StageOutput):
    """The exported samples of a run."""

    stage = "exports"

    path: str
    """Where the files are, below the storage root."""


class ExportsStage(Stage):
    """Writes the images of the samples in the format that is asked for."""

    output = ExportedSamples
    inputs = (TrainedTokenizer, Samples)
    pool = "samples"
    records = "one_per_inputs"
    can_be_taken = False

    @classmethod
    def is_wanted(cls, config: RunConfig) -> bool:
        return config.samples.export != "none"

    def settings(self) -> Mapping[str, Any]:
        return {
            "format": self.context.config.samples.export,
            "batch_size": self.context.config.evaluation.batch_size,
        }

    def upstream(self) -> Mapping[str, Any]:
        return {
            "samples": self.context.read(Samples).fingerprint,
            "tokenizer": self.context.read(TrainedTokenizer).weights,
        }

    def has_output(self) -> bool:
        return bool(self.context.storage.list(_FOLDER))

    def run(self, run_chunks: RunChunks) -> StageOutcome:
        wanted = self.context.config.samples.export
        assert wanted != "none", "an export that is not wanted is not run"
        path = export_samples(self.context, sample_files(self.context), wanted, run_chunks)
        logger.info("samples as %s: %s", wanted, self.context.storage.uri(path))
        return StageOutcome(ExportedSamples(path=path))


def export_samples(
    context: RunContext, samples: TensorFiles, export_format: ExportFormat, run_chunks: RunChunks
) -> str:
    """Write all samples, codes and labels, in a format; what is there already is not made again.

    The tokenizer must have finished. Returns where the files are, below the storage root.
    """
    work = ExportWork(context, samples, export_format)
    if export_format != "npz":
        run_chunks(work)
        return work.folder
    path = f"{work.folder}/{NPZ_NAME}"
    if not context.storage.exists(path):
        run_chunks(work)
        if context.world.is_main:
            folder = tempfile.gettempdir()
            with clear_disk_errors(folder):
                wait_for_disk(folder, lambda: _join_npz(work, path))
    if context.world.is_main:
        for chunk in work.chunks():  # also those that a kill has left behind
            context.storage.delete(work.commit_path(chunk))
    return path


class ExportWork(IdRanges):
    """Decoding of samples to files; its chunks are the samples' chunks."""

    unit = "samples"

    def __init__(
        self, context: RunContext, samples: TensorFiles, export_format: ExportFormat
    ) -> None:
        super().__init__(context.config.samples.count, context.config.samples.chunk_size)
        self.context = context
        self.samples = samples
        self.format: ExportFormat = export_format
        self.description = f"exporting samples as {export_format}"
        identity = {
            "samples": samples.fingerprint,
            "tokenizer": context.read(TrainedTokenizer).weights,
            "batch_size": context.config.evaluation.batch_size,
        }
        exports = f"{_FOLDER}/{fingerprint(identity)}"
        self.folder = exports if export_format == "npz" else f"{exports}/{export_format}"

    def is_done(self, chunk: int) -> bool:
        return self.context.storage.exists(self.commit_path(chunk))

    def commit_path(self, chunk: int) -> str:
        """Name the file that is written last of a chunk."""
        match self.format:
            case "npz":
                return f"{self.folder}/parts/chunk-{chunk:06d}.npz"
            case "png":
                return f"{self.folder}/chunk-{chunk:06d}.csv"
            case "webdataset":
                return f"{self.folder}/shard-{chunk:06d}.tar"

    def process(self, chunk: int) -> None:
        images, labels = self._decode(chunk)
        names = [f"{sample:08d}" for sample in self.ids(chunk)]
        named = list(zip(names, images, labels.tolist(), strict=True))
        match self.format:
            case "npz":
                file = io.BytesIO()
                np.savez(file, images=images, labels=labels)
                data = file.getvalue()
            case "png":
                for name, image, _ in named:
                    path = f"{self.folder}/{name}.png"
                    self.context.storage.write_bytes(path, _encode_png(image))
                rows = "".join(f"{name}.png,{label}\n" for name, _, label in named)
                data = f"file,label\n{rows}".encode()
            case "webdataset":
                data = _pack_shard(named)
        self.context.storage.write_bytes(self.commit_path(chunk), data)

    def _decode(self, chunk: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """Give the images (n, H, W, 3) and labels (n,) of a chunk."""
        tensors = self.samples.read(chunk)
        batch_size = self.context.config.evaluation.batch_size
        codes = tensors["codes"].long()
        images = decode_in_batches(self._tokenizer, codes, self.context.device, batch_size)
        pixels = images.permute(0, 2, 3, 1).contiguous().numpy()
        return pixels, tensors["labels"].numpy()

    @functools.cached_property
    def _tokenizer(self) -> FactorizedTokenizer:
        return load_tokenizer(self.context)


def _join_npz(work: ExportWork, path: str) -> None:
    """Write the chunks as one `.npz`, with one chunk in memory at a time."""
    storage, config = work.context.storage, work.context.config
    count, side = config.samples.count, config.tokenizer.model.image_size
    labels: list[NDArray[np.int64]] = []
    with ScratchFolder("export") as folder:
        local = Path(folder) / NPZ_NAME
        with zipfile.ZipFile(local, "w") as archive:
            with archive.open(_npy_member("arr_0"), "w", force_zip64=True) as member:
                _write_npy_header(member, (count, side, side, 3), np.dtype(np.uint8))
                for chunk in work.chunks():
                    data = storage.read_bytes(work.commit_path(chunk))
                    with np.load(io.BytesIO(data), allow_pickle=False) as part:
                        member.write(part["images"].tobytes())
                        labels.append(part["labels"])
            with archive.open(_npy_member("arr_1"), "w") as member:
                _write_npy_header(member, (count,), np.dtype(np.int64))
                member.write(np.concatenate(labels).tobytes())
        storage.write_file(path, local)


def _npy_member(name: str) -> zipfile.ZipInfo:
    return zipfile.ZipInfo(f"{name}.npy", date_time=_ZIP_TIME)


def _write_npy_header(file: IO[bytes], shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    descr = np.lib.format.dtype_to_descr(dtype)
    header = {"descr": descr, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)


def _encode_png(image: NDArray[np.uint8]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


def _pack_shard(samples: Sequence[NamedSample]) -> bytes:
    # With fixed member metadata: equal samples give equal bytes.
    file = io.BytesIO()
    with TarWriter(
        file, user="", group="", mode=0o644, mtime=0, encoder=False, compress=False
    ) as writer:
        for name, image, label in samples:
            writer.write({"__key__": name, "cls": str(label).encode(), "png": _encode_png(image)})
    return file.getvalue()
