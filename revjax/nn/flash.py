"""Attention by blocks, whose memory grows with T + S and not with T * S.

    forward, for each pair (query block i, key block j)       (FlashAttention-2, Dao 2023, arXiv:2307.08691)
        s     = scale q_i k_j^T
        m'    = max(m, rowmax s)            running maximum
        p     = exp(s - m')
        l'    = exp(m - m') l + rowsum p    running sum
        acc'  = exp(m - m') acc + p v_j
    o = acc / l        lse = m + log l

    backward, from (q, k, v, o, lse) alone
        p     = exp(s - lse)
        dp    = do v_j^T                    delta = rowsum(do o) - dlse
        ds    = p (dp - delta)
        dv   += p^T do      dk += scale ds^T q_i      dq += scale ds k_j

With a soft cap c (Gemma 2, arXiv:2408.00118), s becomes c tanh(s / c), and ds is multiplied by 1 - tanh(s / c)^2.

Pairs in which no query may see any key are left out of the loop, in both passes: causal attention does
half the work. Dropout masks are drawn again in the backward pass, from `fold_in(key, i * J + j)`: they
depend on the block sizes. Matmul operands have the inputs' dtype, everything else is fp32.

The bits do not depend on what surrounds a call: each conversion to a low-precision type is preceded by
`reduce_precision`, which XLA may not leave out, and the function and its forward rule are one code.

The backward pass works on transposed scores, and transposed copies are made once, outside the loop:
XLA's batched CPU matmul is 2-5 times faster in bf16 where no operand needs transposing. Measured on 2 shared CPU
cores (AMX), jax 0.10.2, bf16, causal, block sizes as chosen; milliseconds, and in brackets the ratio to
`jax.nn.dot_product_attention` (xla) in the same run:

    (B, T, N, H)        forward         with backward
    (8, 128, 4, 32)       1.3 (1.00)       2.8 (0.68)
    (4, 512, 4, 64)       9.1 (0.41)      29   (0.48)
    (2, 1024, 4, 64)     14   (0.29)      39   (0.23)
    (1, 8192, 4, 32)    259   (0.17)     595   (0.08)
    (1, 8192, 4, 64)    277   (0.15)     631   (0.08)

There a block of scores did best at 1 to 4 million elements over all heads and rows (`choose_blocks`).
It was not timed on a GPU: prefer cuDNN there, see `attention.py`.

Only jax is imported here. No parameters, no layers, no cache.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from .blocks import (
    at,
    join_blocks,
    join_rows,
    put,
    split_blocks,
    split_rows,
    split_segments,
)
from .flash_arguments import prepare
from .rounding import accumulator, rounded

_LOWEST = -1e30  # finite, so that a row which sees nothing yet has exp(-inf - m) = 0, not NaN


def flash_attention(
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
    dropout: float = 0.0,
    key: jax.Array | None = None,
    block_q: int | None = None,
    block_k: int | None = None,
) -> jax.Array:
    """Returns softmax(scale q k^T) v as o_BTNH, in q's dtype. A query that sees no key gets 0.

    Query t stands at position t + q_offset, key s at position s.

    Args:
      causal: a query sees no key after its own position.
      window: a query sees keys less than `window` positions away; 1 is its own position only.
      q_segments_BT, k_segments_BS: integers; a query sees the keys of its own segment only.
      q_offset: for a cache, how many keys came before the first query. An int lets the kernel leave out
        blocks that are wholly masked; a traced number does not.
      scale: None is 1 / sqrt(H).
      softcap: scores stay between -softcap and softcap.
      dropout: probability of dropping each entry of the softmax. With `key=None` nothing is dropped.
      block_q, block_k: None chooses (see `blocks.choose_blocks`); they need not divide T and S.

    >>> q = jnp.ones((2, 5, 4, 8))
    >>> kv = jnp.ones((2, 5, 1, 8))  # four query heads share one kv head
    >>> flash_attention(q, kv, kv, causal=True).shape
    (2, 5, 4, 8)
    """
    o, _ = flash_attention_with_lse(
        q_BTNH,
        k_BSKH,
        v_BSKH,
        causal=causal,
        window=window,
        q_segments_BT=q_segments_BT,
        k_segments_BS=k_segments_BS,
        q_offset=q_offset,
        scale=scale,
        softcap=softcap,
        dropout=dropout,
        key=key,
        block_q=block_q,
        block_k=block_k,
    )
    return o


def flash_attention_with_lse(q_BTNH, k_BSKH, v_BSKH, **options) -> tuple[jax.Array, jax.Array]:
    """Returns (o_BTNH, lse_BNT): as `flash_attention`, with the fp32 log of each query's softmax denominator.

    Both are differentiable. `lse` is -inf for a query that sees no key.
    """
    spec, side = prepare(q_BTNH, k_BSKH, v_BSKH, **options)
    return _flash(spec, q_BTNH, k_BSKH, v_BSKH, side)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _flash(spec, q, k, v, side):
    return _flash_fwd(spec, q, k, v, side)[0]


def _flash_fwd(spec, q, k, v, side):
    o, lse = (checkpoint_name(x, "attention") for x in _forward(spec, q, k, v, side))  # what plan "attention" keeps
    return (o, lse), (q, k, v, o, lse, side)


def _flash_bwd(spec, residuals, cotangents):
    return *_backward(spec, *residuals, *cotangents), None


_flash.defvjp(_flash_fwd, _flash_bwd)


@functools.partial(jax.jit, static_argnums=0)  # called outside of a jit, the loop is compiled once
def _forward(spec, q, k, v, side):
    tiling, fp = spec.tiling, accumulator(q.dtype)
    q_I = split_blocks(_bits(q), k.shape[2], tiling.block_q)
    k_J, v_J = (split_blocks(_bits(x), k.shape[2], tiling.block_k) for x in (k, v))
    kT_J = _transposed(k_J)
    block = functools.partial(_block, q.dtype)
    visible = _visible(tiling, side)
    five_axes = (*q_I.shape[1:3], -1, tiling.block_q, tiling.block_k)

    def pair(carry, ij):
        i, j = ij
        m, l, acc = (at(blocks, i) for blocks in carry)
        s = spec.scale * _matmul(block(q_I, i), block(kT_J, j))
        s = _hide(_capped(spec, s), visible(i, j, keys_first=False), five_axes)
        m_new = jnp.maximum(m, jnp.max(s, axis=-1))
        p = jnp.exp(s - m_new[..., None])
        shrink = jnp.exp(m - m_new)
        l = shrink * l + jnp.sum(p, axis=-1)
        acc = shrink[..., None] * acc + _matmul(rounded(_drop(spec, side, i, j, p), v.dtype), block(v_J, j))
        return tuple(put(blocks, x, i) for blocks, x in zip(carry, (m_new, l, acc), strict=True)), None

    rows = q_I.shape[:-1]
    start = (jnp.full(rows, _LOWEST, fp), jnp.zeros(rows, fp), _zeros((*rows, v.shape[3]), fp, q))
    m, l, acc = _loop(pair, start, tiling.pairs(), q)

    empty = l == 0
    l = jnp.where(empty, 1, l)
    o = rounded(acc / l[..., None], q.dtype)
    lse = jnp.where(empty, -jnp.inf, m + jnp.log(l))
    return join_blocks(o, q.shape[1], tiling.block_q), join_rows(lse, q.shape[1], tiling.block_q)


@functools.partial(jax.jit, static_argnums=0)
def _backward(spec, q, k, v, o, lse, side, do, dlse):
    tiling, fp = spec.tiling, accumulator(q.dtype)
    q_I, do_I = (split_blocks(_bits(x), k.shape[2], tiling.block_q) for x in (q, do))
    k_J, v_J = (split_blocks(_bits(x), k.shape[2], tiling.block_k) for x in (k, v))
    qT_I, doT_I, kT_J = (_transposed(x) for x in (q_I, do_I, k_J))
    block = functools.partial(_block, q.dtype)
    delta = jnp.sum(do.astype(fp) * o.astype(fp), axis=-1).swapaxes(1, 2) - dlse
    lse = jnp.where(jnp.isneginf(lse), 0, lse)  # such a query sees no key: its p is 0 by the mask
    delta_I, lse_I = (split_rows(x, k.shape[2], tiling.block_q)[..., None, :] for x in (delta, lse))
    visible = _visible(tiling, side)
    five_axes = (*q_I.shape[1:3], tiling.block_k, -1, tiling.block_q)

    def pair(carry, ij):
        i, j = ij
        dqT, dk, dv = carry
        sT = _capped(spec, spec.scale * _matmul(block(k_J, j), block(qT_I, i)))
        pT = jnp.exp(_hide(sT, visible(i, j, keys_first=True), five_axes) - at(lse_I, i))
        dpT = _drop(spec, side, i, j, _matmul(block(v_J, j), block(doT_I, i)), transposed=True)
        dsT = pT * (dpT - at(delta_I, i))
        dsT = rounded(dsT if spec.softcap is None else dsT * (1 - jnp.square(sT / spec.softcap)), q.dtype)
        droppedT = rounded(_drop(spec, side, i, j, pT, transposed=True), q.dtype)
        dv = put(dv, at(dv, j) + _matmul(droppedT, block(do_I, i)), j)
        dk = put(dk, at(dk, j) + _matmul(dsT, block(q_I, i)), j)
        dqT = put(dqT, at(dqT, i) + _matmul(block(kT_J, j), dsT), i)
        return (dqT, dk, dv), None

    start = tuple(_zeros(x.shape, fp, q) for x in (qT_I, k_J, v_J))
    dqT, dk, dv = _loop(pair, start, tiling.pairs(), q)
    dq = join_blocks(rounded(spec.scale * dqT.swapaxes(-1, -2), q.dtype), q.shape[1], tiling.block_q)
    dk = join_blocks(rounded(spec.scale * dk, k.dtype), k.shape[1], tiling.block_k)
    dv = join_blocks(rounded(dv, v.dtype), v.shape[1], tiling.block_k)
    return dq, dk, dv


def _loop(pair, start, pairs, q):
    """Runs `pair` over all (i, j); a single one without a loop, which XLA compiles better."""
    if len(pairs) == 1:
        return pair(start, tuple(int(n) for n in pairs[0]))[0]
    # Masks depend on i and j alone. Without the barrier jax.checkpoint would take them all out of the loop and keep
    # them for the backward pass, T * S / 2 bytes: to it, they are known before q is.
    pairs, _ = jax.lax.optimization_barrier((jnp.asarray(pairs), q))
    return jax.lax.scan(pair, start, (pairs[:, 0], pairs[:, 1]))[0]


def _bits(x):
    """16-bit floats as integers, which XLA cannot keep as fp32: it would convert them before the loop, once for all."""
    return jax.lax.bitcast_convert_type(x, jnp.uint16) if x.dtype.itemsize == 2 else x


def _block(dtype, x_I, i):
    """One block of what `_bits` made of floats of `dtype`."""
    x = at(x_I, i)
    return x if x.dtype == dtype else jax.lax.bitcast_convert_type(x, dtype)


def _zeros(shape, dtype, q):
    """Zeros that are made where q is known: others XLA makes before a loop over layers, and keeps all the while."""
    bits = jax.lax.bitcast_convert_type(q[0, 0, 0, 0].astype(jnp.float32), jnp.int32)
    return jnp.broadcast_to(jnp.minimum(bits & 1, 0), shape).astype(dtype)


def _capped(spec, s):
    return s if spec.softcap is None else spec.softcap * jnp.tanh(s / spec.softcap)


def _visible(tiling, side):
    offset = side.offset if tiling.offset is None else tiling.offset
    q_segments_I = split_segments(side.q_segments_BT, tiling.block_q)
    k_segments_J = split_segments(side.k_segments_BS, tiling.block_k)
    return lambda i, j, keys_first: tiling.visible(i, j, offset, q_segments_I, k_segments_J, keys_first=keys_first)


def _hide(s, visible, five_axes):
    """Sets the scores of keys that a query does not see to -inf."""
    return s if visible is None else jnp.where(visible, s.reshape(five_axes), -jnp.inf).reshape(s.shape)


def _drop(spec, side, i, j, p, *, transposed=False):
    """Dropout for one pair of blocks: the same mask whenever it is asked for again."""
    if side.key is None or spec.dropout == 0:
        return p
    shape = (*p.shape[:2], p.shape[3], p.shape[2]) if transposed else p.shape
    key = jax.random.fold_in(side.key, i * spec.tiling.num_k_blocks + j)
    keep = jax.random.bernoulli(key, 1 - spec.dropout, shape)
    return jnp.where(keep.swapaxes(-1, -2) if transposed else keep, p / (1 - spec.dropout), 0)


def _matmul(a, b):
    """(B, K, m, c) x (B, K, c, n) -> fp32 (B, K, m, n)."""
    dims = (((3,), (2,)), ((0, 1), (0, 1)))
    return jax.lax.dot_general(a, b, dims, preferred_element_type=accumulator(a.dtype))


def _transposed(x):
    """A transposed copy: without the barrier XLA would fold it back into the (then slow) matmul."""
    return jax.lax.optimization_barrier(x.swapaxes(-1, -2))
