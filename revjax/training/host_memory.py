"""Keeps the resident memory of a long run from growing: malloc gives back what is free, again and again.

Steps, evaluations and checkpoints, which dozens of threads write, ask for blocks of every size between one another's.
What they free lies in holes, which glibc keeps, and touches more of as time goes on: measured on the quickstart, whose
live memory stays at 130 MB, they grow by 20 MB a minute. What is free at the end of the arena of any thread but the
first cannot be given back: it grows by 2 to 3 MB a minute; and not at all with MALLOC_ARENA_MAX=1 in the environment,
which takes 2 to 10 % more time for a step on 2 CPU cores.
"""

import ctypes
import functools
import sys
import time

GIVE_BACK_EVERY_S = 10.0  # it takes 1 to 7 ms


class HostMemory:
    """Gives back what is free, at most once in `every_s` seconds, whenever it is asked."""

    def __init__(self, every_s: float = GIVE_BACK_EVERY_S):
        self.every_s = every_s
        self._last = time.monotonic()

    def give_back_in_time(self) -> None:
        if time.monotonic() - self._last >= self.every_s:
            give_back()
            self._last = time.monotonic()


def give_back() -> None:
    """Has glibc's malloc return whole pages that are free to the system; with another malloc, does nothing."""
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@functools.cache
def _malloc_trim():
    if sys.platform != "linux":
        return None
    return getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none
