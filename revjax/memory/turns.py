"""Functions timed in turn: on a machine that slows down now and then, what counts are ratios within a round."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np


def in_turn(fns: Sequence[Callable[[], Any]], rounds: int) -> np.ndarray:
    """Seconds of each function in each round (rounds, n); each is run once before. Every other round is backwards."""
    for fn in fns:
        fn()
    seconds = np.empty((rounds, len(fns)))
    for i in range(rounds):
        order = range(len(fns))
        for j in order if i % 2 == 0 else reversed(order):
            start = time.perf_counter()
            fns[j]()
            seconds[i, j] = time.perf_counter() - start
    return seconds
