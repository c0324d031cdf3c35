"""Inputs made from good ones: bytes changed at random, and, where a seed is JSON or lines of it, values in its tree changed as well."""

import json
import random
from collections.abc import Callable
from typing import Any

NASTY: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 2**63, -(2**63), 10**400, 0.5, -0.0, 1e308, float("nan"), float("inf"), "", " ", "\x00", "\ud800",
    "a" * 10_000, "../../etc/passwd", "/etc/passwd", "${oc.env:HOME}", "__import__('os').system('true')", "<script>", "\r\n", [], {}, [[]],
    {"": None}, ["a"] * 1000, {"_target_": "os.system", "command": "true"}, "!!python/object/apply:os.system [true]", "1e400", "-1",
]  # fmt: skip
TOKENS = [
    b"\x00", b"\xff", b"\xfe\xff", b"\n", b"\r\n", b"{", b"}", b"[" * 2000, b'"', b"\\u0000", b"NaN", b"Infinity", b"1e999", b"-1", b"null",
    b"9" * 5000, b"%s%n", b"${oc.env:HOME}", b"!!python/object/apply:os.system [true]", b"&a [*a,*a]", b"<<: *a", b"\xed\xa0\x80", b"\t",
    b"../" * 20, b"_target_: os.system", b"cos\nsystem\n(S'true'\ntR.",
]  # fmt: skip
MOST = 1 << 20  # bytes


def mutated(seed: bytes, others: list[bytes], draw: random.Random) -> bytes:
    """One to a few changes."""
    data = seed
    for _ in range(draw.choice((1, 1, 2, 4, 8))):
        data = draw.choice(_WAYS)(data, others, draw)
    return data[:MOST]


def _place(data: bytes, draw: random.Random) -> int:
    return draw.randrange(len(data) + 1)


def _flip(data: bytes, _, draw) -> bytes:
    if not data:
        return b"\x00"
    i = draw.randrange(len(data))
    return data[:i] + bytes([data[i] ^ (1 << draw.randrange(8))]) + data[i + 1 :]


def _cut(data: bytes, _, draw) -> bytes:
    return data[: _place(data, draw)]


def _drop(data: bytes, _, draw) -> bytes:
    i, j = sorted((_place(data, draw), _place(data, draw)))
    return data[:i] + data[min(j, i + 64) :]


def _twice(data: bytes, _, draw) -> bytes:
    i, j = sorted((_place(data, draw), _place(data, draw)))
    return data[:j] + data[i:j][:4096] * draw.choice((1, 2, 64)) + data[j:]


def _insert(data: bytes, _, draw) -> bytes:
    i = _place(data, draw)
    return data[:i] + draw.choice(TOKENS) + data[i:]


def _random(data: bytes, _, draw) -> bytes:
    i = _place(data, draw)
    return data[:i] + draw.randbytes(draw.choice((1, 2, 8, 64))) + data[i:]


def _splice(data: bytes, others, draw) -> bytes:
    other = draw.choice(others)
    return data[: _place(data, draw)] + other[_place(other, draw) :]


def _number(data: bytes, _, draw) -> bytes:
    """Eight bytes as one of the lengths that headers hold."""
    i = _place(data, draw)
    value = draw.choice((0, 1, 2**31 - 1, 2**32 - 1, 2**40, 2**63 - 1, 2**64 - 1, len(data), len(data) + 1))
    return data[:i] + value.to_bytes(8, draw.choice(("little", "big"))) + data[i + 8 :]


def _tree(data: bytes, _, draw) -> bytes:
    """A value somewhere in the JSON of one of the lines, or of the whole."""
    try:
        return json.dumps(_changed(json.loads(data), draw)).encode("utf-8", "surrogatepass")
    except (ValueError, RecursionError, UnicodeError):
        pass
    lines = data.split(b"\n")
    i = draw.randrange(len(lines))
    try:
        lines[i] = json.dumps(_changed(json.loads(lines[i]), draw)).encode("utf-8", "surrogatepass")
    except (ValueError, RecursionError, UnicodeError):
        draw.shuffle(lines)
    return b"\n".join(lines)


def _changed(value: Any, draw: random.Random) -> Any:
    if isinstance(value, dict) and value and draw.random() < 0.85:
        key = draw.choice(list(value))
        way = draw.random()
        if way < 0.1:
            return {k: v for k, v in value.items() if k != key}
        if way < 0.2:
            return value | {str(draw.choice(NASTY))[:100]: draw.choice(NASTY)}
        return value | {key: _changed(value[key], draw)}
    if isinstance(value, list) and value and draw.random() < 0.85:
        i = draw.randrange(len(value))
        return draw.choice((value[:i] + [_changed(value[i], draw)] + value[i + 1 :], value[:i], value * 3))
    return draw.choice(NASTY)


_WAYS: list[Callable[[bytes, list[bytes], random.Random], bytes]] = [
    _flip, _cut, _drop, _twice, _insert, _insert, _random, _splice, _number, _tree, _tree, _tree,
]  # fmt: skip
