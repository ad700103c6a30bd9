"""Control messages between ranks: frames of one size, and the texts that check mode compares. Free of torch."""

import functools
import hashlib
from collections.abc import Sequence
from typing import Any

from shardwise.comm import watch

MESSAGE_BYTES = 256
"""Longest message of one frame: a call's text, or the sizes of 32 ranks."""
_LENGTH_BYTES = 8
FRAME_BYTES = _LENGTH_BYTES + MESSAGE_BYTES
CALL_BITS = 20
EXCHANGE, DIFFERENCE, LEFT, FREE_NUMBERS = range(4)
"""Call numbers of control messages, of the round in which ranks that differ name their calls, and of a rank that comes
to no more rounds. Collectives have numbers from FREE_NUMBERS on."""


def framed(message: bytes) -> bytearray:
    """`message`, of at most MESSAGE_BYTES, after its length: always FRAME_BYTES long."""
    return bytearray(number(len(message)) + message.ljust(MESSAGE_BYTES, b"\0"))


def unframed(frames: bytes | bytearray) -> list[bytes]:
    """The messages of concatenated frames."""
    rows = [frames[start : start + FRAME_BYTES] for start in range(0, len(frames), FRAME_BYTES)]
    return [bytes(row[_LENGTH_BYTES:][: int.from_bytes(row[:_LENGTH_BYTES], "little")]) for row in rows]


def number(value: int) -> bytes:
    """A length or count on the wire."""
    return value.to_bytes(_LENGTH_BYTES, "little")


def numbers(blob: bytes) -> tuple[int, ...]:
    """Those of a blob that holds several."""
    starts = range(0, len(blob), _LENGTH_BYTES)
    return tuple(int.from_bytes(blob[start : start + _LENGTH_BYTES], "little") for start in starts)


def call_text(entry: list, details: tuple) -> str:
    """A call as ranks compare it: what the flight record has of it, and `details` (dim, sizes, root, ...)."""
    op, dtype, strategy = entry[watch.OP], entry[watch.DTYPE], entry[watch.STRATEGY]
    shape = compared_shape(op, entry[watch.SHAPE], details)
    return (
        f"#{entry[watch.SEQUENCE]} {op} shape={shape} dtype={dtype} strategy={strategy} group={entry[watch.GROUP]} "
        f"{details}"
    )


def compared_shape(op: str, shape: Sequence[int], details: tuple) -> tuple[int, ...]:
    """The shape as far as ranks must agree on it."""
    if op == "all_gather":  # the lengths on its dimension may differ; they stand in `sizes`
        return tuple(-1 if i == details[0] else n for i, n in enumerate(shape))
    return tuple(shape)


@functools.lru_cache(maxsize=4096)
def call_number(op: str, shape: Sequence[int], dtype: Any, strategy: str, details: tuple = ()) -> int:
    """A number of CALL_BITS that ranks with the same call share, and others, but for one pair in a million, do not."""
    text = f"{op} {compared_shape(op, shape, details)} {dtype} {strategy} {details}"
    digest = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
    return FREE_NUMBERS + digest % ((1 << CALL_BITS) - FREE_NUMBERS)


def fingerprint(call: str) -> bytes:
    """`call` for one frame: as it is, or where it is too long (sizes of many ranks) its beginning and a digest."""
    blob = call.encode()
    if len(blob) <= MESSAGE_BYTES:
        return blob
    digest = f"... {hashlib.blake2b(blob, digest_size=8).hexdigest()}".encode()
    return blob[: MESSAGE_BYTES - len(digest)] + digest
