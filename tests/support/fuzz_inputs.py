"""Malformed files, made from good ones."""

import json
import random
import string

VALUES = [None, True, -1, 0, 2**63, 2**200, 1e308, float("inf"), float("nan"), "", "..", "\ud800"]
VALUES += ["/etc/passwd", "../../x", [], {}, [[]], "x" * 1000, [1], {"a": 1}]


def mutated(seed: bytes, rng: random.Random) -> bytes:
    """A seed with a few changes of its structure, where it is JSON, or of its bytes."""
    kind = rng.randrange(4)
    if kind == 0:
        return rng.choice(hostile())
    if kind == 1:
        try:
            value = json.loads(seed)
        except (ValueError, RecursionError):
            return with_other_bytes(seed, rng)
        for _ in range(rng.randint(1, 4)):
            value = with_other_value(value, rng)
        return json.dumps(value).encode(errors="surrogatepass")
    return with_other_bytes(seed, rng)


def hostile() -> list[bytes]:
    return [
        b"",
        b"\xef\xbb\xbf{}",
        b"\xff\xfe{\x00}\x00",
        b"[" * 100_000,
        b'{"a":' * 50_000,
        b"9" * 10_000,
        b'{"a": ' + b"9" * 10_000 + b"}",
        b"1e999",
        b"NaN",
        b"null",
        b"[]",
        b'"text"',
        b"{}\r\n{}",
        b"\x00" * 64,
        b"\xff" * 64,
    ]


def with_other_bytes(seed: bytes, rng: random.Random) -> bytes:
    data = bytearray(seed)
    for _ in range(rng.randint(1, 6)):
        at = rng.randrange(len(data) + 1)
        action = rng.randrange(4)
        if action == 0:
            data = data[:at]
        elif action == 1:
            data[at:at] = bytes(rng.choices(range(256), k=rng.randint(1, 8)))
        elif action == 2 and at < len(data):
            data[at] = rng.randrange(256)
        else:
            end = min(len(data), at + rng.randint(1, 30))
            data[at:at] = data[at:end] if rng.random() < 0.5 else b""
            del data[at:end]
    return bytes(data)


def with_other_value(value, rng: random.Random):
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(list(value))
        changed = dict(value)
        if rng.random() < 0.2:
            changed["".join(rng.choices(string.printable, k=4))] = changed.pop(key)
        elif rng.random() < 0.15:
            del changed[key]
        else:
            changed[key] = with_other_value(value[key], rng)
        return changed
    if isinstance(value, list) and value and rng.random() < 0.7:
        at = rng.randrange(len(value))
        return [*value[:at], with_other_value(value[at], rng), *value[at + 1 :]]
    return rng.choice(VALUES)
