"""Ctrl-C, SIGTERM and SIGUSR1 as a request: end after the current step.

SIGTERM is how clouds and Kubernetes announce that a machine is taken away; `sbatch --signal=USR1@120` makes Slurm
do so, 120 seconds before, to what `srun` started.
"""

import signal
import threading
from types import FrameType
from typing import Any

from ..logging import get_logger

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name))


class StopRequest:
    """While entered, the first of these signals is noted in `signal`; a second one acts as it always does.

    Only the main thread can catch signals: elsewhere (a notebook's worker) nothing is changed.
    """

    def __init__(self):
        self.signal: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            self._previous = {s: signal.signal(s, self._note) for s in SIGNALS}
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        self._restore()
        get_logger(__name__).warning(
            "%s: ending after this step, with a checkpoint. Once more to end at once.", signal.Signals(number).name
        )

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def __exit__(self, *exception):
        self._restore()
