"""The arguments of one blockwise attention: checked, and sorted into what is static and what is traced."""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .blocks import Tiling, choose_blocks


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec:
    """What is static in one call."""

    tiling: Tiling
    scale: float
    softcap: float | None
    dropout: float


class Side(NamedTuple):
    """What is traced in one call and has no gradient."""

    q_segments_BT: jax.Array | None
    k_segments_BS: jax.Array | None
    offset: jax.Array | None  # None where it is static: `Tiling.offset`
    key: jax.Array | None


def prepare(
    q_BTNH,
    k_BSKH,
    v_BSKH,
    *,
    causal=False,
    window=None,
    q_segments_BT=None,
    k_segments_BS=None,
    q_offset=0,
    scale=None,
    softcap=None,
    dropout=0.0,
    key=None,
    block_q=None,
    block_k=None,
) -> tuple[Spec, Side]:
    """Checks the arguments of one call and sorts them into what is static and what is traced."""
    _check_shapes(q_BTNH, k_BSKH, v_BSKH)
    _check_options(window, softcap, dropout, block_q, block_k)
    _check_segments(q_BTNH, k_BSKH, q_segments_BT, k_segments_BS)
    batch, num_queries, num_heads, head_dim = q_BTNH.shape
    num_keys = k_BSKH.shape[1]
    block_q, block_k = choose_blocks(batch * num_heads, num_queries, num_keys, block_q, block_k)
    static_offset = int(q_offset) if isinstance(q_offset, (int, np.integer)) else None
    tiling = Tiling(
        num_queries=num_queries,
        num_keys=num_keys,
        block_q=block_q,
        block_k=block_k,
        causal=causal,
        window=window,
        offset=static_offset,
    )
    scale = 1 / math.sqrt(head_dim) if scale is None else float(scale)
    traced_offset = None if static_offset is not None else jnp.asarray(q_offset, jnp.int32)
    side = Side(q_segments_BT, k_segments_BS, traced_offset, key)
    return Spec(tiling=tiling, scale=scale, softcap=softcap, dropout=dropout), side


def _check_shapes(q, k, v):
    agree = (
        q.ndim == k.ndim == v.ndim == 4
        and q.shape[0] == k.shape[0] == v.shape[0]
        and k.shape[1:3] == v.shape[1:3]
        and q.shape[3] == k.shape[3]
        and q.shape[2] % k.shape[2] == 0
    )
    if not agree:
        raise ValueError(
            "Expected q (B, T, N, H), k and v (B, S, K, H) with N a multiple of K, but got "
            f"q {q.shape}, k {k.shape} and v {v.shape}."
        )
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(f"q, k and v must have one dtype, but got {q.dtype}, {k.dtype} and {v.dtype}. Cast them first.")


def _check_options(window, softcap, dropout, block_q, block_k):
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1 (a query's own position), but got {window}. None is no window.")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"softcap must be positive, but got {softcap}. None is none.")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be at least 0 and below 1, but got {dropout}.")
    for name, block in (("block_q", block_q), ("block_k", block_k)):
        if block is not None and block < 1:
            raise ValueError(f"{name} must be at least 1, but got {block}. None chooses one.")


def _check_segments(q, k, q_segments, k_segments):
    if q_segments is None and k_segments is None:
        return
    if q_segments is None or k_segments is None:
        raise ValueError(
            "Segments need both sides: pass q_segments_BT and k_segments_BS (in self-attention the same array)."
        )
    if q_segments.shape != q.shape[:2] or k_segments.shape != k.shape[:2]:
        raise ValueError(
            f"Segments must have the shapes {q.shape[:2]} (queries) and {k.shape[:2]} (keys), but got "
            f"{q_segments.shape} and {k_segments.shape}."
        )
