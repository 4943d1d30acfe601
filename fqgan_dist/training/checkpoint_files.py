"""Tensors to safetensors files, with one host copy and no pickle.

A save copies each tensor straight into the image of the file that it will be in. The
images are kept from save to save, so a save costs no allocation, and no byte is copied twice. The
layout is safetensors' own (8 bytes of header length, JSON header, data in the header's order); any
safetensors reader opens the files. They are read in checkpoint_reading.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from fqgan_dist.training.checkpoint_format import (
    BlockHashes,
    FileRecord,
    TensorRecord,
    part_file_name,
)
from fqgan_dist.training.host_memory import HostMemory

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
DTYPES = {name: dtype for dtype, name in _DTYPE_NAMES.items()}
"""By their names in a file."""
# Data per file, unless one tensor is larger: bounds memory in transfer, lets transfers overlap.
_MAX_FILE_BYTES = 128 * 2**20
_ALIGNMENT = 64
# Two cores copy twice as fast as one, and more hardly faster: memory is the limit.
_COPY_THREADS = 2


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
        header, self._offsets = _layout(self.records)
        size = len(header) + sum(num_bytes_of(record) for record in self.records.values())
        is_pinned = any(_tensor(value).is_cuda for value in contents.values())
        self.memory = HostMemory(size, is_pinned=is_pinned)
        buffer = self.memory.tensor
        buffer[: len(header)] = torch.frombuffer(bytearray(header), dtype=torch.uint8)
        self._views = {
            key: buffer[offset : offset + num_bytes_of(self.records[key])].view(
                DTYPES[self.records[key].dtype]
            )
            for key, offset in self._offsets.items()
        }

    def fill(self, contents: PartTensors) -> None:
        """Start copying tensors into the file; copies from a GPU run on its current stream."""
        for key, view in self._views.items():
            source = _tensor(contents[key]).detach()
            view.view(source.shape).copy_(source, non_blocking=True)

    def describe(self, blocks: BlockHashes) -> FileRecord:
        """Describe the file, given what its bytes hash to."""
        return FileRecord(
            file=self.name,
            part=self.part,
            bytes=len(self.memory.view),
            sha256=blocks.root(),
            blocks=blocks,
            tensors={
                key: record.model_copy(update={"offset": self._offsets[key]})
                for key, record in self.records.items()
            },
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
        filled: list[tuple[FileImage, PartTensors]] = []
        for part, tensors in parts.items():
            for index, names in enumerate(_split(tensors)):
                contents = {name: tensors[name] for name in names}
                image = self._image(part_file_name(part, self._rank, index), part, contents)
                filled.append((image, contents))
        images = [image for image, _ in filled]
        self._images = {image.name: image for image in images}
        sources = [_tensor(value) for tensors in parts.values() for value in tensors.values()]
        devices = {source.device for source in sources if source.is_cuda}
        if devices:
            for image, contents in filled:  # a stream is its thread's
                image.fill(contents)
            for device in devices:
                torch.cuda.current_stream(device).synchronize()
        else:
            with ThreadPoolExecutor(_COPY_THREADS, "checkpoint-copy") as executor:
                list(executor.map(lambda each: each[0].fill(each[1]), filled))
        return images

    def _image(self, name: str, part: str, contents: PartTensors) -> FileImage:
        image = self._images.get(name)
        records = {key: _describe(key, value) for key, value in contents.items()}
        if image is None or image.records != records:
            image = FileImage(name, part, contents)
        return image


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
    names = sorted(records, key=lambda name: (-DTYPES[records[name].dtype].itemsize, name))
    entries: dict[str, dict[str, object]] = {}
    starts: dict[str, int] = {}
    position = 0
    for name in names:
        record = records[name]
        starts[name] = position
        position += num_bytes_of(record)
        shape = stored_shape(record)
        offsets = [starts[name], position]
        entries[name] = {"dtype": record.dtype, "shape": shape, "data_offsets": offsets}
    text = json.dumps(entries, separators=(",", ":")).encode()
    # Its length's 8 bytes included: copies into memory that is not aligned so are slower.
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    header = len(text).to_bytes(8, "little") + text
    return header, {name: len(header) + start for name, start in starts.items()}


def stored_shape(record: TensorRecord) -> list[int]:
    """Give the shape that a tensor has in its file: fragments are flat."""
    return record.shape if record.start is None else [record.count]


def num_bytes_of(record: TensorRecord) -> int:
    """Give the bytes that a tensor, or fragment, has in its file."""
    return record.count * DTYPES[record.dtype].itemsize


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
