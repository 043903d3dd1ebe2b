"""Says what a run waits for when nothing has happened for a long time.

A thread of its own looks at the clock: the one that trains may hang in a read, a compilation or a device. A daemon, so
that it never keeps a process alive.
"""

import contextlib
import threading
import time

from ..logging import get_logger


class Watchdog:
    """While entered, logs a warning when what is going on has taken `after_s` seconds, then at twice that, and so on.

    >>> with Watchdog(after_s=300) as watchdog:
    ...     with watchdog.watch("the next batch"):
    ...         batch = next(batches)
    """

    def __init__(self, after_s: float):
        self.after_s = after_s
        self._doing: tuple[str, float] | None = None  # what, and since when
        self._over = threading.Event()

    @contextlib.contextmanager
    def watch(self, what: str):
        """Inside, `what` is what a warning names."""
        before, self._doing = self._doing, (what, time.monotonic())
        try:
            yield
        finally:
            self._doing = before and (before[0], time.monotonic())

    def __enter__(self):
        threading.Thread(target=self._look, name="revjax-watchdog", daemon=True).start()
        return self

    def __exit__(self, *exception):
        self._over.set()

    def _look(self) -> None:
        told: tuple[tuple[str, float] | None, float] = (None, 0.0)  # what was told, and how long it had taken
        while not self._over.wait(min(self.after_s / 4, 10.0)):
            doing = self._doing
            if doing is None:
                continue
            seconds = time.monotonic() - doing[1]
            if seconds >= (2 * told[1] if told[0] is doing else self.after_s):
                told = doing, seconds
                get_logger(__name__).warning("nothing has happened for %.0f s: waiting for %s", seconds, doing[0])
