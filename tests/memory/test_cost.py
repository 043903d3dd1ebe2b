"""Costs counted by hand are near those of compiled steps, and follow what a user may change."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from revjax.benchmarking.memory import step_temp_bytes
from revjax.memory import options_to_measure, step_cost
from revjax.models import DecoderConfig

CONFIG = DecoderConfig(num_layers=6, d_model=192, num_heads=6, loss_tile=256)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="counted in profiles of CPU programs")
@pytest.mark.parametrize("plan, dtype", [("nothing", "bfloat16"), ("attention", "float32"), ("all", "bfloat16")])
def test_counted_bytes_are_near_those_of_the_compiled_step(plan, dtype):
    config = dataclasses.replace(CONFIG, dtype=dtype)
    compiled, size = step_temp_bytes(config, 2, 1024, plan)
    cost = step_cost(config, 2, 1024, plan=plan, num_params=size, state_bytes=0)
    assert 0.9 * compiled < cost.bytes < 1.1 * compiled


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="counted in profiles of CPU programs")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("readout", ["last", "concat"])
def test_what_the_loss_holds_of_the_streams_is_counted(dtype, readout):
    config = DecoderConfig(
        num_layers=6, d_model=64, num_heads=2, vocab_size=8192, loss_tile=1024, dtype=dtype, readout=readout
    )
    compiled, size = step_temp_bytes(config, 4, 2048, "nothing")
    cost = step_cost(config, 4, 2048, plan="nothing", num_params=size, state_bytes=0)
    assert cost.highest == "loss" and 0.95 * compiled < cost.bytes < 1.05 * compiled


@pytest.mark.optimized
def test_a_program_that_is_only_measured_has_the_bytes_of_the_one_that_is_run():
    a, b = jnp.ones((64, 256)), jnp.ones((256, 256))
    f = jax.jit(jax.grad(lambda b, a: jnp.sum(jax.lax.scan(lambda a, _: (jnp.tanh(a @ b), None), a, None, 8)[0])))
    backend = jax.default_backend()
    found = [f.lower(b, a).compile(options).memory_analysis() for options in ({}, options_to_measure(backend))]
    assert found[0].temp_size_in_bytes == found[1].temp_size_in_bytes > 8 * a.nbytes


WIDE = dataclasses.replace(CONFIG, d_ff=2048)


def count(config=WIDE, rows=4, length=256, **how):
    return step_cost(config, rows, length, num_params=10**6, state_bytes=12 * 10**6, **how)


def test_what_is_kept_grows_with_depth_only_where_something_is():
    deep = dataclasses.replace(WIDE, num_layers=60)
    assert count(deep).moments == count().moments and count().kept == 0
    for plan in ("attention", "all", "inputs:2"):
        assert count(deep, plan=plan).kept > 2 * count(plan=plan).kept > 0
    assert count(deep, plan="host:2").kept == count(plan="host:2").kept > 0
    assert count(deep, plan="host:2").bytes < count(deep, plan="inputs:2").bytes
    assert count(deep, plan="host:2").time > count(deep, plan="inputs:2").time
    bits = dataclasses.replace(WIDE, coupling="near-residual:2")
    assert count(bits).kept == 6 * 2 * (4 * 256 * 192) * 2 // 8


def test_time_and_bytes_go_against_each_other():
    plans = [count(plan=plan) for plan in ("all", "attention", "nothing")]
    assert [c.time for c in plans] == sorted(c.time for c in plans)
    assert [c.bytes for c in plans] == sorted((c.bytes for c in plans), reverse=True)
    for less in (count(plan="all", accumulation=4), count(dataclasses.replace(WIDE, mlp_chunk=64), plan="nothing")):
        whole = count(plan="all") if less.kept else count()
        assert less.bytes < whole.bytes and less.time > whole.time


def test_a_large_vocabulary_makes_the_loss_the_highest_moment():
    large = dataclasses.replace(WIDE, vocab_size=100_000, loss_tile=1024)
    assert count(large).highest == "loss" and count().highest == "MLP"
    assert count(dataclasses.replace(large, loss_tile=128)).bytes < 0.6 * count(large).bytes
