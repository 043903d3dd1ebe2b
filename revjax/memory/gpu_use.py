"""What NVIDIA GPUs say of themselves while a step runs again and again: how busy they are, memory, power and energy.

    joules of a step = energy that the device counts, after - before / steps

The driver's own figures (NVML), of each whole device: other processes are in them. Its counter moves some ten times a
second, so steps are run for seconds.
"""

import dataclasses
import importlib
import os
import statistics
import threading
import time
from collections.abc import Callable
from typing import Any

import jax

_EVERY_S = 0.05  # between two looks


@dataclasses.dataclass(frozen=True)
class GPUUse:
    """Of one device.

    Attributes:
      steps: that were run meanwhile.
      step_seconds: of one, by the clock.
      step_joules: of one.
      utilization: the share of the time in which any kernel ran, 0 to 1, however little of the device it used.
      memory_bytes: in use at most, everything on the device.
    """

    name: str
    steps: int
    step_seconds: float
    step_joules: float
    utilization: float
    memory_bytes: int

    @property
    def watts(self) -> float:
        return self.step_joules / self.step_seconds


def gpu_use(step: Callable[[], None], *, seconds: float = 5.0) -> list[GPUUse]:
    """Runs `step` for so many seconds, at least once; returns what each device that jax uses here said meanwhile.

    Args:
      step: runs once, and waits until it is done. Compiled, and run before.

    Raises `ValueError`, with the reason, where there is nothing that could be asked.
    """
    devices = [d for d in jax.local_devices() if d.platform == "gpu"]
    if not devices:
        raise ValueError(f"only NVIDIA GPUs tell it, and jax uses {jax.default_backend()}")
    try:
        nvml = importlib.import_module("pynvml")
    except ImportError:
        raise ValueError("nvidia-ml-py is not installed. Type: pip install nvidia-ml-py") from None
    try:
        nvml.nvmlInit()
        try:
            return _watch(nvml, [_handle(nvml, d.local_hardware_id) for d in devices], step, seconds)
        finally:
            nvml.nvmlShutdown()
    except nvml.NVMLError as e:
        raise ValueError(f"the driver does not tell it: {e}") from None


def _handle(nvml: Any, index: int) -> Any:
    """The device that is the process's `index`-th: CUDA_VISIBLE_DEVICES names those, by number or by UUID."""
    visible = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    name = visible[index] if visible else str(index)
    return nvml.nvmlDeviceGetHandleByIndex(int(name)) if name.isdecimal() else nvml.nvmlDeviceGetHandleByUUID(name)


def _watch(nvml: Any, handles: list[Any], step: Callable[[], None], seconds: float) -> list[GPUUse]:
    shares: list[list[float]] = [[] for _ in handles]
    most = [0] * len(handles)
    failed: list[Exception] = []
    done = threading.Event()

    def look() -> None:
        try:
            while not done.wait(_EVERY_S):
                for i, handle in enumerate(handles):
                    shares[i].append(nvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100)
                    most[i] = max(most[i], nvml.nvmlDeviceGetMemoryInfo(handle).used)
        except nvml.NVMLError as e:
            failed.append(e)

    watcher = threading.Thread(target=look, name="nvml", daemon=True)
    joules = lambda: [1e-3 * nvml.nvmlDeviceGetTotalEnergyConsumption(handle) for handle in handles]  # NVML: mJ
    watcher.start()
    try:
        steps, before, start = 0, joules(), time.perf_counter()
        while steps == 0 or time.perf_counter() - start < seconds:
            step()
            steps += 1
        took, after = time.perf_counter() - start, joules()
    finally:
        done.set()
        watcher.join()
    if failed:
        raise failed[0]
    name = lambda handle: str(nvml.nvmlDeviceGetName(handle))
    return [
        GPUUse(name(h), steps, took / steps, (b - a) / steps, statistics.fmean(shares[i] or [0.0]), most[i])
        for i, (h, a, b) in enumerate(zip(handles, before, after))
    ]
