"""Damage to files that keeps their structure: whole bytes go in, others come out, by a seed."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

Mutate = Callable[[bytes, Random], bytes]

NUMBERS: tuple[int | float, ...] = (
    *(0, 1, -1, 2, 3, 7, 127, 128, 255, 256, 2**16, 10**6),
    *(2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**53 + 1, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64),
    *(-(2**31), -(2**63), -(2**63) - 1, 10**30, 10**400, -(10**4000)),
    *(0.0, -0.0, 0.5, 1e-320, 1e300, -1e300, math.inf, -math.inf, math.nan),
)
"""Numbers at the edges of all types, and beyond."""
TEXTS = (
    *("", " ", "a", "\0", "\n", "a\nFORGED: b", "\x1b]0;x\x07\x1b[2J", "\u202e\u2066x", "\ufeff"),
    *("\ud800", "\udfff\ud800", "\U0010ffff", "é", "A\u030a", "²", "٣", "1e999", "-1", "1.0"),
    *("true", "null", "nan", "inf", "0x10", "../x", "/etc/passwd", "a/b", "a\\b", "C:x", "~", "."),
    *("s3://user:secret@b/x", "pipe:touch x", "http://h/x", "%s%n", "{0.__class__}", "$HOME", "*"),
    *("x" * 300, "x" * 5000, "é" * 3000, "9" * 30, "9" * 5000, "0" * 64, "f" * 64, "0" * 32),
    *("shard-000000.tar", "F8_E8M0", "F4", "F64", "I64", "U8", "commit", "prune", "start"),
)
"""Texts that are no name, number or path, or that some program takes for more than a text."""

# Values that Python cannot write itself: they stand in for these marks in the text.
_RAW = {
    "\0digits": "9" * 5000,
    "\0minus": "-" + "9" * 100_000,
    "\0float": "1e999999999",
    "\0deep": "[" * 50_000 + "]" * 50_000,
    "\0deeper": '{"a":' * 2000 + "1" + "}" * 2000,
    "\0many": "[" + "0," * 100_000 + "0]",
    "\0bytes": '"\\ud83d\\u0000"',
}

Path = tuple[Any, ...]


def mutate_bytes(data: bytes, random: Random) -> bytes:
    """Flip, cut, repeat, move and overwrite bytes."""
    mutated = bytearray(data)
    for _ in range(random.choice((1, 1, 2, 4, 8))):
        if not mutated:
            mutated += random.randbytes(random.randrange(64))
        start = random.randrange(len(mutated) + 1)
        end = min(len(mutated), start + random.choice((1, 2, 4, 8, 100, 1000)))
        match random.randrange(9):
            case 0 if start < len(mutated):
                mutated[start] ^= 1 << random.randrange(8)
            case 1:
                mutated[start:end] = random.randbytes(end - start)
            case 2:
                del mutated[start:]
            case 3:
                del mutated[start:end]
            case 4:
                mutated[start:start] = mutated[start:end] * random.choice((1, 2, 50))
            case 5:
                other = random.randrange(len(mutated) + 1)
                mutated[other:other] = mutated[start:end]
            case 6:
                width = random.choice((1, 2, 4, 8))
                number = int(random.choice(NUMBERS[:28])) % 256**width
                mutated[start : start + width] = number.to_bytes(
                    width, random.choice(("little", "big"))
                )
            case 7:
                mutated[start:start] = random.choice(TEXTS).encode(errors="surrogatepass")
            case _:
                mutated[start:end] = bytes([random.choice((0, 0xFF, 0x80))]) * (end - start)
    return bytes(mutated)


def odd_value(random: Random) -> Any:
    """Give a plain value that is seldom expected."""
    match random.randrange(8):
        case 0 | 1 | 2:
            return random.choice(NUMBERS)
        case 3 | 4:
            return random.choice(TEXTS)
        case 5:
            return random.choice(list(_RAW))
        case 6:
            return random.choice((None, True, False))
        case _:
            return random.choice(([], {}, [[]], [None], {"": ""}, [{}] * 3, {"a": {"b": [1]}}))


def mutate_json(value: Any, random: Random) -> Any:
    """Replace, remove, repeat, retype or move nodes of a plain value, which stays as it is."""
    value = json.loads(json.dumps(value))
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        value = _mutate_node(value, random)
    return value


def dump_json(value: Any, random: Random | None = None, **options: Any) -> bytes:
    """Write what `mutate_json` gave; NaN, lone surrogates and what JSON has no value for too."""
    is_ascii = random is None or random.random() < 0.7
    text = json.dumps(value, **({"ensure_ascii": is_ascii} | options))
    for mark, raw in _RAW.items():
        text = text.replace(json.dumps(mark), raw)
    return text.encode(errors="surrogatepass")


def json_mutator(**options: Any) -> Mutate:
    """Mutate a document of JSON; the options are of `json.dumps`."""

    def mutate(data: bytes, random: Random) -> bytes:
        if random.random() < 0.15:
            return mutate_bytes(data, random)
        return dump_json(mutate_json(json.loads(data), random), random, **options)

    return mutate


def mutate_json_lines(data: bytes, random: Random) -> bytes:
    """Mutate some lines of JSON as such, or all as text."""
    if random.random() < 0.3:
        return mutate_text(data, random)
    lines = data.splitlines()
    chosen = random.randrange(len(lines))
    value = mutate_json(json.loads(lines[chosen]), random)
    lines[chosen] = dump_json(value, random)
    return b"\n".join(lines) + b"\n"


def _paths(value: Any, path: Path = ()) -> list[Path]:
    found: list[Path] = [path]
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            found += _paths(item, (*path, key))
    return found


def _mutate_node(value: Any, random: Random) -> Any:
    paths = _paths(value)
    path = random.choice(paths)
    if not path:
        if random.random() < 0.7 and isinstance(value, dict):
            value[random.choice(TEXTS)] = odd_value(random)
            return value
        return odd_value(random) if random.random() < 0.3 else [value]
    *above, last = path
    parent = value
    for key in above:
        parent = parent[key]
    node = parent[last]
    match random.randrange(8):
        case 0 | 1 | 2:
            parent[last] = odd_value(random)
        case 3:
            del parent[last]
        case 4:
            if isinstance(parent, list):
                parent[last:last] = [node] * random.choice((1, 2, 300))
            else:
                parent[random.choice(TEXTS)] = node
        case 5:
            parent[last] = _retype(node)
        case 6:
            if isinstance(node, int | float) and not isinstance(node, bool):
                step = random.choice((1, -1, node, -2 * node, 2**63 - 1, 0.5))
                parent[last] = node + step
            else:
                parent[last] = {random.choice(TEXTS): node}
        case _:
            other = random.choice(paths)
            parent[last] = json.loads(json.dumps(_get(value, other)))
    return value


def _get(value: Any, path: Path) -> Any:
    for key in path:
        try:
            value = value[key]
        except (KeyError, IndexError, TypeError):
            return None
    return value


def _retype(node: Any) -> Any:
    match node:
        case bool() | None:
            return str(node)
        case int() | float():
            return str(node) if isinstance(node, float) or abs(node) < 10**4000 else "9"
        case str():
            return int(node) if node.isascii() and node.isdecimal() and len(node) < 4000 else [node]
        case list():
            return {str(number): item for number, item in enumerate(node)}
        case _:
            return [list(item) for item in node.items()]


def mutate_text(data: bytes, random: Random) -> bytes:
    """Mutate lines, words and the encoding of a text."""
    lines = data.decode().splitlines(keepends=True)
    for _ in range(random.choice((1, 1, 2, 4))):
        number = random.randrange(len(lines)) if lines else 0
        match random.randrange(8):
            case 0:
                lines[number : number + 1] = []
            case 1:
                lines[number:number] = lines[number : number + 1] * random.choice((1, 2, 1000))
            case 2 | 3 | 4 if lines:
                parts = re.split(r"([\s,:=\[\]{}\"']+)", lines[number])
                parts[random.randrange(len(parts))] = _odd_text(random)
                lines[number] = "".join(parts)
            case 5:
                lines[number:number] = [_odd_text(random) + "\n"]
            case 6:
                random.shuffle(lines)
            case _:
                text = "".join(lines)
                encoding = random.choice(("utf-16", "utf-8-sig", "latin-1", "utf-32", "utf-8"))
                return mutate_bytes(text.encode(encoding, "replace"), random)
    return "".join(lines).encode(errors="surrogatepass")


def _odd_text(random: Random) -> str:
    match random.randrange(6):
        case 0:
            return repr(random.choice(NUMBERS[:25]))
        case 1:
            return random.choice(list(_RAW.values()))[: random.choice((10, 10_000, 2_000_000))]
        case 2:
            return random.choice(('"', "'", "\r", "\r\n", ",", "\t", '""', '"a\nb"', "\0", "\x85"))
        case 3:
            return "".join(random.choice("[]{}:,&*!|>%@`#?-\"'\\ \n\t") for _ in range(8))
        case _:
            return random.choice(TEXTS)


_YAML_SCALARS = (
    *("!!python/object/apply:os.system [x]", "!!bool maybe", "!!int ''", "!!float x", "!!set {a}"),
    *("!!binary abc", "!!timestamp 2001-99-99", "2001-13-01", "2001-01-01T99:99:99Z", "!!omap [a]"),
    *(
        "!!pairs [a]",
        "!x y",
        "&a [*a]",
        "&a {x: *a}",
        "*missing",
        "<<: {a: 1}",
        "{<<: [1]}",
        "=: 1",
    ),
    *("1_000", "0o17", "0b1", "1:60:60", ".inf", ".nan", "-.INF", "~", "{? [a] : b}", "{1: 2}"),
    *("{[a]: b}", "{{}: 1}", "? |\n  a\n: b", "|\n  x\n", ">-\n  y", "--- a", "...", "%YAML 9.9"),
    *("'\\ud800'", '"\\ud800"', '"\\U00110000"', '"\\x1b"', "0x" + "f" * 5000, "1e5", "1.e+9"),
    "[&a [x,x,x,x,x,x,x,x], &b [*a,*a,*a,*a,*a,*a,*a,*a], &c [*b,*b,*b,*b,*b,*b,*b,*b], [*c,*c]]",
    *("[" * 40 + "]" * 40, "[" * 3000, "{a: " * 3000, "- " * 3000, "!!str " * 500 + "x"),
    *("9" * 5000, "-" + "9" * 5000, "1" * 4000 + ":59", ":".join(["59"] * 2000)),
)


def mutate_yaml(data: bytes, random: Random) -> bytes:
    """Put odd scalars, aliases, tags and depth into a text of YAML."""
    if random.random() < 0.3:
        return mutate_text(data, random)
    lines = data.decode().splitlines()
    for _ in range(random.choice((1, 1, 2))):
        number = random.randrange(len(lines))
        indent = lines[number][: len(lines[number]) - len(lines[number].lstrip())]
        name = lines[number].partition(":")[0].strip()
        scalar = random.choice(_YAML_SCALARS)
        match random.randrange(5):
            case 0 | 1 | 2:
                lines[number] = f"{indent}{name}: {scalar}"
            case 3:
                lines[number:number] = [f"{indent}{scalar}: {name}"]
            case _:
                lines[number] = "  " * random.randrange(4) + lines[number].strip()
    return "\n".join(lines).encode()


def splice(mutators: Sequence[Mutate]) -> Mutate:
    """Mutate by one of several."""
    return lambda data, random: random.choice(mutators)(data, random)
