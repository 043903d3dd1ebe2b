"""The residual branches of a transformer's layer: each maps x to an increment f(x) that the coupling adds to streams.

    pre     f(x) = g(norm(x))              g is attention, cross-attention or an MLP
    post    f(x) = norm(x + g(x)) - x      so that x + f(x) is what BERT's layer returns; taken in fp32

Projections back into the stream start smaller by sqrt(2 layers) (GPT-2), so that deep stacks begin near the identity.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ..nn import MLP, Attention, LayerNorm, RMSNorm, Rotary, dropout, relative_bias, stochastic_depth
from .transformer_config import LayerKind, TransformerConfig


class Branch(nnx.Module):
    """What stands around g: norms, a learned step, dropout."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        self.is_post = config.norm_placement == "post"
        dtype = jnp.promote_types(config.dtype, jnp.float32) if self.is_post else None
        self.norm = make_norm(config, dtype=dtype, rngs=rngs)
        self.post_norm = make_norm(config, rngs=rngs) if config.post_norm else None
        self.scale = make_layer_scale(config)
        self.dropout, self.stochastic_depth = config.dropout, config.stochastic_depth

    def read(self, x_BTD):
        """What g reads."""
        return x_BTD if self.is_post else self.norm(x_BTD)

    def increment(self, x_BTD, y_BTD, key):
        """f(x), where g has returned y."""
        y_BTD = y_BTD if self.post_norm is None else self.post_norm(y_BTD)
        y_BTD = _drop(_scale(y_BTD, self.scale), self.dropout, self.stochastic_depth, key)
        return self.norm(x_BTD + y_BTD.astype(x_BTD.dtype)) - x_BTD if self.is_post else y_BTD


class AttentionBranch(Branch):
    """Attention over x, an increment. Of a layer whose kind is "local", attention has the window."""

    def __init__(self, config: TransformerConfig, kind: LayerKind = "local", *, causal: bool = True, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        window = config.window if kind == "local" else None
        self.attention = _attention(config, causal=causal, window=window, rotary=_rotary(config, kind), rngs=rngs)

    def __call__(self, x_BTD, *, key=None, positions=None, segment_ids=None, cache=None) -> Any:
        inside, outside = _two_keys(key)
        read = self.read(x_BTD)
        y_BTD = self.attention(read, positions=positions, segment_ids=segment_ids, cache=cache, key=inside)
        y_BTD, *extras = y_BTD if cache is not None else (y_BTD,)
        y_BTD = self.increment(x_BTD, y_BTD, outside)
        return (y_BTD, *extras) if extras else y_BTD


class RelativeAttentionBranch(Branch):
    """As `AttentionBranch`, with a bias for relative positions whose table all layers share: context["bias"]."""

    def __init__(self, config: TransformerConfig, *, causal: bool, max_distance: int, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        self.attention = _attention(config, causal=causal, window=None, rotary=None, rngs=rngs)
        self.max_distance = max_distance

    def __call__(self, x_BTD, *, key=None, segment_ids=None, context: Any = None):
        inside, outside = _two_keys(key)
        length, causal = x_BTD.shape[1], self.attention.causal
        bias = relative_bias(context["bias"], length, length, causal=causal, max_distance=self.max_distance)
        y_BTD = self.attention(self.read(x_BTD), segment_ids=segment_ids, bias=bias, key=inside)
        return self.increment(x_BTD, y_BTD, outside)


class CrossAttentionBranch(Branch):
    """Attention from x to what an encoder returned, context["encoded"], an increment."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        self.attention = _attention(config, context_dim=config.d_model, rngs=rngs)

    def __call__(self, x_BTD, *, key=None, segment_ids=None, context: Any = None, context_segment_ids=None):
        inside, outside = _two_keys(key)
        segments = {"segment_ids": segment_ids, "context_segment_ids": context_segment_ids}
        y_BTD = self.attention(self.read(x_BTD), context=context["encoded"], **segments, key=inside)
        return self.increment(x_BTD, y_BTD, outside)


class MLPBranch(Branch):
    """An MLP of x, an increment."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        self.mlp = MLP(
            config.d_model,
            config.mlp_width,
            activation=config.activation,
            gated=config.gated,
            use_bias=config.use_bias if config.mlp_bias is None else config.mlp_bias,
            out_init_scale=1 / math.sqrt(2 * config.num_layers),
            dtype=jnp.dtype(config.dtype),
            rngs=rngs,
        )
        self.chunk_tokens = config.mlp_chunk

    def __call__(self, x_BTD, *, key=None):
        return self.increment(x_BTD, self.mlp(self.read(x_BTD)), key)


class Block(nnx.Module):
    """Attention and MLP of an ordinary block as one increment: a(x) + m(x + a(x))."""

    def __init__(self, config: TransformerConfig, kind: LayerKind = "local", *, causal: bool = True, rngs: nnx.Rngs):
        self.attention = AttentionBranch(config, kind, causal=causal, rngs=rngs)
        self.mlp = MLPBranch(config, rngs=rngs)

    def __call__(self, x_BTD, *, key=None, positions=None, segment_ids=None, cache=None) -> Any:
        first, second = _two_keys(key)
        a_BTD = self.attention(x_BTD, key=first, positions=positions, segment_ids=segment_ids, cache=cache)
        a_BTD, *extras = a_BTD if cache is not None else (a_BTD,)
        y_BTD = a_BTD + self.mlp(x_BTD + a_BTD.astype(x_BTD.dtype), key=second)
        return (y_BTD, *extras) if extras else y_BTD


def layers_of(config: TransformerConfig, *, causal: bool) -> list[Callable[[nnx.Rngs], Any]]:
    """For each kind of layer of the period, what makes one: attention and MLP, as two f's or as one."""
    return [functools.partial(_make_layer, config, kind, causal) for kind in config.period]


def _make_layer(config, kind, causal, rngs):
    if config.granularity == "block":
        return [Block(config, kind, causal=causal, rngs=rngs)]
    return [AttentionBranch(config, kind, causal=causal, rngs=rngs), MLPBranch(config, rngs=rngs)]


def make_norm(
    config: TransformerConfig, *, width: int | None = None, dtype: Any = None, rngs: nnx.Rngs
) -> RMSNorm | LayerNorm:
    """The norm of `config`, of `width` channels (d_model), whose results have `dtype` (that of the computation)."""
    dtype = jnp.dtype(config.dtype) if dtype is None else dtype
    width = config.d_model if width is None else width
    if config.norm == "rms":
        return RMSNorm(width, eps=config.eps, offset=config.norm_offset, dtype=dtype, rngs=rngs)
    return LayerNorm(width, eps=config.eps, use_bias=config.use_bias, dtype=dtype, rngs=rngs)


def make_layer_scale(config: TransformerConfig) -> nnx.Param | None:
    """A factor for each channel of an increment, so that every f learns its own step h (arXiv:2103.17239)."""
    return None if config.layer_scale is None else nnx.Param(jnp.full((config.d_model,), config.layer_scale))


def _attention(config: TransformerConfig, *, rngs: nnx.Rngs, **options: Any) -> Attention:
    return Attention(
        config.d_model,
        config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        scale=config.attention_scale,
        softcap=config.attention_softcap,
        qk_norm=config.qk_norm,
        norm_eps=config.eps,
        norm_offset=config.norm_offset,
        use_bias=config.use_bias if config.qkv_bias is None else config.qkv_bias,
        out_bias=config.use_bias if config.out_bias is None else config.out_bias,
        dropout=config.attention_dropout,
        out_init_scale=1 / math.sqrt(2 * config.num_layers),
        dtype=jnp.dtype(config.dtype),
        rngs=rngs,
        **options,
    )


def _rotary(config: TransformerConfig, kind: LayerKind) -> Rotary | None:
    if config.positions != "rotary":
        return None
    if kind == "local" and config.local_rope_base is not None:
        return Rotary(config.local_rope_base)
    return Rotary(config.rope_base, config.rope_scaling)


def _scale(y_BTD, scale):
    return y_BTD if scale is None else y_BTD * scale[...].astype(y_BTD.dtype)[None, None]


def _drop(y, rate, depth_rate, key):
    if key is None or not (rate or depth_rate):
        return y
    first, second = jax.random.split(key)
    return stochastic_depth(dropout(y, rate, first), depth_rate, second)


def _two_keys(key):
    return (None, None) if key is None else tuple(jax.random.split(key))
