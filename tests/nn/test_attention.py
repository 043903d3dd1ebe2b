"""The attention layer: its kernels agree, its cache replays the full pass, its mistakes are named."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from revjax.models import Decoder, DecoderConfig, value_and_grad
from revjax.nn import Attention, KVCache, Rotary, attention

TOLERANCE = dict(rtol=1e-4, atol=1e-5)  # fp32, another order of summation


@pytest.mark.parametrize(
    "options",
    [
        dict(causal=True, window=4),
        dict(segment_ids=True, window=3),
        dict(causal=True, q_offset=3),
    ],
)
def test_flash_and_the_plain_definition_agree(options):
    options = dict(options)
    q, k, v = normal(0, 2, 9, 4, 8), normal(1, 2, 9, 2, 8), normal(2, 2, 9, 2, 8)
    if options.pop("segment_ids", False):
        options["q_segments_BT"] = options["k_segments_BS"] = jnp.arange(18).reshape(2, 9) // 4
    flash, plain, auto = (attention(q, k, v, implementation=i, **options) for i in ("flash", "xla", "auto"))
    np.testing.assert_allclose(flash, plain, **TOLERANCE)
    np.testing.assert_array_equal(auto, flash)


def test_the_plain_definition_is_that_of_jax():
    q, k, v = normal(0, 2, 9, 4, 8), normal(1, 2, 9, 2, 8), normal(2, 2, 9, 2, 8)
    expected = jax.nn.dot_product_attention(q, k, v, is_causal=True, local_window_size=(2, 0), implementation="xla")
    actual = attention(q, k, v, causal=True, window=3, implementation="xla")
    np.testing.assert_allclose(actual, expected, **TOLERANCE)


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="says why cuDNN cannot run on a machine without a GPU")
def test_cudnn_without_a_gpu_says_so():
    x = jnp.ones((1, 4, 2, 8), jnp.bfloat16)
    with pytest.raises(ValueError, match="needs an NVIDIA GPU"):
        attention(x, x, x, implementation="cudnn")


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("options", [dict(causal=True), dict(causal=True, window=9), dict()])
def test_cudnn_and_flash_agree(options):
    q, k, v = (normal(i, 2, 128, n, 64).astype(jnp.bfloat16) for i, n in enumerate((4, 2, 2)))
    run = lambda implementation: attention(q, k, v, implementation=implementation, **options).astype(jnp.float32)
    np.testing.assert_allclose(run("cudnn"), run("flash"), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("plan, kernels", [("nothing", 2), ("attention", 1), ("inputs:1", 2), ("all", 1)])
def test_plan_attention_keeps_what_cudnn_computes(plan, kernels, monkeypatch):
    """How many forward kernels a gradient has, as lowered for a GPU (which need not be here)."""
    kernel = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(kernel, "check_cudnn_version", lambda: 91_900)
    monkeypatch.setattr(kernel, "check_compute_capability", lambda wanted: True)
    monkeypatch.setattr(kernel, "is_cuda_compute_capability_equal", lambda wanted: wanted == "9.0")
    monkeypatch.setattr(sys.modules["revjax.nn.attention"], "_cudnn_refuses", lambda *args, **options: None)
    config = DecoderConfig(d_model=128, num_layers=4, num_heads=2)
    model = nnx.eval_shape(lambda: Decoder(config, plan=plan, rngs=nnx.Rngs(0)))
    tokens = jax.ShapeDtypeStruct((2, 64), jnp.int32)
    gradient = lambda model, tokens: value_and_grad(lambda m: jnp.divide(*m.loss(tokens, tokens)))(model)
    text = jax.jit(gradient).trace(model, tokens).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("cudnn$fmhaSoftmax(") == kernels and text.count("cudnn$fmhaSoftmaxBackward(") == 1


@pytest.mark.parametrize(
    "options", [dict(), dict(num_kv_heads=2, rotary=Rotary(), qk_norm=True, use_bias=True), dict(window=3)]
)
def test_decoding_with_a_cache_equals_the_full_pass(options):
    layer = self_attention(**options)
    x = normal(0, 2, 9, 16)
    full = layer(x)
    cache = KVCache.zeros(2, 12, options.get("num_kv_heads", 4), 4, jnp.float32)
    step = jax.jit(lambda cache, x: layer(x, cache=cache))
    pieces = []
    for piece in (x[:, :5], x[:, 5:6], x[:, 6:7], x[:, 7:8], x[:, 8:9]):  # a prompt, then token by token
        y, aux = step(cache, piece)
        cache = aux["cache"]
        pieces.append(y)
    np.testing.assert_allclose(jnp.concatenate(pieces, axis=1), full, **TOLERANCE)
    assert cache.length == 9


def test_the_future_has_no_gradient_and_the_past_has():
    layer = self_attention(rotary=Rotary())
    dx = jax.grad(lambda x: jnp.sum(layer(x)[:, 4]))(normal(0, 2, 9, 16))
    assert not np.any(dx[:, 5:]) and np.all(np.any(dx[:, :5], axis=(0, 2)))


def test_a_bidirectional_layer_sees_the_future():
    dx = jax.grad(lambda x: jnp.sum(self_attention(causal=False)(x)[:, 4]))(normal(0, 2, 9, 16))
    assert np.all(np.any(dx, axis=(0, 2)))


def test_a_packed_document_is_computed_as_if_alone():
    layer, x = self_attention(), normal(0, 1, 9, 16)
    packed = layer(x, segment_ids=jnp.array([[0] * 4 + [1] * 5]))
    np.testing.assert_allclose(packed[:, 4:], layer(x[:, 4:]), **TOLERANCE)


def test_rotary_attention_depends_only_on_position_differences():
    layer, x = self_attention(rotary=Rotary()), normal(0, 2, 9, 16)
    shifted = layer(x, positions=jnp.arange(9)[None] + 100)
    np.testing.assert_allclose(shifted, layer(x), rtol=1e-3, atol=1e-4)  # angles of 100 rounded to fp32
    assert np.abs(layer(x, positions=jnp.arange(9)[None] * 3) - layer(x)).max() > 1e-2


def test_cross_attention_reads_all_of_its_context():
    layer = self_attention(context_dim=12)
    x, context = normal(0, 2, 5, 16), normal(1, 2, 7, 12)
    dcontext = jax.grad(lambda c: jnp.sum(layer(x, context=c)[:, 0]))(context)
    assert layer(x, context=context).shape == x.shape
    assert np.all(np.any(dcontext, axis=(0, 2)))


def test_dropout_needs_a_key_and_repeats_with_it():
    layer, x = self_attention(dropout=0.5), normal(0, 2, 9, 16)
    np.testing.assert_array_equal(layer(x), self_attention()(x))
    once, again, other = (layer(x, key=jax.random.key(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(once, again)
    assert np.any(once != other)


def test_out_init_scale_scales_the_output():
    x = normal(0, 2, 9, 16)
    np.testing.assert_allclose(self_attention(out_init_scale=0.5)(x), 0.5 * self_attention()(x), rtol=1e-6)


def test_the_layer_keeps_the_scale_of_its_input():
    layer = Attention(256, 8, causal=False, dtype=jnp.float32, rngs=nnx.Rngs(0))
    v = layer.value(normal(0, 4, 16, 256))
    assert 0.9 < jnp.std(v) < 1.1


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(num_heads=3), "num_heads must divide d_model"),
        (dict(num_kv_heads=3), "num_kv_heads must divide num_heads"),
        (dict(window=0), "window must be at least 1"),
        (dict(head_dim=5, rotary=Rotary()), "must be even"),
        (dict(dropout=1.0), "below 1"),
        (dict(implementation="fast"), "one of auto, flash, cudnn, xla"),
        (dict(context_dim=8, rotary=Rotary()), "no common positions"),
    ],
)
def test_impossible_layers_are_named_when_built(options, message):
    with pytest.raises(ValueError, match=message):
        self_attention(**options)


@pytest.mark.parametrize(
    "layer_options, call_options, message",
    [
        (dict(context_dim=8), dict(), "needs `context=`"),
        (dict(), dict(context=jnp.ones((2, 3, 16))), "takes no context"),
        (dict(causal=False), dict(cache=KVCache.zeros(2, 9, 4, 4)), "needs causal self-attention"),
        (
            dict(context_dim=8),
            dict(context=jnp.ones((2, 3, 8)), cache=KVCache.zeros(2, 9, 4, 4)),
            "needs causal self-attention",
        ),
        (dict(), dict(segment_ids=jnp.zeros((2, 9), int), cache=KVCache.zeros(2, 9, 4, 4)), "without a cache"),
    ],
)
def test_impossible_calls_are_named(layer_options, call_options, message):
    with pytest.raises(ValueError, match=message):
        self_attention(**layer_options)(jnp.ones((2, 9, 16)), **call_options)


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def self_attention(num_heads=4, **options):
    return Attention(16, num_heads, dtype=jnp.float32, rngs=nnx.Rngs(0), **options)
