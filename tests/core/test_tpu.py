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


def f(w, x):
    x = x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)
    h = jax.nn.silu(x.astype(jnp.bfloat16) @ w["up"].astype(jnp.bfloat16))
    return h @ w["down"].astype(jnp.bfloat16)


def temp_bytes(num_layers, plan="nothing"):
    from jax.experimental import topologies

    device = topologies.get_topology_desc("v5e:2x2", platform="tpu").devices[0]
    sharding = jax.sharding.SingleDeviceSharding(device)
    abstract = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)
    w = {"up": abstract(num_layers, D, F), "down": abstract(num_layers, F, D)}
    loss = lambda w, x: jnp.mean(reversible_scan(Run((f, f), w), x, coupling=core.RevNet(), plan=plan).mean ** 2)
    compiled = jax.jit(jax.grad(loss)).lower((w, w), abstract(B, T, D)).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_memory_on_a_tpu_is_flat_in_depth():
    """Also of casts of the parameters, which XLA would do for all layers at once."""
    assert temp_bytes(32) <= 1.02 * temp_bytes(8)


def test_the_memory_test_can_fail():
    assert temp_bytes(32, "inputs") > 3 * temp_bytes(8, "inputs")
