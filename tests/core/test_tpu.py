"""Compiled for a TPU, without one: libtpu knows its memory. `pip install libtpu` beside jax 0.12 runs these tests."""

import importlib.util
import os

import jax
import jax.numpy as jnp
import pytest

from revjax import core
from revjax.core import Run, reversible_scan

if importlib.util.find_spec("libtpu") is None:
    pytest.skip("needs libtpu to compile for a TPU (pip install libtpu)", allow_module_level=True)

os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # nothing here needs a TPU for itself alone

B, T, D, F = 1, 2048, 512, 1024


@pytest.fixture(autouse=True)
def _kept_nowhere():
    """What is compiled for a TPU cannot be read back without one."""
    name = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, name)
    jax.config.update(name, float("inf"))
    yield
    jax.config.update(name, before)


def f(w, x, side=None):
    w = w if side is None else side
    x = x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)
    h = jax.nn.silu(x.astype(jnp.bfloat16) @ w["up"].astype(jnp.bfloat16))
    return h @ w["down"].astype(jnp.bfloat16)


def memory(num_layers, plan="nothing", frozen=False, coupling=None):
    from jax.experimental import topologies

    device = topologies.get_topology_desc("v5e:2x2", platform="tpu").devices[0]
    sharding = jax.sharding.SingleDeviceSharding(device)
    abstract = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)
    w = {"up": abstract(num_layers, D, F), "down": abstract(num_layers, F, D)}

    def loss(x, w):
        run = Run((f, f), ({}, {}), side_L=w) if frozen else Run((f, f), w)
        return jnp.mean(reversible_scan(run, x, coupling=coupling, plan=plan).out ** 2)

    gradient = jax.grad(loss, argnums=0 if frozen else 1)
    return jax.jit(gradient).lower(abstract(B, T, D), (w, w)).compile().memory_analysis()


def temp_bytes(*args, **options):
    return memory(*args, **options).temp_size_in_bytes


def test_memory_on_a_tpu_is_flat_in_depth():
    """Also of casts of the parameters, frozen ones too, which XLA would do for all layers at once."""
    for frozen in (False, True):
        assert temp_bytes(32, frozen=frozen) <= 1.02 * temp_bytes(8, frozen=frozen)


def test_the_memory_test_can_fail():
    assert temp_bytes(32, "inputs") > 3 * temp_bytes(8, "inputs")


def test_keyframes_on_the_host_are_off_the_device():
    few, many = (memory(n, "host:4", coupling=core.Residual()) for n in (8, 32))
    assert many.temp_size_in_bytes <= 1.02 * few.temp_size_in_bytes
    assert many.host_temp_size_in_bytes == 8 * B * T * D * 4  # one stream of int32 every 4 layers
