"""Attention: which kernel runs, and the layer around it.

    q = x Wq    k = c Wk    v = c Wv        c is x itself, or the context in cross-attention
    y = softmax(q k^T / sqrt(H)) v Wo                               (arXiv:1706.03762)

Fewer kv heads than heads is grouped-query attention (arXiv:2305.13245); `qk_norm` divides q and k by their
root mean square (arXiv:2302.05442).
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from .cache import KVCache
from .dropout import dropout as apply_dropout
from .flash import flash_attention
from .linear import Linear
from .norm import RMSNorm
from .rotary import Rotary
from .rounding import accumulator, rounded

IMPLEMENTATIONS = ("auto", "flash", "cudnn", "xla")


def attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    *,
    causal: bool = False,
    window: int | None = None,
    q_segments_BT: jax.Array | None = None,
    k_segments_BS: jax.Array | None = None,
    q_offset: int | jax.Array = 0,
    scale: float | None = None,
    softcap: float | None = None,
    bias_BNTS: jax.Array | None = None,
    dropout: float = 0.0,
    key: jax.Array | None = None,
    implementation: str = "auto",
) -> jax.Array:
    """Returns o_BTNH: the arguments of `flash_attention`, and the kernel that computes it.

    Args:
      bias_BNTS: added to the scores, differentiable; axes of length 1 are for all. Only "xla" takes one.
      implementation: "flash" runs everywhere. "cudnn" is NVIDIA's kernel: faster, but half precision only,
        and without dropout, soft cap, segments and offset. "xla" holds all T * S scores: for a bias, and for tests.
        "auto" takes "xla" where there is a bias, cuDNN where it can, else flash.
    """
    options: dict[str, Any] = dict(
        causal=causal,
        window=window,
        q_segments_BT=q_segments_BT,
        k_segments_BS=k_segments_BS,
        q_offset=q_offset,
        scale=scale,
        softcap=softcap,
        dropout=dropout if key is not None else 0.0,
        key=key,
    )
    _check_implementation(implementation)
    if bias_BNTS is not None and implementation not in ("auto", "xla"):
        raise ValueError(f'A bias needs all scores at once: implementation="xla" or "auto", not {implementation!r}.')
    if implementation == "auto" and bias_BNTS is not None:
        implementation = "xla"
    if implementation == "auto":
        implementation = "flash" if _cudnn_refuses(q_BTNH, k_BSKH, v_BSKH, **options) else "cudnn"
    if implementation == "flash":
        return flash_attention(q_BTNH, k_BSKH, v_BSKH, **options)
    if implementation == "xla":
        return _plain(q_BTNH, k_BSKH, v_BSKH, bias_BNTS=bias_BNTS, **options)
    if reason := _cudnn_refuses(q_BTNH, k_BSKH, v_BSKH, **options):
        raise ValueError(f'cuDNN attention cannot run here: {reason}. Use implementation="auto" or "flash".')
    return _cudnn(q_BTNH, k_BSKH, v_BSKH, causal=causal, window=window, scale=scale)


def _cudnn(q_BTNH, k_BSKH, v_BSKH, *, causal: bool, window: int | None, scale: float | None) -> jax.Array:
    """NVIDIA's kernel. Its output and log-sum-exp bear the name that plan "attention" keeps, as `flash_attention`'s."""
    kernel = functools.partial(
        jax.nn.dot_product_attention,
        is_causal=causal,
        local_window_size=None if window is None else (window - 1, 0),
        scale=scale,
        implementation="cudnn",
    )

    def forward(*qkv):
        o, vjp = jax.vjp(kernel, *qkv)
        is_new = lambda a: not any(a is given for given in qkv)  # of the residuals (q, k, v, o, log-sum-exp)
        named = {id(a): checkpoint_name(a, "attention") for a in (o, *jax.tree.leaves(vjp)) if is_new(a)}
        return named[id(o)], jax.tree.map(lambda a: named.get(id(a), a), vjp)

    run = jax.custom_vjp(kernel)
    run.defvjp(forward, lambda vjp, do: vjp(do))
    return run(q_BTNH, k_BSKH, v_BSKH)


def _cudnn_refuses(q, k, v, *, causal, window, q_segments_BT, k_segments_BS, q_offset, scale, softcap, dropout, key):
    """Returns why cuDNN's kernel cannot compute this, or None."""
    del k_segments_BS, scale, key
    if jax.default_backend() != "gpu":
        return f"it needs an NVIDIA GPU, and the backend is {jax.default_backend()}"
    capability = getattr(jax.devices()[0], "compute_capability", "0")
    if float(capability) < 8:
        return f"it needs an Ampere GPU or newer (compute capability 8.0), and this one has {capability}"
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"it takes bfloat16 and float16, not {q.dtype}"
    head_dim, largest = q.shape[-1], 256 if float(capability) >= 9 else 128
    if head_dim % 8 or head_dim > largest or v.shape[-1] != head_dim:
        return f"it takes head dims that are multiples of 8 up to {largest}, not {head_dim} and {v.shape[-1]}"
    if dropout or softcap is not None or q_segments_BT is not None:
        return "it is not used with dropout, a soft cap or segments"
    if not (isinstance(q_offset, int) and q_offset == 0):
        return "it is not used with a cache or an offset"
    if window is not None and not causal:
        return "its window is causal"
    if causal and q.shape[1] != k.shape[1]:
        return "causal, it is used only with as many keys as queries"
    return None


def _plain(q, k, v, *, causal, window, q_segments_BT, k_segments_BS, q_offset, scale, softcap, bias_BNTS, dropout, key):
    """The definition, with all scores at once."""
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    q_pos, k_pos = q_offset + jnp.arange(q.shape[1])[:, None], jnp.arange(k.shape[1])[None, :]
    visible = (k_pos <= q_pos if causal else jnp.full((q.shape[1], k.shape[1]), True))[None]
    if window is not None:
        visible &= (jnp.abs(q_pos - k_pos) < window)[None]
    if q_segments_BT is not None:
        visible &= q_segments_BT[:, :, None] == k_segments_BS[:, None, :]
    k, v = (jnp.repeat(x, q.shape[2] // k.shape[2], axis=2) for x in (k, v))
    wide = accumulator(q.dtype)
    s = scale * jnp.einsum("BTNH,BSNH->BNTS", q, k, preferred_element_type=wide)
    s = s if softcap is None else softcap * jnp.tanh(s / softcap)
    s = s if bias_BNTS is None else s + bias_BNTS.astype(wide)
    p = apply_dropout(jax.nn.softmax(s, axis=-1, where=visible[:, None]), dropout, key)
    o = jnp.einsum("BNTS,BSNH->BTNH", rounded(p, v.dtype), v, preferred_element_type=wide)
    return rounded(o, v.dtype)


class Attention(nnx.Module):
    """Multi-head attention over x, or, with `context_dim`, from x to a context.

    `dropout` acts on the softmax, and only where a key is given. `dtype` is that of all products.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,  # None: one per query head
        head_dim: int | None = None,  # None: d_model / num_heads
        causal: bool = True,
        window: int | None = None,
        scale: float | None = None,
        softcap: float | None = None,
        qk_norm: bool = False,
        norm_eps: float = 1e-6,
        norm_offset: float = 0.0,
        rotary: Rotary | None = None,
        use_bias: bool = False,
        out_bias: bool | None = None,  # None: as use_bias
        dropout: float = 0.0,
        context_dim: int | None = None,
        out_init_scale: float = 1.0,
        dtype=jnp.bfloat16,
        implementation: str = "auto",
        rngs: nnx.Rngs,
    ):
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        _check_heads(d_model, num_heads, num_kv_heads, head_dim, rotary)
        _check_options(window, dropout, context_dim, rotary, implementation)
        head_dim = d_model // num_heads if head_dim is None else head_dim
        source_dim = d_model if context_dim is None else context_dim
        dense = functools.partial(Linear, dtype=dtype, rngs=rngs)
        self.query = dense(d_model, (num_heads, head_dim), use_bias=use_bias)
        self.key = dense(source_dim, (num_kv_heads, head_dim), use_bias=use_bias)
        self.value = dense(source_dim, (num_kv_heads, head_dim), use_bias=use_bias)
        out_std = out_init_scale / math.sqrt(num_heads * head_dim)
        out_bias = use_bias if out_bias is None else out_bias
        self.out = dense((num_heads, head_dim), d_model, init_std=out_std, use_bias=out_bias)
        norm = functools.partial(RMSNorm, head_dim, eps=norm_eps, offset=norm_offset, dtype=dtype, rngs=rngs)
        self.query_norm = norm() if qk_norm else None
        self.key_norm = norm() if qk_norm else None
        self.causal = causal and context_dim is None
        self.window, self.scale, self.softcap = window, scale, softcap
        self.rotary = rotary
        self.dropout = dropout
        self.is_cross = context_dim is not None
        self.implementation = implementation

    def __call__(
        self,
        x_BTD: jax.Array,
        *,
        context: jax.Array | None = None,
        context_segment_ids: jax.Array | None = None,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        bias: jax.Array | None = None,
        cache: KVCache | None = None,
        key: jax.Array | None = None,
    ):
        """Returns y_BTD; with a cache, (y_BTD, {"cache": the longer cache}).

        Args:
          context: (B, S, context_dim), for cross-attention only.
          context_segment_ids: (B, S) integers of the context: each position sees its own segment of it, and where there
            are no `segment_ids`, segment 1; None is all.
          positions: (B, T) or (1, T), for the rotary embedding alone; None counts from 0, or on from the cache.
            Who sees whom follows the order in x, not these numbers.
          segment_ids: (B, T) integers: a position sees its own segment only (packed documents).
          bias: (B, N, T, S) or (1, N, T, S), added to the scores. All T * S of them are there at once then.
          cache: earlier keys and values, which x follows.
          key: for dropout; None is evaluation.
        """
        self._check_call(context, context_segment_ids, segment_ids, cache)
        source = x_BTD if context is None else context
        q_BTNH, k_BSKH, v_BSKH = self.query(x_BTD), self.key(source), self.value(source)
        if self.query_norm is not None and self.key_norm is not None:
            q_BTNH, k_BSKH = self.query_norm(q_BTNH), self.key_norm(k_BSKH)
        offset, q_segments, k_segments = 0, segment_ids, segment_ids
        if context_segment_ids is not None:
            k_segments = context_segment_ids.astype(jnp.int32)
            q_segments = jnp.ones(x_BTD.shape[:2], jnp.int32) if segment_ids is None else segment_ids
        if cache is not None:
            offset, (q_segments, k_segments) = cache.length, cache.segments(x_BTD.shape[1])
        if self.rotary is not None:
            if positions is None and cache is not None:
                positions = cache.positions(x_BTD.shape[1])
            elif positions is None:
                positions = jnp.arange(x_BTD.shape[1], dtype=jnp.int32)[None, :]
            q_BTNH, k_BSKH = self.rotary(q_BTNH, positions), self.rotary(k_BSKH, positions)
        if cache is not None:
            cache = cache.append(k_BSKH, v_BSKH)
            k_BSKH, v_BSKH = cache.k_BSKH.astype(q_BTNH.dtype), cache.v_BSKH.astype(q_BTNH.dtype)
        o_BTNH = attention(
            q_BTNH,
            k_BSKH,
            v_BSKH,
            causal=self.causal,
            window=self.window,
            q_segments_BT=q_segments,
            k_segments_BS=k_segments,
            q_offset=offset,
            scale=self.scale,
            softcap=self.softcap,
            bias_BNTS=bias,
            dropout=self.dropout,
            key=key,
            implementation=self.implementation,
        )
        y_BTD = self.out(o_BTNH)
        return y_BTD if cache is None else (y_BTD, {"cache": cache})

    def _check_call(self, context, context_segment_ids, segment_ids, cache):
        if self.is_cross and context is None:
            raise ValueError(
                "This is cross-attention (context_dim is set), so it needs `context=` (B, S, context_dim)."
            )
        if not self.is_cross and context is not None:
            raise ValueError("Self-attention takes no context. For cross-attention build it with `context_dim=`.")
        if context_segment_ids is not None and (context is None or context_segment_ids.shape != context.shape[:2]):
            raise ValueError(
                f"context_segment_ids must have the shape (B, S) of a context, but got {context_segment_ids.shape} and "
                f"{'no context' if context is None else f'a context of {context.shape}'}."
            )
        if cache is not None and not self.causal:
            raise ValueError("A cache needs causal self-attention: otherwise earlier outputs would change.")
        if segment_ids is not None and cache is not None:
            raise ValueError("segment_ids work without a cache: its segments are text and padding.")
        if segment_ids is not None and self.is_cross and context_segment_ids is None:
            raise ValueError("In cross-attention, segment_ids need context_segment_ids beside them.")


def _check_heads(d_model, num_heads, num_kv_heads, head_dim, rotary):
    if head_dim is None and d_model % num_heads:
        raise ValueError(
            f"num_heads must divide d_model, but got num_heads={num_heads} and d_model={d_model}. "
            "Change one of them, or say head_dim."
        )
    if num_kv_heads < 1 or num_heads % num_kv_heads:
        raise ValueError(
            f"num_kv_heads must divide num_heads, but got num_kv_heads={num_kv_heads} and num_heads={num_heads}."
        )
    head_dim = d_model // num_heads if head_dim is None else head_dim
    if rotary is not None and head_dim % 2:
        raise ValueError(f"Rotary embeddings pair up channels, so head_dim must be even, but got {head_dim}.")


def _check_options(window, dropout, context_dim, rotary, implementation):
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1 (a query's own position), but got {window}. None is no window.")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be at least 0 and below 1, but got {dropout}.")
    if context_dim is not None and (rotary is not None or window is not None):
        raise ValueError("Cross-attention has no common positions: leave out rotary and window, or context_dim.")
    _check_implementation(implementation)


def _check_implementation(implementation):
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation must be one of {', '.join(IMPLEMENTATIONS)}, but got {implementation!r}.")
