"""Tensors to safetensors files and back, with one host copy and no pickle.

A save copies each tensor straight into the image of the file that it will be in. The
images are kept from save to save, so a save costs no allocation, and no byte is copied twice. The
layout is safetensors' own (8 bytes of header length, JSON header, data in the header's order); any
safetensors reader opens the files, and this module reads them with the library.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from fqgan_dist.errors import CheckpointError
from fqgan_dist.storage.hashing import hash_object
from fqgan_dist.storage.links import RefusedObjectError
from fqgan_dist.storage.storage import Storage
from fqgan_dist.training.checkpoint_format import FileRecord, TensorRecord, part_file_name
from fqgan_dist.weights.files import parse_safetensors

_DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_DTYPES = {name: dtype for dtype, name in _DTYPE_NAMES.items()}
# Data per file, unless one tensor is larger: bounds memory in transfer, lets transfers overlap.
_MAX_FILE_BYTES = 128 * 2**20
# Files in transfer at once; one S3 connection carries about 90 MB/s (performance.md section 8).
_TRANSFER_THREADS = 4


@dataclass(frozen=True)
class Fragment:
    """A contiguous piece of a flattened tensor, which a ZeRO partition boundary cut.

    `tensor` (n,) begins at index `start` of the flattened whole tensor, whose shape is `shape`.
    """

    tensor: Tensor
    start: int
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        size = torch.Size(self.shape).numel()
        if self.tensor.ndim != 1 or not 0 <= self.start <= size - self.tensor.numel():
            raise ValueError(
                f"fragment of shape {tuple(self.tensor.shape)} at {self.start}: expected a flat "
                f"piece inside the {size} elements of {self.shape}"
            )


PartTensors = Mapping[str, "Tensor | Fragment"]
"""What a rank owns of a part, by tensor name."""


class FileImage:
    """A safetensors file in host memory, made once and refilled at every save."""

    def __init__(self, name: str, part: str, contents: PartTensors) -> None:
        """Lay out the file and allocate it, pinned when a tensor comes from a GPU."""
        self.name = name
        self.part = part
        self.records = {key: _describe(key, value) for key, value in contents.items()}
        header, offsets = _layout(self.records)
        size = len(header) + sum(_num_bytes(record) for record in self.records.values())
        is_pinned = any(_tensor(value).is_cuda for value in contents.values())
        self._buffer = torch.empty(size, dtype=torch.uint8, pin_memory=is_pinned)
        self._buffer[: len(header)] = torch.frombuffer(bytearray(header), dtype=torch.uint8)
        self._views = {
            key: self._buffer[offset : offset + _num_bytes(self.records[key])].view(
                _DTYPES[self.records[key].dtype]
            )
            for key, offset in offsets.items()
        }

    def fill(self, contents: PartTensors) -> None:
        """Start copying tensors into the file; copies from a GPU run on its current stream."""
        for key, view in self._views.items():
            source = _tensor(contents[key]).detach()
            view.view(source.shape).copy_(source, non_blocking=True)

    def write(self, storage: Storage, folder: str) -> FileRecord:
        data = self._buffer.numpy().data
        digest = hashlib.sha256(data).hexdigest()
        storage.write_bytes(f"{folder}/{self.name}", data)
        return FileRecord(
            file=self.name, part=self.part, bytes=len(data), sha256=digest, tensors=self.records
        )


class HostStaging:
    """The file images of one rank, reused while names, shapes and dtypes stay the same."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._images: dict[str, FileImage] = {}

    def copy(self, parts: Mapping[str, PartTensors]) -> list[FileImage]:
        """Copy all tensors to the host and wait for the copies; nothing else stalls training.

        Raises:
            ValueError: a dtype that cannot be stored.
        """
        images = []
        for part, tensors in parts.items():
            for index, names in enumerate(_split(tensors)):
                contents = {name: tensors[name] for name in names}
                image = self._image(part_file_name(part, self._rank, index), part, contents)
                image.fill(contents)
                images.append(image)
        self._images = {image.name: image for image in images}
        sources = [_tensor(value) for tensors in parts.values() for value in tensors.values()]
        for device in {source.device for source in sources if source.is_cuda}:
            torch.cuda.current_stream(device).synchronize()
        return images

    def _image(self, name: str, part: str, contents: PartTensors) -> FileImage:
        image = self._images.get(name)
        records = {key: _describe(key, value) for key, value in contents.items()}
        if image is None or image.records != records:
            image = FileImage(name, part, contents)
        return image


def write_images(storage: Storage, folder: str, images: Sequence[FileImage]) -> list[FileRecord]:
    """Write files side by side; the first error ends it."""
    with ThreadPoolExecutor(_TRANSFER_THREADS, "checkpoint-transfer") as executor:
        return list(executor.map(lambda image: image.write(storage, folder), images))


def find_damage(storage: Storage, folder: str, files: Sequence[FileRecord]) -> list[str]:
    """Compare files with their recorded size and sha256; return one line per damaged file."""
    with ThreadPoolExecutor(_TRANSFER_THREADS, "checkpoint-verify") as executor:
        found = executor.map(lambda file: _find_file_damage(storage, folder, file), files)
        return [problem for problem in found if problem]


def read_tensors(
    storage: Storage, folder: str, files: Sequence[FileRecord], names: Collection[str] | None
) -> dict[str, Tensor]:
    """Read tensors of one part on the CPU, merging what ranks wrote; only files that hold them.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    wanted = [file for file in files if names is None or not file.tensors.keys().isdisjoint(names)]
    merged: dict[str, Tensor] = {}
    with ThreadPoolExecutor(_TRANSFER_THREADS, "checkpoint-read") as executor:
        loaded = executor.map(lambda file: _read_file(storage, folder, file), wanted)
        for file, tensors in zip(wanted, loaded, strict=True):
            for name, record in file.tensors.items():
                if names is None or name in names:
                    _merge(merged, name, record, tensors[name])
    return {name: tensor.view(_shape(name, files)) for name, tensor in merged.items()}


def _merge(merged: dict[str, Tensor], name: str, record: TensorRecord, tensor: Tensor) -> None:
    if record.start is None:
        merged[name] = tensor
        return
    if name not in merged:
        merged[name] = torch.empty(torch.Size(record.shape).numel(), dtype=tensor.dtype)
    merged[name][record.start : record.start + record.count] = tensor


def _shape(name: str, files: Sequence[FileRecord]) -> list[int]:
    return next(file.tensors[name].shape for file in files if name in file.tensors)


def _read_file(storage: Storage, folder: str, file: FileRecord) -> dict[str, Tensor]:
    path = f"{folder}/{file.file}"
    where = storage.uri(path)
    try:
        data = storage.read_limited(path, file.bytes)
    except FileNotFoundError as error:
        raise CheckpointError(f"{where}: missing; fall back to an older checkpoint") from error
    except RefusedObjectError as error:
        raise CheckpointError(f"{error}; fall back to an older checkpoint") from error
    problem = _compare(file, len(data), hashlib.sha256(data).hexdigest())
    if problem:
        raise CheckpointError(f"{where}: {problem}; fall back to an older checkpoint")
    try:
        tensors = parse_safetensors(data)
    except ValueError as error:
        raise CheckpointError(f"{where}: not a safetensors file: {error}") from error
    expected = {name: (_DTYPES.get(r.dtype), _stored_shape(r)) for name, r in file.tensors.items()}
    if {name: (tensor.dtype, list(tensor.shape)) for name, tensor in tensors.items()} != expected:
        raise CheckpointError(f"{where}: holds other tensors than its manifest says")
    return tensors


def _find_file_damage(storage: Storage, folder: str, file: FileRecord) -> str | None:
    path = f"{folder}/{file.file}"
    try:
        digest, size = hash_object(storage, path, max_bytes=file.bytes)
    except FileNotFoundError:
        return f"{storage.uri(path)}: missing"
    except RefusedObjectError as error:
        return str(error)
    problem = _compare(file, size, digest)
    return f"{storage.uri(path)}: {problem}" if problem else None


def _compare(file: FileRecord, size: int, digest: str) -> str | None:
    if size != file.bytes:
        return f"damaged, {size} bytes where the manifest says {file.bytes}"
    return None if digest == file.sha256 else "damaged, its sha256 is not the manifest's"


def _split(tensors: PartTensors) -> Iterator[list[str]]:
    """Group names into files of bounded size, in a fixed order."""
    group: list[str] = []
    size = 0
    for name, value in tensors.items():
        tensor = _tensor(value)
        num_bytes = tensor.numel() * tensor.element_size()
        if group and size + num_bytes > _MAX_FILE_BYTES:
            yield group
            group, size = [], 0
        group.append(name)
        size += num_bytes
    if group:
        yield group


def _layout(records: Mapping[str, TensorRecord]) -> tuple[bytes, dict[str, int]]:
    """Make a file's header and the offset of each tensor in the file."""
    # Widest elements first, as the library does, so that every tensor is aligned for its dtype.
    names = sorted(records, key=lambda name: (-_DTYPES[records[name].dtype].itemsize, name))
    entries: dict[str, dict[str, object]] = {}
    starts: dict[str, int] = {}
    position = 0
    for name in names:
        record = records[name]
        starts[name] = position
        position += _num_bytes(record)
        shape = _stored_shape(record)
        offsets = [starts[name], position]
        entries[name] = {"dtype": record.dtype, "shape": shape, "data_offsets": offsets}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    return header, {name: len(header) + start for name, start in starts.items()}


def _stored_shape(record: TensorRecord) -> list[int]:
    return record.shape if record.start is None else [record.count]


def _num_bytes(record: TensorRecord) -> int:
    return record.count * _DTYPES[record.dtype].itemsize


def _tensor(value: Tensor | Fragment) -> Tensor:
    return value.tensor if isinstance(value, Fragment) else value


def _describe(name: str, value: Tensor | Fragment) -> TensorRecord:
    tensor = _tensor(value)
    if tensor.dtype not in _DTYPE_NAMES:
        raise ValueError(
            f"tensor {name!r}: dtype {tensor.dtype} cannot be stored; "
            f"expected one of {', '.join(_DTYPE_NAMES.values())}"
        )
    is_fragment = isinstance(value, Fragment)
    return TensorRecord(
        dtype=_DTYPE_NAMES[tensor.dtype],
        shape=list(value.shape),
        start=value.start if is_fragment else None,
        count=tensor.numel(),
    )
