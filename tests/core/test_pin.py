"""A pinned program has the same bits alone and beside its gradient, under default compiler flags."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from revjax.core import NearResidual, Run, pin, reversible_scan

pytestmark = pytest.mark.optimized

B, T, N, D, F = 4, 512, 4, 256, 768


def attention(w, x):
    h = x.astype(jnp.bfloat16) * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True)).astype(jnp.bfloat16)
    q, k, v = jnp.split((h @ w["qkv"].astype(jnp.bfloat16)).reshape(B, T, N, -1), 3, axis=-1)
    o = jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(B, T, D)
    return (o @ w["o"].astype(jnp.bfloat16)).astype(x.dtype)


def mlp(w, x):
    h = x.astype(jnp.bfloat16)
    return (jax.nn.silu(h @ w["up"].astype(jnp.bfloat16)) @ w["down"].astype(jnp.bfloat16)).astype(x.dtype)


def weights(num_layers):
    kq, ko, ku, kd = jax.random.split(jax.random.key(0), 4)
    normal = lambda k, *shape: 0.04 * jax.random.normal(k, (num_layers, *shape))
    return {"qkv": normal(kq, D, 3 * D), "o": normal(ko, D, D)}, {"up": normal(ku, D, F), "down": normal(kd, F, D)}


def test_a_stack_is_exact_at_a_shape_where_excess_precision_breaks_it_unpinned():
    params_L = weights(6)
    x = jax.random.normal(jax.random.key(1), (B, T, D))
    loss = lambda c: jnp.mean(reversible_scan(Run((attention, mlp), params_L), x, canary=c).last ** 2)
    assert not jax.jit(jax.grad(loss))(jnp.zeros((12, 3)))[:, 0].any()


def test_every_low_precision_result_is_rounded_also_in_loops():
    def f(x):
        body = lambda x, _: (jnp.tanh(x * 1.1), None)
        x, _ = jax.lax.scan(body, x, None, length=3)
        x = jax.lax.cond(x[0] > 0, jnp.sin, jnp.cos, x)
        return jax.lax.fori_loop(0, 2, lambda _, x: x + 1, jax.nn.silu(x))

    x = jnp.ones(8, jnp.bfloat16)
    text = str(jax.make_jaxpr(pin(f))(x))
    assert text.count("reduce_precision") >= 6
    assert (pin(f)(x) == f(x)).all()


def test_a_gpu_rounds_by_conversions_to_the_same_numbers(monkeypatch):
    """Where arithmetic is not free beside memory: see `_Pinned._narrow`."""

    def f(x, w):
        y = jax.nn.silu((x @ w).reshape(4, 2, 8)) * 1.7
        return (jnp.max(y, axis=1) @ w[:8]).T, jnp.sum(y, axis=-1)

    x, w = (jax.random.normal(jax.random.key(i), (n, 16), jnp.bfloat16) for i, n in enumerate((4, 16)))
    expected = pin(f)(x, w)  # operation by operation, where nothing is merged
    of_platform = lambda *args, default, **others: others.get("cuda", default)(*args)
    monkeypatch.setattr(jax.lax, "platform_dependent", of_platform)
    for a, b in zip(pin(f)(x, w), expected, strict=True):
        assert a.dtype == b.dtype == jnp.bfloat16 and (a == b).all()
    assert "reduce_precision" not in str(jax.make_jaxpr(pin(f))(x, w))


def test_custom_derivatives_survive_in_the_scan():
    """relu'(0) is 0 by jax's custom rule, and a straight-through estimator has the gradient it was given."""

    @jax.custom_vjp
    def straight_through(x):
        return jnp.round(x)

    straight_through.defvjp(lambda x: (jnp.round(x), None), lambda _, dx: (3.0 * dx,))
    f = lambda w, x: w * straight_through(jax.nn.relu(x))
    run = lambda w, x: reversible_scan(Run(f, w), x).last.sum()
    x = jnp.array([[0.0, 1.2, -1.0]])
    assert jax.grad(run, 1)(jnp.ones((1, 1, 1)), x).tolist() == [[1.0, 4.0, 1.0]]


def test_the_order_of_a_sum_does_not_depend_on_what_stands_beside_it():
    """fp32 sums of rows of 32, as in RMSNorm: unpinned, XLA may add in another order beside a gradient."""
    w_L = jax.random.normal(jax.random.key(1), (2, 6, 32, 32)) / 32**0.5
    x = jax.random.normal(jax.random.key(0), (2, 24, 32))

    def num_wrong(scale):
        f = lambda w, x: (x * jax.lax.rsqrt(scale(x)[..., None] / 32 + 1e-6)) @ w
        run = Run((f, f), (w_L[0], w_L[1]))
        loss = lambda c: jnp.mean(reversible_scan(run, x, coupling=NearResidual(1), canary=c).mean ** 2)
        return jax.jit(jax.grad(loss))(jnp.zeros((12, 3)))[:, 0].sum()

    assert num_wrong(lambda x: jnp.sum(x * x, -1)) == 0
    assert num_wrong(lambda x: jnp.einsum("btd,btd->bt", x, x)) == 0
    # Whether it breaks unpinned depends on compiler and processor (jax 0.10.2: 22 rows wrong), so ask the programs.
    total = lambda x: jnp.sum(x * x, -1) + jnp.einsum("btd,btd->bt", x, x)
    assert "reduce_sum" in str(jax.make_jaxpr(total)(x))
    assert "reduce_sum" not in str(jax.make_jaxpr(pin(total))(x))


def test_a_pinned_sum_is_the_sum():
    x = jax.random.normal(jax.random.key(0), (3, 4, 5))
    for axis in (0, 1, (0, 2), None):
        assert jnp.allclose(pin(lambda x, axis=axis: jnp.sum(x, axis))(x), jnp.sum(x, axis), atol=1e-5)
    dot = lambda a, b: jnp.einsum("abc,cab->a", a, b)
    assert jnp.allclose(pin(dot)(x, x.transpose(2, 0, 1)), dot(x, x.transpose(2, 0, 1)), atol=1e-5)
    assert pin(lambda x: jnp.sum(x, 0))(jnp.zeros((0, 3))).tolist() == [0.0, 0.0, 0.0]


def test_a_window_as_long_as_its_axis_is_a_sum_over_the_axis():
    x = jax.random.normal(jax.random.key(0), (2, 8, 5))
    window = lambda *size: lambda x: jax.lax.reduce_window(x, np.float32(0), jax.lax.add, size, (1, 1, 1), "VALID")
    for size in ((1, 8, 1), (1, 8, 5), (2, 1, 5)):
        assert "reduce_window" not in str(jax.make_jaxpr(pin(window(*size)))(x))
        assert jnp.allclose(pin(window(*size))(x), window(*size)(x), atol=1e-5)
    assert "reduce_window" in str(jax.make_jaxpr(pin(window(1, 3, 1)))(x))


def test_what_returns_nothing_runs_as_well():
    """jax.debug.print in a residual function, say: in the forward pass, and where f is run again."""
    seen = []

    def f(w, x):
        jax.debug.callback(lambda total: seen.append(float(total)), x.sum())
        return w * jnp.tanh(x)

    run = lambda w: reversible_scan(Run(f, w), jnp.ones((1, 2))).last.sum()
    jax.block_until_ready(jax.jit(jax.grad(run))(jnp.ones((3, 1, 1))))
    jax.effects_barrier()
    assert len(seen) >= 6
