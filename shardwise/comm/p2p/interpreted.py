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
    """`memory.wait` in Python, with its deadline, its abort word and its records."""
    looks, end = list(looks), time.monotonic_ns() + _integer(deadline_ns)
    flag = ctypes.c_int32.from_address(_integer(abort))
    late = False
    while True:
        armed = [(a == _ARMED) | (b == _ARMED) | (c == _ARMED) | (d == _ARMED) for a, b, c, d in looks]
        absent = [source for source, each in enumerate(armed) if each.handle.data.any()]
        if absent and (flag.value or late):
            for source in absent:
                place = _integer(records[source]) + (_ENDED_OFFSET if flag.value else 0)
                ctypes.c_int64.from_address(place).value = _integer(what)
            flag.value = 1
        if not absent or flag.value:
            return sum((tuple(look) for look in looks), ())
        time.sleep(0.0002)
        late = time.monotonic_ns() > end  # before the looks, which may find what came while this rank was not running
        for source in absent:
            words, mask = places[source] + lane * 4, armed[source]
            looks[source] = [tl.where(mask, tl.load(words + i, mask, 0), looks[source][i]) for i in range(4)]


def _integer(value) -> int:
    return int(value.handle.data.item()) if hasattr(value, "handle") else int(value)
