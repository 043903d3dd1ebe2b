"""The tiled loss against optax's on full logits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from revjax.nn import cross_entropy

B, T, D, V = 3, 13, 8, 21


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    "tile_tokens, z_loss, softcap",
    [(1, 0.0, None), (12, 0.0, None), (12, 1e-2, None), (12, 1e-2, 0.8), (1000, 0.0, None)],
)
def test_loss_and_gradients_are_those_of_the_full_logits(tile_tokens, z_loss, softcap, weighted):
    x, kernel, targets, weights = inputs()
    weights = weights if weighted else jnp.ones_like(weights)

    def tiled(x, kernel, weights):
        total, count = cross_entropy(
            x, kernel, targets, weights, tile_tokens=tile_tokens, z_loss=z_loss, softcap=softcap, dtype=jnp.float32
        )
        return total / count

    def full(x, kernel, weights):
        logits = jnp.einsum("btd,dv->btv", x, kernel)
        logits = logits if softcap is None else softcap * jnp.tanh(logits / softcap)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        losses += z_loss * jax.nn.logsumexp(logits, axis=-1) ** 2
        return jnp.sum(weights * losses) / jnp.sum(weights)

    for f, g in ((tiled, full), (jax.grad(tiled, (0, 1, 2)), jax.grad(full, (0, 1, 2)))):
        actual, expected = jax.jit(f)(x, kernel, weights), jax.jit(g)(x, kernel, weights)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), actual, expected)


@pytest.mark.parametrize("outside", [-100, -1, V])
def test_a_target_outside_the_vocabulary_counts_nothing_or_is_no_number(outside):
    x, kernel, targets, weights = inputs()
    wrong, ignored = targets.at[1, 4].set(outside), weights.at[1, 4].set(0)
    assert all(jnp.isnan(total) for total in cross_entropy(x, kernel, wrong))
    assert cross_entropy(x, kernel, wrong, ignored) == cross_entropy(x, kernel, targets, ignored)


@pytest.mark.parametrize("tile_tokens", [12, 1000])
def test_a_bias_is_added_to_the_logits_and_has_a_gradient(tile_tokens):
    x, kernel, targets, weights = inputs()
    bias = jax.random.normal(jax.random.key(9), (V,))
    options = dict(tile_tokens=tile_tokens, dtype=jnp.float32)
    tiled = lambda x, kernel, bias: cross_entropy(x, kernel, targets, weights, bias_V=bias, **options)[0]

    def full(x, kernel, bias):
        logits = jnp.einsum("btd,dv->btv", x, kernel) + bias[None, None]
        return jnp.sum(weights * optax.softmax_cross_entropy_with_integer_labels(logits, targets))

    for f, g in ((tiled, full), (jax.grad(tiled, (0, 1, 2)), jax.grad(full, (0, 1, 2)))):
        actual, expected = jax.jit(f)(x, kernel, bias), jax.jit(g)(x, kernel, bias)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), actual, expected)
    with pytest.raises(ValueError, match=r"bias_V must have the shape \(21,\)"):
        cross_entropy(x, kernel, targets, bias_V=bias[:-1])


def test_the_gradient_of_a_sum_through_a_tied_kernel_runs_in_bf16():
    """XLA for CPUs has no kernel for the product that it would make of this by itself."""
    x, kernel, targets, _ = inputs()
    table_VD = jnp.asarray(kernel.T)
    loss = lambda table, dtype: cross_entropy(x, table.T, targets, dtype=dtype)[0]
    low, high = (jax.jit(jax.grad(functools.partial(loss, dtype=d)))(table_VD) for d in (jnp.bfloat16, jnp.float32))
    np.testing.assert_allclose(low, high, atol=0.02 * float(jnp.abs(high).max()))


def test_without_weights_every_token_counts_once():
    x, kernel, targets, _ = inputs()
    total, count = cross_entropy(x, kernel, targets)
    assert count == B * T and total.dtype == count.dtype == jnp.float32
    np.testing.assert_array_equal(total, cross_entropy(x, kernel, targets, jnp.ones((B, T), bool))[0])


def test_ignored_targets_may_be_anything():
    x, kernel, targets, _ = inputs()
    weights = jnp.ones((B, T)).at[:, 5:].set(0)
    loss = lambda x, targets: cross_entropy(x, kernel, targets, weights)[0]
    elsewhere = targets.at[:, 5:].set(-100)
    jax.tree.map(
        np.testing.assert_array_equal,
        jax.value_and_grad(loss)(x, targets),
        jax.value_and_grad(loss)(x, elsewhere),
    )


def test_bf16_gradients_are_near_those_of_fp32():
    x, kernel, targets, weights = inputs()
    grad = lambda dtype: jax.grad(
        lambda x, kernel: cross_entropy(x, kernel, targets, weights, dtype=dtype)[0], argnums=(0, 1)
    )(x, kernel)
    for low, high in zip(grad(jnp.bfloat16), grad(jnp.float32), strict=True):
        assert low.dtype == high.dtype == jnp.float32
        assert jnp.linalg.norm(low - high) < 2**-6 * jnp.linalg.norm(high)


def test_evaluation_does_no_gradient_work():
    x, kernel, targets, _ = inputs()
    loss = lambda x, kernel: cross_entropy(x, kernel, targets)[0]
    matmuls = lambda f: jax.jit(f).lower(x, kernel).as_text().count("stablehlo.dot_general")
    assert matmuls(loss) == 1 and matmuls(jax.grad(loss, argnums=(0, 1))) == 3


def gradient_bytes(loss, length, vocab=4096):
    x = jax.ShapeDtypeStruct((1, length, 16), jnp.float32)
    kernel = jax.ShapeDtypeStruct((16, vocab), jnp.float32)
    targets = jax.ShapeDtypeStruct((1, length), jnp.int32)
    grad = jax.grad(loss, argnums=(0, 1))
    return jax.jit(grad).lower(x, kernel, targets).compile().memory_analysis().temp_size_in_bytes


def test_no_logits_are_kept():
    tiled = lambda x, kernel, targets: cross_entropy(x, kernel, targets, tile_tokens=256)[0]
    growth = gradient_bytes(tiled, 8192) - gradient_bytes(tiled, 4096)
    assert growth < 4096 * 4 * (4 * 16 + 16)  # a few copies of hidden, and numbers per token


def test_the_memory_test_can_fail():
    def full(x, kernel, targets):
        logits = jnp.einsum("btd,dv->btv", x, kernel)
        return jnp.sum(optax.softmax_cross_entropy_with_integer_labels(logits, targets))

    assert gradient_bytes(full, 8192) - gradient_bytes(full, 4096) > 4096 * 4096 * 4


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(kernel_DV=jnp.ones((V, D))), ValueError, "head_kernel"),
        (dict(targets_BT=jnp.ones((B, T + 1), int)), ValueError, "targets must have the shape"),
        (dict(weights_BT=jnp.ones((B,))), ValueError, "weights must have the shape"),
        (dict(targets_BT=jnp.ones((B, T))), TypeError, "integers"),
        (dict(tile_tokens=0), ValueError, "at least 1"),
    ],
)
def test_mistakes_are_named(change, error, message):
    x, kernel, targets, _ = inputs()
    with pytest.raises(error, match=message):
        cross_entropy(**(dict(hidden_BTD=x, kernel_DV=kernel, targets_BT=targets) | change))


def inputs():
    key = jax.random.key(0)
    x, kernel = jax.random.normal(key, (B, T, D)), jax.random.normal(jax.random.fold_in(key, 1), (D, V))
    targets = jax.random.randint(jax.random.fold_in(key, 2), (B, T), 0, V)
    weights = jax.random.uniform(jax.random.fold_in(key, 3), (B, T)) * (targets > 3)
    return x, kernel, targets, weights
