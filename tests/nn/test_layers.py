"""Norms, dense layers, embeddings, the MLP, and what holds for every module."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from revjax.nn import MLP, Attention, Embedding, LayerNorm, LearnedPositions, Linear, RMSNorm, Rotary

MODULES = {
    "RMSNorm": lambda rngs: RMSNorm(8, rngs=rngs),
    "LayerNorm": lambda rngs: LayerNorm(8, rngs=rngs),
    "LayerNorm without bias": lambda rngs: LayerNorm(8, use_bias=False, rngs=rngs),
    "Linear": lambda rngs: Linear(8, (2, 4), use_bias=True, rngs=rngs),
    "MLP": lambda rngs: MLP(8, 16, gated=True, use_bias=True, dropout=0.5, rngs=rngs),
    "Attention": lambda rngs: Attention(
        8, 2, num_kv_heads=1, qk_norm=True, rotary=Rotary(), use_bias=True, dropout=0.5, rngs=rngs
    ),
    "Embedding": lambda rngs: Embedding(5, 8, rngs=rngs),
    "LearnedPositions": lambda rngs: LearnedPositions(5, 8, rngs=rngs),
}


@pytest.mark.parametrize("name", MODULES)
def test_modules_hold_fp32_parameters_and_nothing_else(name):
    module = MODULES[name](nnx.Rngs(0))
    assert not jax.tree.leaves(nnx.state(module, nnx.RngState))
    leaves = jax.tree.leaves(nnx.state(module, nnx.Param))
    assert leaves and all(x.dtype == jnp.float32 for x in leaves)
    assert len(leaves) == len(jax.tree.leaves(nnx.state(module)))


@pytest.mark.parametrize("name", MODULES)
def test_equal_modules_have_equal_hashable_graphs(name):
    one, other = (nnx.split(MODULES[name](nnx.Rngs(seed)))[0] for seed in (0, 1))
    assert one == other and hash(one) == hash(other)


@pytest.mark.parametrize("name", ["RMSNorm", "LayerNorm", "Linear", "MLP", "Attention"])
def test_modules_merge_inside_transformations_and_change_no_variable(name):
    graphdef, params = nnx.split(MODULES[name](nnx.Rngs(0)))
    x = jax.random.normal(jax.random.key(0), (2, 3, 8))
    before = jax.tree.map(np.asarray, nnx.to_pure_dict(params))
    f = lambda params, x: nnx.merge(graphdef, params)(x)
    y, vjp = jax.jit(lambda params, x: jax.vjp(f, params, x))(params, x)
    assert y.dtype == jnp.bfloat16
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(vjp(y)))
    jax.tree.map(np.testing.assert_array_equal, nnx.to_pure_dict(params), before)


def test_rms_norm_is_its_equation_in_fp32_whatever_comes_in():
    x = 300 * jax.random.normal(jax.random.key(0), (2, 3, 8)).astype(jnp.bfloat16)
    norm = RMSNorm(8, eps=1e-3, offset=1.0, dtype=jnp.float32, rngs=nnx.Rngs(0))
    norm.scale[...] = jnp.arange(8.0)
    high = np.asarray(x, np.float64)
    expected = high / np.sqrt(np.mean(high**2, -1, keepdims=True) + 1e-3) * (1 + np.arange(8.0))
    np.testing.assert_allclose(norm(x), expected, rtol=1e-6)


def test_an_offset_changes_what_is_stored_and_not_what_is_computed_at_first():
    x = jax.random.normal(jax.random.key(0), (3, 8))
    plain, gemma = RMSNorm(8, rngs=nnx.Rngs(0)), RMSNorm(8, offset=1.0, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(plain(x), gemma(x))
    assert not np.any(gemma.scale[...]) and np.all(plain.scale[...] == 1)


def test_layer_norm_is_its_equation():
    x = 7 + jax.random.normal(jax.random.key(0), (2, 3, 8))
    norm = LayerNorm(8, dtype=jnp.float32, rngs=nnx.Rngs(0))
    norm.scale[...], norm.bias[...] = jnp.arange(8.0), jnp.ones(8)
    high = np.asarray(x, np.float64)
    expected = (high - high.mean(-1, keepdims=True)) / np.sqrt(high.var(-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(norm(x), expected * np.arange(8.0) + 1, rtol=1e-4, atol=1e-5)


def test_linear_contracts_several_axes():
    x = jax.random.normal(jax.random.key(0), (2, 3, 4, 5))
    layer = Linear((4, 5), (6, 7), use_bias=True, dtype=jnp.float32, rngs=nnx.Rngs(0))
    layer.bias[...] = jnp.arange(42.0).reshape(6, 7)
    expected = np.einsum("btnh,nhcd->btcd", x, layer.kernel[...]) + np.arange(42.0).reshape(6, 7)
    np.testing.assert_allclose(layer(x), expected, rtol=1e-5, atol=1e-5)


def test_gradients_of_linear_are_those_of_the_einsum():
    x = jax.random.normal(jax.random.key(0), (2, 3, 4, 5))
    layer = Linear((4, 5), (6, 7), dtype=jnp.float32, rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(layer)
    own = lambda params, x: jnp.sum(jnp.sin(nnx.merge(graphdef, params)(x)))
    plain = lambda params, x: jnp.sum(jnp.sin(jnp.einsum("btnh,nhcd->btcd", x, params["kernel"][...])))
    for actual, expected in zip(*(jax.tree.leaves(jax.grad(f, (0, 1))(params, x)) for f in (own, plain)), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


def test_gradients_of_kernels_are_summed_in_fp32():
    layer = Linear(1, 1, rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(layer)
    dkernel = jax.grad(lambda params: jnp.sum(nnx.merge(graphdef, params)(jnp.ones((257, 1)))))(params)
    assert dkernel["kernel"][...] == 257  # bf16 has 256 and 258


def test_linear_names_a_wrong_width():
    with pytest.raises(ValueError, match=r"must be \(4,\), but x has the shape \(2, 5\)"):
        Linear(4, 3, rngs=nnx.Rngs(0))(jnp.ones((2, 5)))


def test_kernels_start_with_fan_in_variance():
    assert 0.98 < 16 * jnp.std(Linear((16, 16), 400, rngs=nnx.Rngs(0)).kernel[...]) < 1.02
    assert 0.98 < 32 * jnp.std(MLP(64, 256, out_init_scale=0.5, rngs=nnx.Rngs(0)).down.kernel[...]) < 1.02


def test_a_tied_head_is_the_transposed_table():
    embedding = Embedding(11, 8, dtype=jnp.float32, rngs=nnx.Rngs(0))
    tokens = jnp.array([[3, 10], [0, 3]])
    x = embedding.encode(tokens)
    assert x.dtype == jnp.float32
    np.testing.assert_array_equal(x, np.asarray(embedding.table[...])[np.asarray(tokens)])
    np.testing.assert_allclose(embedding.attend(x), x @ embedding.head_kernel, rtol=1e-6)


def test_tokens_and_positions_beyond_the_table_give_nan():
    assert np.all(np.isnan(Embedding(11, 8, rngs=nnx.Rngs(0)).encode(jnp.array([[11, -1, -100]]))))
    assert np.all(np.isnan(LearnedPositions(4, 8, rngs=nnx.Rngs(0))(jnp.array([[4, -1]]))))


@pytest.mark.parametrize("activation", ["gelu", "silu", "relu"])
@pytest.mark.parametrize("gated", [False, True])
def test_the_mlp_is_its_equation(activation, gated):
    mlp = MLP(8, 16, activation=activation, gated=gated, dtype=jnp.float32, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (2, 3, 8))
    act = getattr(jax.nn, activation)
    up = x @ mlp.up.kernel[...]
    hidden = act(x @ mlp.gate.kernel[...]) * up if gated else act(up)
    np.testing.assert_allclose(mlp(x), hidden @ mlp.down.kernel[...], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("gated, hidden", [(False, 2), (True, 3)])
def test_the_backward_pass_of_an_mlp_keeps_no_step_inside_the_activation(gated, hidden):
    mlp, x = MLP(8, 16, gated=gated, rngs=nnx.Rngs(0)), jnp.ones((2, 5, 8), jnp.bfloat16)
    _, vjp = jax.vjp(lambda x: mlp(x), x)
    kept = sum(a.nbytes for a in jax.tree.leaves(vjp) if getattr(a, "dtype", None) == jnp.bfloat16)
    wide = sum(a.nbytes for a in jax.tree.leaves(vjp) if getattr(a, "shape", ())[:2] == (2, 5)) - kept
    assert kept == (2 * 5) * 2 * (hidden * 16 + (2 if gated else 1) * 8) and wide == 0


def test_mlp_mistakes_are_named():
    with pytest.raises(ValueError, match="one of gelu, gelu_exact, silu, relu, but got 'swish'"):
        MLP(8, 16, activation="swish", rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="below 1"):
        MLP(8, 16, dropout=-0.1, rngs=nnx.Rngs(0))
