"""Damage to tables, tensors, archives and images that keeps their structure; see byte_mutations."""

from __future__ import annotations

import io
import json
import re
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Mapping
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from support.byte_mutations import (
    NUMBERS,
    TEXTS,
    Mutate,
    dump_json,
    json_mutator,
    mutate_bytes,
    mutate_json,
)


def mutate_parquet(data: bytes, random: Random) -> bytes:
    """Write a table anew with other types, values, nulls, rows or metadata, or damage its file."""
    if random.random() < 0.3:
        return _mutate_parquet_file(data, random)
    # As arrays of Python's, since extension types and dictionaries would be kept.
    table = pq.read_table(io.BytesIO(data), use_threads=False)
    for _ in range(random.choice((1, 1, 2))):
        table = _mutate_table(table, random)
    sink = io.BytesIO()
    pq.write_table(
        table,
        sink,
        row_group_size=random.choice((None, 1, 2, 1000)),
        compression=random.choice(("none", "zstd", "snappy", "gzip")),
        use_dictionary=random.random() < 0.5,
        version=random.choice(("1.0", "2.6")),
        data_page_version=random.choice(("1.0", "2.0")),
        write_page_checksum=random.random() < 0.5,
    )
    written = sink.getvalue()
    return _mutate_parquet_file(written, random) if random.random() < 0.2 else written


_TYPES = (
    *(pa.int8(), pa.int64(), pa.uint64(), pa.float16(), pa.float32(), pa.float64(), pa.bool_()),
    *(pa.string(), pa.large_string(), pa.binary(), pa.large_binary(), pa.binary(16), pa.binary(3)),
    *(pa.date32(), pa.timestamp("us"), pa.time64("us"), pa.duration("s"), pa.decimal128(38, 3)),
    *(pa.list_(pa.int64()), pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
    pa.dictionary(pa.int32(), pa.string()),
)


def _mutate_table(table: pa.Table, random: Random) -> pa.Table:
    names = table.column_names
    position = random.randrange(len(names)) if names else 0
    match random.randrange(8):
        case 0 | 1 if names:
            column = _build_column(random.choice(_TYPES), len(table), random)
            return table.set_column(position, names[position], column)
        case 2 | 3 if names:
            return table.set_column(
                position, names[position], _spoil(table.column(position), random)
            )
        case 4:
            metadata = dict(table.schema.metadata or {})
            for key, value in metadata.items():
                if random.random() < 0.7:
                    metadata[key] = _mutate_metadata(value, random)
            return table.replace_schema_metadata(metadata)
        case 5:
            count = random.choice((0, 1, 5, 500)) if len(table) else 0
            rows = [random.randrange(len(table)) for _ in range(count)]
            return table.take(pa.array(rows, pa.int64()))
        case 6 if names:
            return table.remove_column(position)
        case _ if names:
            name = random.choice([*names, *TEXTS[:12]]).encode(errors="replace").decode()
            return table.append_column(name, table.column(position))
    return table


def _mutate_metadata(value: bytes, random: Random) -> bytes:
    try:
        return json_mutator()(value, random)
    except ValueError:
        return mutate_bytes(value, random)


def _build_column(kind: pa.DataType, count: int, random: Random) -> pa.Array:
    if random.random() < 0.2:
        return pa.nulls(count, kind)
    numbers = pa.array([random.randrange(-3, 100) for _ in range(count)], pa.int64())
    for steps in ((kind,), (pa.string(), kind), (pa.int32(), kind), (pa.int8(), kind)):
        column = numbers
        try:
            for step in steps:
                column = column.cast(step, safe=False)
        except pa.ArrowException:
            continue
        return column
    return pa.nulls(count, kind)


def _spoil(column: pa.ChunkedArray, random: Random) -> pa.Array:
    """Give a column of the same type with values that are odd for it, or missing."""
    values: list[Any] = column.to_pylist()
    for row in range(len(values)):
        if random.random() < 0.5:
            continue
        match values[row]:
            case bool():
                values[row] = None
            case int() | float():
                values[row] = random.choice([each for each in NUMBERS if abs(each) < 2**63])
            case str():
                values[row] = random.choice(TEXTS).encode(errors="replace").decode()
            case bytes() if pa.types.is_fixed_size_binary(column.type):
                values[row] = random.randbytes(len(values[row]))
            case bytes():
                values[row] = mutate_bytes(values[row], random)
            case _:
                values[row] = None
        if random.random() < 0.1:
            values[row] = None
    kind = column.type
    built: list[pa.Array] = []
    for value in values:
        try:
            built.append(pa.array([value], kind))
        except (pa.ArrowException, OverflowError, TypeError, ValueError):
            built.append(pa.nulls(1, kind))
    return pa.concat_arrays(built) if built else pa.nulls(0, kind)


def _mutate_parquet_file(data: bytes, random: Random) -> bytes:
    """Damage the footer, whose numbers are what a reader believes, or any bytes."""
    length = int.from_bytes(data[-8:-4], "little")
    start = len(data) - 8 - length
    if start < 4 or random.random() < 0.3:
        return mutate_bytes(data, random)
    footer = bytearray(data[start:-8])
    for _ in range(random.choice((1, 1, 2, 4))):
        at = random.randrange(len(footer))
        match random.randrange(4):
            case 0:
                footer[at] ^= 1 << random.randrange(8)
            case 1:
                footer[at] = random.randrange(256)
            case 2:  # a number of thrift: seven bits per byte
                footer[at : at + 1] = b"\xff" * random.choice((1, 4, 8, 9)) + b"\x01"
            case _:
                del footer[at]
    stated = len(footer) if random.random() < 0.9 else random.randrange(2**32)
    return data[:start] + bytes(footer) + struct.pack("<I", stated) + data[-4:]


def mutate_safetensors(data: bytes, random: Random) -> bytes:
    """Let the header lie: of its length, and of the tensors' types, shapes and places."""
    if random.random() < 0.15:
        return mutate_bytes(data, random)
    length = int.from_bytes(data[:8], "little")
    header = dump_json(mutate_json(json.loads(data[8 : 8 + length]), random), random)
    header += b" " * (-len(header) % random.choice((1, 8)))
    body = data[8 + length :]
    if random.random() < 0.1:
        body = mutate_bytes(body, random)
    stated = len(header) if random.random() < 0.9 else int(abs(random.choice(NUMBERS[:24]))) % 2**64
    return stated.to_bytes(8, "little") + header + body


_TAR_FIELDS = {
    "name": (0, 100),
    "mode": (100, 8),
    "uid": (108, 8),
    "size": (124, 12),
    "mtime": (136, 12),
    "checksum": (148, 8),
    "type": (156, 1),
    "linkname": (157, 100),
    "magic": (257, 8),
    "prefix": (345, 155),
}
_TAR_NUMBERS = (
    *(
        b"0" * 11 + b"\0",
        b"7" * 12,
        b"-1",
        b"\xff" * 12,
        b"\x80" + b"\xff" * 11,
        b"\x80" + b"\0" * 11,
    ),
    *(b"\x80\0\0\0\x7f" + b"\xff" * 7, b"00000001000", b"9999", b" ", b"", b"0x10", b"1 2"),
    *(b"1_0", "٣".encode()),
)
_PAX_RECORDS = (
    *("size=0", "size=-1", "size=99999999999999", "size=9223372036854775807", "size=x", "size=1e3"),
    *("path=../x", "path=a.jpg", "path=", "path=\ud800", "mtime=nan", "mtime=inf", "uid=x"),
    *("GNU.sparse.major=1", "GNU.sparse.map=0,1,2", "GNU.sparse.size=x", "GNU.sparse.name=b.png"),
    *("GNU.sparse.size=99999999999", "GNU.sparse.numblocks=9", "hdrcharset=BINARY", "=", "x"),
    *("linkpath=/etc/passwd", "comment=" + "x" * 900, "SCHILY.xattr.a=\0"),
)


def mutate_tar(data: bytes, random: Random) -> bytes:
    """Change fields of headers, and put extended headers before members."""
    if random.random() < 0.15:
        return mutate_bytes(data, random)
    mutated = bytearray(data)
    for _ in range(random.choice((1, 1, 2, 3))):
        headers = [
            at for at in range(0, len(mutated), 512) if mutated[at + 257 : at + 262] == b"ustar"
        ]
        if not headers:
            break
        at = random.choice(headers)
        match random.randrange(6):
            case 0 | 1 | 2:
                _mutate_tar_header(mutated, at, random)
            case 3:
                mutated[at:at] = _extended_header(random)
            case 4:
                mutated[at:at] = mutated[at : at + 512 * random.choice((1, 2, 3))]
            case _:
                blocks = random.choice((bytes(512), bytes(1024), b"\xff" * 512, b"ustar" * 200))
                mutated[at:at] = blocks
    return bytes(mutated)


def _mutate_tar_header(tar: bytearray, at: int, random: Random) -> None:
    field = random.choice(list(_TAR_FIELDS))
    start, length = _TAR_FIELDS[field]
    match field:
        case "type":
            value = random.choice(b"0123456789gxLKSDMNVXA\0\xff").to_bytes(1, "big")
        case "name" | "linkname" | "prefix":
            value = random.choice(TEXTS).encode(errors="surrogatepass")[:length]
        case "magic":
            value = random.choice((b"ustar  \0", b"ustar\0" + b"00", b"USTAR\0", b""))
        case _:
            value = random.choice(_TAR_NUMBERS)[:length]
    tar[at + start : at + start + length] = value.ljust(length, b"\0")
    if random.random() < 0.9:
        tar[at + 148 : at + 156] = b" " * 8
        tar[at + 148 : at + 156] = b"%06o\0 " % (sum(tar[at : at + 512]) % 8**6)


def _extended_header(random: Random) -> bytes:
    info = tarfile.TarInfo("header")
    info.type = random.choice(
        (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
    )
    records = b""
    for text in random.choices(_PAX_RECORDS, k=random.choice((1, 2, 5))):
        record = b" " + text.encode(errors="surrogatepass") + b"\n"
        stated = len(record) + len(str(len(record) + 2))
        records += str(random.choice((stated, stated, stated, 0, 1, 10**18))).encode() + record
    info.size = len(records)
    return info.tobuf(tarfile.USTAR_FORMAT) + records + bytes(-len(records) % 512)


_ZIP_RECORDS = {b"PK\x03\x04": 30, b"PK\x01\x02": 46, b"PK\x05\x06": 22, b"PK\x06\x06": 56}


def mutate_zip(data: bytes, random: Random) -> bytes:
    """Change fields of the local headers, the directory and the end records."""
    if random.random() < 0.2:
        return mutate_bytes(data, random)
    mutated = bytearray(data)
    places = [
        (match.start(), size)
        for mark, size in _ZIP_RECORDS.items()
        for match in re.finditer(re.escape(mark), data)
    ]
    for _ in range(random.choice((1, 1, 2, 3))):
        start, size = random.choice(places)
        width = random.choice((2, 4, 4, 8))
        at = start + 4 + random.randrange(max(1, (size - 4 - width) // 2 + 1)) * 2
        number = int(random.choice(NUMBERS[:24])) % 256**width
        if random.random() < 0.3:
            number = (int.from_bytes(mutated[at : at + width], "little") + 1) % 256**width
        mutated[at : at + width] = number.to_bytes(width, "little")
    return bytes(mutated)


def archive_mutator(mutators: Mapping[str, Mutate]) -> Mutate:
    """Mutate a member of a zip, by the ending of its name; its checksum is right again."""

    def mutate(data: bytes, random: Random) -> bytes:
        if random.random() < 0.2:
            return mutate_zip(data, random)
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
        known = [name for name in members if _find_mutator(name, mutators) is not None]
        chosen = random.choice(known)
        mutate_member = _find_mutator(chosen, mutators)
        assert mutate_member is not None, "the member was chosen by its mutator"
        members[chosen] = mutate_member(members[chosen], random)
        sink = io.BytesIO()
        with zipfile.ZipFile(sink, "w") as archive:
            for name, content in members.items():
                archive.writestr(name, content)
        return sink.getvalue()

    return mutate


def _find_mutator(name: str, mutators: Mapping[str, Mutate]) -> Mutate | None:
    return next((mutators[suffix] for suffix in mutators if name.endswith(suffix)), None)


def mutate_npy(data: bytes, random: Random) -> bytes:
    """Let the header of an array lie."""
    shapes = ("(3,)", "(2**60,)", "(-1,)", "(9999999999999,)", "()", "(2, 0)", "(1,)*99", "3", "x")
    types = ("<f8", "|O", "<U9999999", ">i4", "|V0", "<c16", "<f2", "[('a', '<f8')]", "<M8[s]", "")
    text = (
        f"{{'descr': '{random.choice(types)}', 'fortran_order': "
        f"{random.choice(('False', 'True', '3'))}, 'shape': {random.choice(shapes)}, }}"
    )
    if random.random() < 0.3:
        return mutate_bytes(data, random)
    if random.random() < 0.2:
        text = random.choice(("(" * 5000, "{", text * 1000, "1" * 5000, "{**{}}", "\0"))
    header = text.encode() + b"\n"
    return b"\x93NUMPY\x01\0" + struct.pack("<H", len(header) % 2**16) + header + data[128:]


def mutate_pickle(data: bytes, random: Random) -> bytes:
    """Change opcodes and arguments of a pickle."""
    mutated = bytearray(data)
    for _ in range(random.choice((1, 1, 2, 3))):
        at = random.randrange(len(mutated))
        match random.randrange(4):
            case 0:
                mutated[at] = random.choice(
                    b".()0NIJKMUXVcbq\x80\x81\x85\x86}]edsuthjRQP\x8a\x8b\x8c\x93"
                )
            case 1:
                mutated[at] = random.randrange(256)
            case 2:
                del mutated[at : at + random.choice((1, 2, 10))]
            case _:
                mutated[at:at] = mutated[at : at + random.choice((1, 2, 20))]
    return bytes(mutated)


def mutate_image(data: bytes, random: Random) -> bytes:
    """Change the chunks of a PNG or WebP, or the segments of a JPEG, with right checksums."""
    if random.random() < 0.35:
        return mutate_bytes(data, random)
    if data.startswith(b"\x89PNG"):
        return _mutate_chunks(data, 8, ">", random)
    if data.startswith(b"RIFF"):
        return _mutate_chunks(data, 12, "<", random)
    return _mutate_segments(data, random)


def _mutate_chunks(data: bytes, start: int, order: str, random: Random) -> bytes:
    is_png = order == ">"
    chunks: list[tuple[bytes, bytes]] = []
    at = start
    while at + 8 <= len(data):
        size, kind = struct.unpack_from(">I4s", data, at) if is_png else _riff_head(data, at)
        chunks.append((kind, data[at + 8 : at + 8 + size]))
        at += 12 + size if is_png else 8 + size + size % 2
    number = random.randrange(len(chunks))
    kind, content = chunks[number]
    match random.randrange(6):
        case 0 | 1:
            chunks[number] = kind, mutate_bytes(content, random)
        case 2:
            chunks[number:number] = chunks[number : number + 1] * random.choice((1, 3, 3000))
        case 3:
            del chunks[number]
        case 4:
            words = random.choice(NUMBERS[:24])
            chunks[number] = kind, struct.pack(">q", int(words) % 2**63) + content[8:]
        case _:
            extra = random.choice(
                (b"eXIf", b"tEXt", b"zTXt", b"iTXt", b"tRNS", b"PLTE", b"acTL", b"EXIF", b"ANIM")
            )
            filling = random.choice((b"", b"II*\0\x08\0\0\0", b"XML:com.adobe.xmp\0", b"x\0\0\xff"))
            chunks[number:number] = [(extra, filling + random.randbytes(random.randrange(40)))]
    parts = [data[:start]]
    for kind, content in chunks:
        if is_png:
            check = zlib.crc32(kind + content)
            parts += [struct.pack(">I", len(content)), kind, content, struct.pack(">I", check)]
        else:
            parts += [kind, struct.pack("<I", len(content)), content, bytes(len(content) % 2)]
    return b"".join(parts)


def _riff_head(data: bytes, at: int) -> tuple[int, bytes]:
    kind, size = struct.unpack_from("<4sI", data, at)
    return size, kind


def _mutate_segments(data: bytes, random: Random) -> bytes:
    marks = [match.start() for match in re.finditer(rb"\xff[\xc0-\xcf\xd8-\xef\xfe]", data)]
    mutated = bytearray(data)
    at = random.choice(marks)
    length = int.from_bytes(data[at + 2 : at + 4])
    segment = data[at : at + 2 + length]
    match random.randrange(5):
        case 0:
            mutated[at + 1] = random.choice(
                b"\xc0\xc1\xc2\xc4\xc9\xda\xd8\xd9\xdb\xdd\xe0\xe1\xe2\xee"
            )
        case 1:
            mutated[at + 2 : at + 4] = random.choice((0, 1, 2, 3, 0xFFFF)).to_bytes(2, "big")
        case 2:
            mutated[at:at] = segment * random.choice((1, 2, 600))
        case 3:
            mutated[at : at + 2 + length] = segment[:4] + mutate_bytes(segment[4:], random)
        case _:
            exif = b"\xff\xe1\0\x40Exif\0\0" + random.choice((b"II*\0", b"MM\0*")) + b"\x08\0\0\0"
            mutated[2:2] = (exif + random.randbytes(60))[:66]
    return bytes(mutated)
