"""Memory of the backward pass, as XLA compiles it: flat in depth, and kept bits cost what they say."""

import jax
import jax.numpy as jnp
import pytest

from revjax import core
from revjax.core import Run, reversible_scan

B, T, D, F = 2, 64, 64, 128


def f(w, x):
    h = jax.nn.silu(x.astype(jnp.bfloat16) @ w["up"].astype(jnp.bfloat16))
    return h @ w["down"].astype(jnp.bfloat16)


def temp_bytes(num_layers, coupling, plan="nothing", f=f):
    shapes = {"up": (num_layers, D, F), "down": (num_layers, F, D)}
    params = {k: jax.ShapeDtypeStruct(s, jnp.float32) for k, s in shapes.items()}
    loss = lambda w, x: jnp.mean(reversible_scan(Run(f, w), x, coupling=coupling, plan=plan).mean ** 2)
    compiled = jax.jit(jax.grad(loss)).lower(params, jax.ShapeDtypeStruct((B, T, D), jnp.float32)).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_memory_is_flat_in_depth():
    assert temp_bytes(128, core.RevNet()) <= 1.02 * temp_bytes(8, core.RevNet())


@pytest.mark.parametrize("plan", ["inputs:1", "all"])
def test_the_memory_test_can_fail(plan):
    assert temp_bytes(128, core.RevNet(), plan) > 4 * temp_bytes(8, core.RevNet(), plan)


@pytest.mark.parametrize("shift", [1, 2, 4, 8])
def test_kept_bits_cost_what_they_say(shift):
    grows = temp_bytes(128, core.NearResidual(shift)) - temp_bytes(64, core.NearResidual(shift))
    bits, checksums = 64 * B * T * D * shift // 8, 64 * B * 4
    assert bits <= grows <= bits + 8 * checksums


def test_parts_of_a_run_cost_what_is_kept_of_them_and_copy_no_parameters():
    """128 layers with their parameters: a copy of those of 96 would be 6 MB."""
    alone, both = temp_bytes(128, core.RevNet()), temp_bytes(128, core.RevNet(), "96 nothing, 32 all")
    stored = temp_bytes(32, core.RevNet(), "all")
    assert stored < both <= max(alone, stored) + 0.1 * stored
    of_keyframes = [temp_bytes(128, core.RevNet(), plan) for plan in ("inputs:8", "120 inputs:8, 8 inputs:7")]
    assert of_keyframes[1] <= 1.05 * of_keyframes[0]


def test_keyframes_cost_two_streams_each():
    grows = temp_bytes(128, core.RevNet(), "inputs:4") - temp_bytes(64, core.RevNet(), "inputs:4")
    streams = 64 // 4 * 2 * B * T * D * 4
    assert streams <= grows <= 1.1 * streams


def test_what_is_kept_by_name_costs_its_own_bytes():
    """Two bytes for each number of bf16, though what reads them converts to fp32 first."""

    def named(w, x):
        h = jax.ad_checkpoint.checkpoint_name(x.astype(jnp.bfloat16) @ w["up"].astype(jnp.bfloat16), "hidden")
        return jax.nn.silu(h) @ w["down"].astype(jnp.bfloat16)

    bytes_of = lambda num_layers: temp_bytes(num_layers, core.RevNet(), core.Reverse(("hidden",)), named)
    grows = bytes_of(128) - bytes_of(64)
    hidden, checksums = 64 * B * T * F * 2, 64 * B * 4
    assert hidden <= grows <= hidden + 8 * checksums


def test_a_gradient_lowers_for_other_platforms():
    loss = lambda w, x: jnp.mean(reversible_scan(Run(f, w), x, coupling=core.NearResidual(1)).mean ** 2)
    w = {"up": jnp.zeros((4, D, F)), "down": jnp.zeros((4, F, D))}
    traced = jax.jit(jax.grad(loss)).trace(w, jnp.zeros((B, T, D)))
    for platform in ("cuda", "tpu"):
        assert traced.lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("coupling", [core.RevNet(), core.Residual()], ids=lambda coupling: type(coupling).__name__)
def test_keyframes_go_to_the_host_and_come_back_but_not_on_a_cpu(coupling):
    """Where they live is all that `host` changes: what is lowered for a GPU is otherwise what `inputs` is."""
    w = {"up": jnp.zeros((6, D, F)), "down": jnp.zeros((6, F, D))}

    def text(plan, platform):
        loss = lambda w, x: jnp.mean(reversible_scan(Run(f, w), x, coupling=coupling, plan=plan).out ** 2)
        return jax.jit(jax.grad(loss)).trace(w, jnp.zeros((B, T, D))).lower(lowering_platforms=(platform,)).as_text()

    moved = text("2 inputs, 4 host:2", "cuda")
    moves = [moved.count(f'_xla_buffer_placement = "{kind}"') for kind in ("pinned_host", "device")]
    assert moves == [coupling.order, coupling.order]
    assert "pinned_host" not in text("inputs:2", "cuda")
    with pytest.raises(ValueError, match="'host' keeps streams in the host's memory, but a CPU has no other"):
        text("2 inputs, 4 host:2", "cpu")


@pytest.mark.skipif(jax.default_backend() == "cpu", reason="a CPU has no memory beside that of the host")
def test_keyframes_on_the_host_give_the_same_bits():
    keys = jax.random.split(jax.random.key(0), 2)
    w = {"up": jax.random.normal(keys[0], (6, D, F)) / 8, "down": jax.random.normal(keys[1], (6, F, D)) / 8}
    loss = lambda w, x, plan: jnp.mean(reversible_scan(Run(f, w), x, plan=plan).out ** 2)
    gradient = jax.jit(jax.grad(loss), static_argnums=2)
    found = [gradient(w, jax.random.normal(keys[0], (B, T, D)), plan) for plan in ("inputs:2", "host:2", "host:4")]
    for other in found[1:]:
        assert jax.tree.all(jax.tree.map(lambda a, b: jnp.array_equal(a, b), found[0], other))
