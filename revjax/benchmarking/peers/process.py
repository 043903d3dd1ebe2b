"""Time of a step, or by how much the process grows meanwhile. Needs Linux for the latter, and nothing but Python."""

import gc
import statistics
import time
from collections.abc import Callable


def measure(step: Callable[[], object], what: str, repeats: int) -> float:
    """Of `step`, which is run once before: "seconds" (median), or "bytes" at the highest, beyond what is there."""
    step()
    if what == "seconds":
        seconds = []
        for _ in range(repeats):
            start = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - start)
        return statistics.median(seconds)
    gc.collect()
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the highest is now
    before = _memory("VmRSS")
    step()
    return _memory("VmHWM") - before


def _memory(name: str) -> int:
    with open("/proc/self/status", encoding="ascii") as file:
        line = next(line for line in file if line.startswith(name))
    return 1024 * int(line.split()[1])
