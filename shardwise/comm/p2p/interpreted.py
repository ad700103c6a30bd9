"""What a wait does in Triton's interpreter: so ranks that are processes can run the kernels on CPU memory they share.

The interpreter runs the programs of a launch one after another, in order. The kernels allow that: a program pushes a
row before it waits for one, and all ranks take the rows in the same order.
"""

import ctypes
import time

import triton.language as tl

_ARMED = -1
_ENDED_OFFSET = 64


def wait(looks, places, lane, abort, records, what, deadline_ns, PAUSING):
    """`memory.wait` in Python, one source after the other, with its deadline, its abort word and its records."""
    words = ()
    for seen, place, record in zip(looks, places, records, strict=True):
        words += _wait_for_one(seen, place, lane, abort, record, what, deadline_ns)
    return words


def _wait_for_one(seen, words, lane, abort, record, what, deadline_ns):
    end = time.monotonic_ns() + _integer(deadline_ns)
    flag = ctypes.c_int32.from_address(_integer(abort))
    while True:
        armed = (seen[0] == _ARMED) | (seen[1] == _ARMED) | (seen[2] == _ARMED) | (seen[3] == _ARMED)
        if not armed.handle.data.any():
            return seen
        if flag.value:
            ctypes.c_int64.from_address(_integer(record) + _ENDED_OFFSET).value = _integer(what)
            return seen
        if time.monotonic_ns() > end:
            ctypes.c_int64.from_address(_integer(record)).value = _integer(what)
            flag.value = 1
            return seen
        time.sleep(0.0002)
        seen = tuple(tl.where(armed, tl.load(words + lane * 4 + i, armed, 0), seen[i]) for i in range(4))


def _integer(value) -> int:
    return int(value.handle.data.item()) if hasattr(value, "handle") else int(value)
