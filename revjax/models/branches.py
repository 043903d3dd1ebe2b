"""The residual branches of a decoder's layer: each maps x to an increment f(x) that the coupling adds to the streams.

Projections back into the stream start smaller by sqrt(2 layers) (GPT-2), so that deep stacks begin near the identity.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ..nn import MLP, Attention, LayerNorm, RMSNorm, Rotary, dropout, stochastic_depth
from .decoder_config import DecoderConfig, LayerKind


class AttentionBranch(nnx.Module):
    """attention(norm(x)), an increment. Of a layer whose kind is "local", attention has the window."""

    def __init__(self, config: DecoderConfig, kind: LayerKind = "local", *, rngs: nnx.Rngs):
        self.norm = make_norm(config, rngs=rngs)
        self.attention = Attention(
            config.d_model,
            config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            window=config.window if kind == "local" else None,
            scale=config.attention_scale,
            softcap=config.attention_softcap,
            qk_norm=config.qk_norm,
            norm_eps=config.eps,
            norm_offset=config.norm_offset,
            rotary=_rotary(config, kind),
            use_bias=config.use_bias if config.qkv_bias is None else config.qkv_bias,
            out_bias=config.use_bias if config.out_bias is None else config.out_bias,
            dropout=config.attention_dropout,
            out_init_scale=1 / math.sqrt(2 * config.num_layers),
            dtype=jnp.dtype(config.dtype),
            rngs=rngs,
        )
        self.post_norm = make_norm(config, rngs=rngs) if config.post_norm else None
        self.scale = make_layer_scale(config)
        self.dropout, self.stochastic_depth = config.dropout, config.stochastic_depth

    def __call__(self, x_BTD, *, key=None, positions=None, segment_ids=None, cache=None) -> Any:
        inside, outside = _two_keys(key)
        y_BTD = self.attention(self.norm(x_BTD), positions=positions, segment_ids=segment_ids, cache=cache, key=inside)
        y_BTD, *extras = y_BTD if cache is not None else (y_BTD,)
        y_BTD = y_BTD if self.post_norm is None else self.post_norm(y_BTD)
        y_BTD = _drop(_scale(y_BTD, self.scale), self.dropout, self.stochastic_depth, outside)
        return (y_BTD, *extras) if extras else y_BTD


class MLPBranch(nnx.Module):
    """mlp(norm(x)), an increment."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        self.norm = make_norm(config, rngs=rngs)
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
        self.post_norm = make_norm(config, rngs=rngs) if config.post_norm else None
        self.scale = make_layer_scale(config)
        self.dropout, self.stochastic_depth = config.dropout, config.stochastic_depth
        self.chunk_tokens = config.mlp_chunk

    def __call__(self, x_BTD, *, key=None):
        y_BTD = self.mlp(self.norm(x_BTD))
        y_BTD = y_BTD if self.post_norm is None else self.post_norm(y_BTD)
        return _drop(_scale(y_BTD, self.scale), self.dropout, self.stochastic_depth, key)


class Block(nnx.Module):
    """Attention and MLP of an ordinary block as one increment: a(x) + m(x + a(x))."""

    def __init__(self, config: DecoderConfig, kind: LayerKind = "local", *, rngs: nnx.Rngs):
        self.attention = AttentionBranch(config, kind, rngs=rngs)
        self.mlp = MLPBranch(config, rngs=rngs)

    def __call__(self, x_BTD, *, key=None, positions=None, segment_ids=None, cache=None) -> Any:
        first, second = _two_keys(key)
        a_BTD = self.attention(x_BTD, key=first, positions=positions, segment_ids=segment_ids, cache=cache)
        a_BTD, *extras = a_BTD if cache is not None else (a_BTD,)
        y_BTD = a_BTD + self.mlp(x_BTD + a_BTD.astype(x_BTD.dtype), key=second)
        return (y_BTD, *extras) if extras else y_BTD


def make_branches(config: DecoderConfig, kind: LayerKind = "local", *, rngs: nnx.Rngs) -> list[nnx.Module]:
    """One layer: attention and MLP, as two f's or as one."""
    if config.granularity == "block":
        return [Block(config, kind, rngs=rngs)]
    return [AttentionBranch(config, kind, rngs=rngs), MLPBranch(config, rngs=rngs)]


def make_norm(config: DecoderConfig, *, width: int | None = None, rngs: nnx.Rngs) -> nnx.Module:
    dtype, width = jnp.dtype(config.dtype), config.d_model if width is None else width
    if config.norm == "rms":
        return RMSNorm(width, eps=config.eps, offset=config.norm_offset, dtype=dtype, rngs=rngs)
    return LayerNorm(width, eps=config.eps, use_bias=config.use_bias, dtype=dtype, rngs=rngs)


def _rotary(config: DecoderConfig, kind: LayerKind) -> Rotary | None:
    if config.positions != "rotary":
        return None
    if kind == "local" and config.local_rope_base is not None:
        return Rotary(config.local_rope_base)
    return Rotary(config.rope_base, config.rope_scaling)


def make_layer_scale(config: DecoderConfig) -> nnx.Param | None:
    """A factor for each channel of an increment, so that every f learns its own step h (arXiv:2103.17239)."""
    return None if config.layer_scale is None else nnx.Param(jnp.full((config.d_model,), config.layer_scale))


def _scale(y_BTD, scale):
    return y_BTD if scale is None else y_BTD * scale[...].astype(y_BTD.dtype)[None, None]


def _drop(y, rate, depth_rate, key):
    if key is None or not (rate or depth_rate):
        return y
    first, second = jax.random.split(key)
    return stochastic_depth(dropout(y, rate, first), depth_rate, second)


def _two_keys(key):
    return (None, None) if key is None else tuple(jax.random.split(key))
