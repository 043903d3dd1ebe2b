"""Where the time of a compiled step goes: its operations, as the profiler of jax saw them run.

    seconds of an operation = sum over its calls in one step; what calls others (a loop) is not counted itself

What an operation is for, the line of Python that it comes from and the loop that it stands in are those of `timeline`.
On several threads or streams operations overlap, so that their sum may be more than the step.
"""

import dataclasses
import pathlib
import shutil
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import jax

from .timeline import CATEGORIES, OTHER, instruction_origins

LOOPS = ("forward", "backward", "loss")
ELSEWHERE = "rest"  # outside of these loops
_CALLERS = ("while", "call", "conditional")
_END = "end: "  # of an operation that is finished on another thread than it was begun on (CPU)


@dataclasses.dataclass(frozen=True)
class Operation:
    """One instruction of the compiled program, a fusion as a whole.

    Attributes:
      seconds: in one step, all calls together.
      calls: in one step.
      loop: "forward", "backward", "loss" or "rest".
    """

    name: str
    opcode: str
    category: str
    line: str
    loop: str
    seconds: float
    calls: float


@dataclasses.dataclass(frozen=True)
class OpTimes:
    """The operations of one step, longest first, and how long steps took, in seconds, while they were watched."""

    operations: tuple[Operation, ...]
    steps: tuple[float, ...]

    def by_category(self) -> dict[str, dict[str, float]]:
        """Seconds by what they are for, and by loop."""
        sums: dict[str, dict[str, float]] = {name: defaultdict(float) for name in (*CATEGORIES, OTHER)}
        for operation in self.operations:
            sums[operation.category][operation.loop] += operation.seconds
        return {name: dict(loops) for name, loops in sums.items() if loops}

    def to_json(self) -> dict[str, Any]:
        """All of it, and the sums, for `json.dump`."""
        return dataclasses.asdict(self) | {"by_category": self.by_category()}


def op_times(compiled: Any, step: Callable[[], None], *, steps: int = 3, trace: pathlib.Path | None = None) -> OpTimes:
    """Runs `step` once, then `steps` times under the profiler of jax.

    Args:
      compiled: the program that `step` runs, `jax.jit(f).lower(...).compile()`.
      step: runs it once, and waits until it is done.
      trace: file for all that the profiler saw, for ui.perfetto.dev or chrome://tracing (.json.gz); None: it is not
        kept.

    Raises `ValueError` where the profiler saw no operation of a program, as on a backend that tells none.
    """
    step()
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    seconds = []
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            for _ in range(steps):
                seconds.append(_seconds(step))
        found = pathlib.Path(folder)
        with warnings.catch_warnings():  # of a class of jax's own; where warnings are errors, it crashes
            warnings.simplefilter("ignore", DeprecationWarning)
            events = _events(next(found.rglob("*.xplane.pb")))
        if trace is not None:
            shutil.copyfile(next(found.rglob("*.trace.json.gz")), trace)
    origins = instruction_origins(compiled)
    known = {name: seen for name, seen in events.items() if name in origins and origins[name].opcode not in _CALLERS}
    if not known:
        raise ValueError("the profiler saw no operation of the program")
    operations = [
        Operation(name, o.opcode, o.category, o.line, o.loop or ELSEWHERE, sum(seen) / steps, len(seen) / steps)
        for name, seen in known.items()
        for o in (origins[name],)
    ]
    return OpTimes(tuple(sorted(operations, key=lambda o: -o.seconds)), tuple(seconds))


def _seconds(step: Callable[[], None]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def _events(path: pathlib.Path) -> dict[str, list[float]]:
    """Seconds of each call of each operation, by its name."""
    seen: dict[str, list[float]] = defaultdict(list)
    data = jax.profiler.ProfileData.from_file(str(path))  # what is read of it lives no longer than it does
    for plane in data.planes:
        events = []
        for line in plane.lines:
            for event in line.events:
                is_end = event.name.startswith(_END)
                if is_end or any(name == "hlo_op" for name, _ in event.stats):
                    events.append((event.start_ns, event.name, event.duration_ns, is_end))
        begun: dict[str, float] = {}  # by operation, when its last call began
        for start, name, duration, is_end in sorted(events):
            if not is_end:
                begun[name] = start
                seen[name].append(1e-9 * duration)
            elif (name := name.removeprefix(_END)) in begun:
                seen[name][-1] = max(seen[name][-1], 1e-9 * (start - begun[name]))
    return seen
