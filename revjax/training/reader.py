"""Metrics of a step, read once the next one is under way: written, shown and judged."""

import collections
import dataclasses
import os
import pathlib
import time
from typing import Any

import jax
import numpy as np

from ..logging import Progress, get_logger
from .metrics import MetricsLog, bits_per_byte
from .state import Skeleton
from .step import OnTrouble

_SHOWN = 5  # complaints that are written out in full
_RECENT = 50  # steps over which the speed that is shown is a mean


@dataclasses.dataclass(frozen=True)
class Pending:
    """A step that was started."""

    step: int
    metrics: dict[str, Any]  # on the device
    batches_before: dict[str, Any]  # where the batches stood: restored, they give the batch of this step
    batches_after: dict[str, Any]
    data_wait_s: float


@dataclasses.dataclass(frozen=True)
class Work:
    """What a step does, for its speed."""

    tokens: int
    bytes_per_token: float | None = 1.0  # of text that is predicted; None where it is something else
    model_flops: float | None = None  # of all tokens, nothing twice
    hardware_flops: float | None = None  # with what is computed again
    peak_flops: float | None = None  # a second, of all devices; None where it is not known

    def in_bits(self, loss: float) -> dict[str, float]:
        """bits_per_byte, where it is text that is predicted."""
        return {} if self.bytes_per_token is None else {"bits_per_byte": bits_per_byte(loss, self.bytes_per_token)}

    def speeds(self, seconds: float) -> dict[str, float]:
        """tokens_per_second, and what is known of: model FLOPs utilisation, the hardware's, and their peak."""
        speeds = {"tokens_per_second": round(self.tokens / seconds, 1)}
        for name, flops in (("mfu", self.model_flops), ("hfu", self.hardware_flops)):
            if flops and self.peak_flops:
                speeds |= {name: round(flops / seconds / self.peak_flops, 4), "peak_flops": self.peak_flops}
        return speeds


def memory_in_use() -> dict[str, int]:
    """Bytes: host_bytes of this process (where /proc tells), device_peak_bytes (where the device does)."""
    found = {}
    try:
        pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
        found["host_bytes"] = pages * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        pass
    peak = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    return found | ({} if peak is None else {"device_peak_bytes": peak})


@dataclasses.dataclass(frozen=True)
class Trouble:
    """A step whose gradient was not to be trusted."""

    record: dict[str, Any]  # for trouble.jsonl: the step, the batch, what is wrong
    batches_after: dict[str, Any]


class Reader:
    """Fetches the metrics of the `pending` step; see `read`."""

    def __init__(self, on_trouble: OnTrouble, skeleton: Skeleton, log: MetricsLog, progress: Progress, work: Work):
        self.on_trouble, self.skeleton, self.log, self.progress = on_trouble, skeleton, log, progress
        self.work = work
        self.pending: Pending | None = None
        self.complaints = self.troubles_in_a_row = 0
        self.seconds: collections.deque[float] = collections.deque(maxlen=_RECENT)
        self.restart_clock()

    def restart_clock(self) -> None:
        """What has passed since the last step was not training."""
        self.since = time.perf_counter()

    def go_back(self, steps: int) -> None:
        """The last `steps` steps do not count: they will be made again."""
        self.pending = None
        self.progress.update(-steps)
        self.restart_clock()

    def read(self) -> Trouble | None:
        """Waits for the pending step, if there is one, and reads it; returns what is wrong with its gradient."""
        if self.pending is None:
            return None
        pending, self.pending = self.pending, None
        numbers = jax.device_get({name: x for name, x in pending.metrics.items() if name != "report"})
        now = time.perf_counter()
        seconds, self.since = max(now - self.since, 1e-9), now
        self.seconds.append(seconds)
        trouble, loss = bool(numbers.pop("trouble")), float(numbers["loss"])
        numbers |= {name: int(numbers[name]) for name in ("canary", "unsafe", "skipped")} | {
            "spike": bool(numbers["spike"]),
            **self.work.in_bits(loss),
            **self.work.speeds(seconds),
            **memory_in_use(),
            "data_wait_s": round(pending.data_wait_s, 6),
            "time": round(time.time(), 3),
        }
        self.log.step(step=pending.step, **numbers)
        recent = self.work.speeds(sum(self.seconds) / len(self.seconds))
        shown = {"tokens_per_s": round(recent["tokens_per_second"])} | (
            {"mfu": recent["mfu"]} if "mfu" in recent else {}
        )
        shown = {name: numbers[name] for name in ("bits_per_byte", "accuracy") if name in numbers} | shown
        self.progress.update(1, loss=loss, **shown, canary=numbers["canary"])
        self.troubles_in_a_row = self.troubles_in_a_row + 1 if trouble else 0
        return self._complain(pending, numbers) if trouble else None

    def _complain(self, pending: Pending, metrics: dict[str, Any]) -> Trouble:
        self.complaints += 1
        done = {
            "warn": "The update was made all the same (training.on_trouble: warn).",
            "skip": "The update was left out (training.on_trouble: skip).",
            "rewind": "The update was left out, and training goes back (training.on_trouble: rewind).",
            "stop": "The update was left out, and training ends (training.on_trouble: stop).",
        }[self.on_trouble]
        said = pending.metrics["report"].describe(self.skeleton.abstract)
        if not (np.isfinite(metrics["loss"]) and np.isfinite(metrics["grad_norm"])):
            said += f"\nThe loss is {metrics['loss']:.4g} and the norm of its gradient {metrics['grad_norm']:.4g}."
        if metrics["spike"]:
            said += f"\nThe loss is {metrics['loss']:.4g}, far above those before it (training.spike_sigmas)."
        names = ("loss", "grad_norm", "canary", "unsafe", "max_abs", "spike")
        record = {"step": pending.step, "batch": pending.batches_before} | {name: metrics[name] for name in names}
        record |= {"what": said.strip(), "on_trouble": self.on_trouble}
        if self.on_trouble != "rewind":  # there, the line also says where training goes on
            self.log.trouble(**record)
        if self.complaints > _SHOWN and self.on_trouble in ("warn", "skip"):
            message = "step %d: trouble again (%d times so far; see trouble.jsonl). %s"
            get_logger(__name__).warning(message, pending.step, self.complaints, done)
        else:
            get_logger(__name__).warning(
                "step %d: this step's gradient is not to be trusted.\n%s\n%s", pending.step, said.strip(), done
            )
        return Trouble(record, pending.batches_after)
