"""Hostile inputs: files that are right but for a few bytes or a value, and values of every kind where one is expected.

Draws come from a `random.Random` of the caller's: a seed in benchmarks/fuzz.py, hypothesis's own in the tests. No
assertions.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from random import Random
from typing import Any

NUMBERS = (
    0,
    1,
    -1,
    2,
    7,
    255,
    256,
    50256,
    50257,
    65535,
    65536,
    10_001,
    2**31 - 1,
    2**31,
    -(2**31),
    2**32,
    2**40,
    2**53,
)
NUMBERS += (2**62, 2**63 - 1, 2**63, -(2**63), 10**30, 10**400, 0.5, -0.0, 1e308, 1e-308)
TEXTS = (
    "", " ", "gpt2", "bytes", "..", "../..", "../../etc/passwd", "/etc/passwd", "train_000000.bin", "a/b", "a\0b",
    "\x1b[2J", "\ud800", "\u202e", "nan", "inf", "-1", "1e999", "0x10", "9" * 5000, "a" * 300, "a.b.c", "x.py:f",
    "none", "true", "é", "__class__", "{0.__class__}", "${HOME}", "%s%n", "os.system", "<script>", "0" * 64, "f" * 64,
)  # fmt: skip
PIECES = (
    b"", b"\0", b"\xff", b"\n", b"\r\n", b'"', b"{", b"}", b"[", b"]", b"[" * 2000, b'{"a":' * 2000, b"NaN", b"1e999",
    b"-Infinity", b"null", b"true", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"9" * 5000, b"\x80\x04", b"PK\x03\x04", b"=",
    b",", b"''' ", b"#", b"a.b = 1\n", b"[[signal]]\n", b"1979-05-27T07:32:00Z", b"25:61:00", b"../../x", b"\x1b[2J",
    b"\x00" * 64,
)  # fmt: skip


def a_value(rng: Random, depth: int = 2) -> Any:
    """A value of any kind that JSON has."""
    kind = rng.randrange(8 if depth else 6)
    if kind < 2:
        return rng.choice(NUMBERS)
    if kind < 4:
        return rng.choice(TEXTS)
    if kind == 4:
        return rng.choice((None, True, False))
    if kind == 5:
        return rng.choice((float("inf"), float("-inf"), float("nan"), [], {}))
    if kind == 6:
        return [a_value(rng, depth - 1) for _ in range(rng.randrange(4))]
    return {rng.choice(TEXTS): a_value(rng, depth - 1) for _ in range(rng.randrange(4))}


def other_value(value: Any, rng: Random) -> Any:
    """The value with something in it replaced, left out, added or moved elsewhere."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        deed = rng.randrange(8)
        if deed == 0:
            return {k: v for k, v in value.items() if k != key}
        if deed == 1:
            return {**value, rng.choice([*TEXTS, *value]): a_value(rng)}
        return {**value, key: other_value(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.8:
        at = rng.randrange(len(value))
        deed = rng.randrange(6)
        if deed == 0:
            return value[:at] + value[at + 1 :]
        if deed == 1:
            return [*value, value[at]]
        return [*value[:at], other_value(value[at], rng), *value[at + 1 :]]
    return a_value(rng)


def other_bytes(content: bytes, rng: Random) -> bytes:
    """The bytes with one to four flipped, cut, doubled, overwritten by a number, or a piece put in."""
    changed = bytearray(content)
    for _ in range(rng.randrange(1, 5)):
        at = rng.randrange(len(changed) + 1)
        deed = rng.randrange(7)
        if deed == 0 and at < len(changed):
            changed[at] ^= 1 << rng.randrange(8)
        elif deed == 1:
            del changed[at : at + rng.choice((1, 2, 8, 100))]
        elif deed == 2:
            changed[at:at] = changed[at : at + rng.choice((1, 4, 40))]
        elif deed == 3:
            number = struct.pack("<q", max(-(2**63), min(2**63 - 1, int(rng.choice(NUMBERS[:20])))))
            changed[at : at + 4] = number[: rng.choice((1, 2, 4, 8))]
        elif deed == 4:
            at = 4 * rng.randrange(1 + min(8, len(changed) // 4))  # the numbers of a header
            changed[at : at + 4] = struct.pack("<i", rng.choice((0, 1, -1, 2, 3, 5, 2**31 - 1, -(2**31), 65536, 1024)))
        elif deed == 5:
            changed[at:at] = rng.choice(PIECES)
        else:
            del changed[at:]
    return bytes(changed)


def other_json(content: bytes, rng: Random) -> bytes:
    """A JSON file with a value changed, or its bytes."""
    if rng.random() < 0.25:
        return other_bytes(content, rng)
    value = json.loads(content)
    for _ in range(rng.randrange(1, 3)):
        value = other_value(value, rng)
    return json.dumps(value).encode()


def other_lines(content: bytes, rng: Random) -> bytes:
    """JSON lines with one changed, left out or doubled."""
    if rng.random() < 0.25:
        return other_bytes(content, rng)
    lines = content.splitlines()
    at = rng.randrange(len(lines))
    lines[at] = other_json(lines[at], rng).replace(b"\n", b" ")
    return b"\n".join(lines) + b"\n" * (rng.random() < 0.9)


def other_toml(content: bytes, rng: Random) -> bytes:
    """A TOML file with the value of a line changed, a line left out or doubled, or its bytes changed."""
    if rng.random() < 0.3:
        return other_bytes(content, rng)
    lines = content.decode().splitlines()
    for _ in range(rng.randrange(1, 3)):
        at = rng.randrange(len(lines))
        deed = rng.randrange(6)
        if deed == 0:
            del lines[at]
        elif deed == 1:
            lines.insert(rng.randrange(len(lines) + 1), lines[at])
        else:
            key, equals, _ = lines[at].partition(" = ")
            word = rng.choice(TEXTS) if rng.random() < 0.2 else key
            lines[at] = f"{word} = {_toml(a_value(rng))}" if equals else f"[{word}]"
        if not lines:
            break
    return "\n".join(lines).encode(errors="surrogatepass")


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(str(k))} = {_toml(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    if isinstance(value, float):
        return {"inf": "inf", "-inf": "-inf", "nan": "nan"}.get(str(value), repr(value))
    return "1979-05-27" if value is None else json.dumps(value)


Mutation = Callable[[bytes, Random], bytes]
