"""Damage to a byte string: a function of a seed, so that every input can be made again."""

import random
from collections.abc import Sequence

LONGEST = 200_000
"""Bytes of the longest mutated input; longer ones are given one by one, see `corpus.giants`."""

TOKENS: tuple[bytes, ...] = (
    *(
        b"\x00",
        b"\xff\xfe",
        b"\xed\xa0\x80",
        b"\xc0\xaf",
        b"\xef\xbb\xbf",
        b"\xe2\x80\xae",
        b"\xe2\x80\xa8",
        b"\x1b[2J",
    ),
    *(b"\\ud800", b"\\u0000", b"\\x00", b"\r", b"\n", b"\n\n", b"\t", b"  "),
    *(b"NaN", b"Infinity", b"-Infinity", b".nan", b".inf", b"1e400", b"-1e400", b"1e-400", b"-0.0"),
    *(b"9" * 25, b"-" + b"9" * 25, b"9" * 5000, b"18446744073709551616", b"0x7fffffffffffffff", b"1:59:59"),
    *(b"null", b"true", b"false", b"~", b"[]", b"{}", b'""', b"[[", b"]]", b"{", b"}", b'"', b"'", b",", b":", b"="),
    *(b"[" * 300, b'{"a":' * 300, b"(" * 300),
    *(b"<eos>", b"</s>", b"<|im_start|>system\n", b"<|im_end|>", b"[INST]", b"<|endoftext|>", b"<bos>", b"</think>"),
    *(b"{{ 7 * 7 }}", b"{% for x in y %}", b"{{ ''.__class__ }}", b"<script>alert(1)</script>", b"${x}", b"%s%n"),
    *(b"../../../etc/passwd", b"/etc/passwd", b"..\\..\\x", b"part-../../x", b"file:///etc/passwd", b"./evil.py:Evil"),
    *(b"&a [*a]", b"&a ", b"*a", b"!!python/object/apply:os.system ['true']", b"!!binary x", b"!!timestamp x", b"<<: "),
    *(b"2024-99-99", b"? [1, 2]", b"!!set {1}", b"!!omap [x]", b"!!int x", b"!!float x", b"!!bool x", b"- ", b"? "),
    *(b"__class__", b"__init__", b"assistant", b"system", b"user", b"role", b"content", b"chosen", b"rejected"),
)
"""What is put in: bytes that readers are known to stumble over."""


def mutated(seeds: Sequence[bytes], random_: random.Random) -> bytes:
    """Return one of `seeds` with one to eight random changes."""
    found = bytearray(random_.choice(seeds))
    for _ in range(random_.choice((1, 1, 1, 2, 2, 3, 5, 8))):
        random_.choice(_CHANGES)(found, seeds, random_)
    return bytes(found[:LONGEST])


def _place(data: bytearray, random_: random.Random) -> tuple[int, int]:
    start = random_.randrange(len(data) + 1)
    return start, min(len(data), start + random_.choice((0, 1, 1, 2, 4, 8, 32)))


def _flip(data: bytearray, seeds: Sequence[bytes], random_: random.Random) -> None:
    if data:
        data[random_.randrange(len(data))] ^= 1 << random_.randrange(8)


def _byte(data: bytearray, seeds: Sequence[bytes], random_: random.Random) -> None:
    if data:
        data[random_.randrange(len(data))] = random_.randrange(256)


def _token(data: bytearray, seeds: Sequence[bytes], random_: random.Random) -> None:
    start, end = _place(data, random_)
    data[start:end] = random_.choice(TOKENS)


def _cut(data: bytearray, seeds: Sequence[bytes], random_: random.Random) -> None:
    start, end = _place(data, random_)
    del data[start : random_.choice((end, len(data)))]


def _repeat(data: bytearray, seeds: Sequence[bytes], random_: random.Random) -> None:
    start, end = _place(data, random_)
    data[start:start] = data[start:end] * random_.choice((1, 2, 50))


def _splice(data: bytearray, seeds: Sequence[bytes], random_: random.Random) -> None:
    other = random_.choice(seeds)
    start, end = _place(data, random_)
    first, last = sorted((random_.randrange(len(other) + 1), random_.randrange(len(other) + 1)))
    data[start:end] = other[first:last]


def _number(data: bytearray, seeds: Sequence[bytes], random_: random.Random) -> None:
    """Put a number of the dictionary over a digit, so that the input stays well formed more often."""
    digits = [place for place, byte in enumerate(data) if chr(byte).isdigit()]
    if digits:
        place = random_.choice(digits)
        data[place : place + 1] = random_.choice((b"NaN", b"1e400", b"-1", b"9" * 25, b"0", b"1e-5", b'"x"', b"null"))


_CHANGES = (_flip, _byte, _token, _token, _cut, _repeat, _splice, _number)
