"""Power and energy are those that the driver tells; where it tells none, the reason is said."""

import shutil
import sys
import time
import types

import jax
import pytest

from revjax.benchmarking.accelerator import _energy
from revjax.experiment import describe_gpu_use
from revjax.memory import gpu_use

ON_GPU = jax.default_backend() == "gpu"


class Driver(types.ModuleType):
    """Stands for NVML where there is no GPU: a device counts 22 J for the first step, and 11 for each of the others."""

    class NVMLError(Exception):
        pass

    def __init__(self, refuses=""):
        super().__init__("pynvml")
        self.opened, self.asked, self.steps, self.refuses = 0, [], 0, refuses

    def step(self):
        time.sleep(0.11)
        self.steps += 1

    def nvmlInit(self):
        self.opened += 1

    def nvmlShutdown(self):
        self.opened -= 1

    def nvmlDeviceGetHandleByIndex(self, index):
        self.asked.append(index)
        return index

    nvmlDeviceGetHandleByUUID = nvmlDeviceGetHandleByIndex

    def nvmlDeviceGetName(self, handle):
        return f"device {handle}"

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):  # mJ
        return 5_000_000 + (11_000 * self.steps + 11_000 if self.steps else 0)

    def nvmlDeviceGetUtilizationRates(self, handle):
        if self.refuses:
            raise self.NVMLError(self.refuses)
        return types.SimpleNamespace(gpu=50 if self.steps else 100)

    def nvmlDeviceGetMemoryInfo(self, handle):
        return types.SimpleNamespace(used=3_000 - self.steps)


@pytest.fixture
def two_devices(monkeypatch):
    devices = [types.SimpleNamespace(platform="gpu", local_hardware_id=i) for i in range(2)]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def test_energy_is_the_counters_difference_by_step(two_devices, monkeypatch):
    driver = Driver()
    monkeypatch.setitem(sys.modules, "pynvml", driver)
    first, second = gpu_use(driver.step, seconds=0.3)
    assert first.steps == second.steps == driver.steps == 3 and driver.asked == [0, 1] and driver.opened == 0
    assert (
        first.step_joules == pytest.approx((3 * 11 + 11) / 3) and first.watts == first.step_joules / first.step_seconds
    )
    assert 0.11 <= first.step_seconds < 1 and 0.5 <= first.utilization < 1 and first.memory_bytes == 3_000
    line, other = describe_gpu_use([first, second], tokens=1000).splitlines()
    assert (
        line.startswith("power        ") and "14.7 J a step, 14.7 mJ a token" in line and "(device 0, 3 steps" in line
    )
    assert other.startswith("             ") and "(device 1, 3 steps" in other


def test_rows_of_the_benchmark_have_energy_or_say_why_not(two_devices, monkeypatch):
    driver = Driver()
    monkeypatch.setitem(sys.modules, "pynvml", driver)
    found = _energy(driver.step, 100)
    assert found["joules"] == pytest.approx((11 * driver.steps + 11) / driver.steps)
    assert found["joules_per_token"] == found["joules"] / 100 and found["watts"] > 0
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert "nvidia-ml-py is not installed" in _energy(driver.step, 100)["no_energy"]


def test_devices_are_those_that_cuda_shows(two_devices, monkeypatch):
    driver = Driver()
    monkeypatch.setitem(sys.modules, "pynvml", driver)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, GPU-5e1f")
    assert len(gpu_use(driver.step, seconds=0)) == 2 and driver.asked == [3, "GPU-5e1f"] and driver.steps == 1


def test_a_refusal_is_a_reason(two_devices, monkeypatch):
    driver = Driver(refuses="Not Supported")
    monkeypatch.setitem(sys.modules, "pynvml", driver)
    with pytest.raises(ValueError, match="the driver does not tell it: Not Supported"):
        gpu_use(driver.step, seconds=0)
    assert driver.opened == 0
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(ValueError, match="Type: pip install nvidia-ml-py"):
        gpu_use(driver.step)


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="there is a driver")
def test_without_a_driver_nvml_says_so(two_devices):
    pytest.importorskip("pynvml", reason="asks NVIDIA's library (nvidia-ml-py)")
    with pytest.raises(ValueError, match="the driver does not tell it: NVML Shared Library Not Found"):
        gpu_use(lambda: None)


@pytest.mark.skipif(ON_GPU, reason="says what other devices cannot")
def test_other_devices_do_not_tell():
    with pytest.raises(ValueError, match=f"only NVIDIA GPUs tell it, and jax uses {jax.default_backend()}"):
        gpu_use(lambda: None)


@pytest.mark.skipif(not ON_GPU, reason="needs an NVIDIA GPU")
def test_a_gpu_draws_power():
    pytest.importorskip("pynvml", reason="asks NVIDIA's library (nvidia-ml-py)")
    x = jax.random.normal(jax.random.key(0), (4096, 4096))
    product = jax.jit(lambda x: x @ x)
    use = gpu_use(lambda: jax.block_until_ready(product(x)), seconds=2)[0]
    assert 20 < use.watts < 2000 and 0 < use.utilization <= 1 and use.memory_bytes > x.nbytes
