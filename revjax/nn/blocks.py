"""How attention is cut into blocks: sizes, which pairs of blocks matter, and who sees whom inside a pair.

Query block i meets key block j. The G query heads that share a kv head are laid one below the other, so
that a pair is a plain matrix product of G * block_q rows and block_k columns for each (batch, kv head):
repeated keys never exist, and dk sums over the group by itself.

    query blocks  (I, B, K, G * block_q, H)         key blocks  (J, B, K, block_k, H)

Nothing here knows about softmax: that is `flash.py`.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

# Elements of one block of scores over all heads and batch rows. On CPU it should stay near the cache
# (measured, see flash.py); a GPU wants fewer, larger steps (by estimate: 128 MiB of fp32).
_BLOCK_AREA = {"cpu": 2**21}
_DEFAULT_BLOCK_AREA = 2**25
_MIN_BLOCK, _MAX_BLOCK = 128, 1024


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiling:
    """The static shape of a blockwise attention: everything that decides which blocks there are."""

    num_queries: int
    num_keys: int
    block_q: int
    block_k: int
    causal: bool
    window: int | None
    offset: int | None  # position of the first query relative to the first key; None where it is traced

    @property
    def num_q_blocks(self) -> int:
        return -(-self.num_queries // self.block_q)

    @property
    def num_k_blocks(self) -> int:
        return -(-self.num_keys // self.block_k)

    def pairs(self) -> np.ndarray:
        """Returns the (i, j) of all pairs of blocks in which some query may see some key: int32, (pairs, 2)."""
        i, j = np.mgrid[: self.num_q_blocks, : self.num_k_blocks]
        near = np.full(i.shape, True)
        if self.offset is not None:
            q_first = self.offset + i * self.block_q
            q_last = self.offset + np.minimum((i + 1) * self.block_q, self.num_queries) - 1
            k_first = j * self.block_k
            k_last = np.minimum((j + 1) * self.block_k, self.num_keys) - 1
            if self.causal:
                near &= k_first <= q_last
            if self.window is not None:
                near &= q_first - k_last < self.window
                near &= k_first - q_last < self.window
        return np.stack([i[near], j[near]], axis=1).astype(np.int32)

    def visible(self, i, j, offset, q_segments_IBt, k_segments_JBs, *, keys_first: bool):
        """Returns a mask that broadcasts to (B, K, G, block_q, block_k), or None where every key is seen.

        With `keys_first` it broadcasts to (B, K, block_k, G, block_q) instead.
        """
        q_axis, k_axis = (4, 2) if keys_first else (3, 4)
        q_pos = offset + i * self.block_q + _iota(self.block_q, q_axis)
        k_pos = j * self.block_k + _iota(self.block_k, k_axis)
        conditions = []
        if self.causal:
            conditions.append(k_pos <= q_pos)
        if self.window is not None:
            conditions.append(q_pos - k_pos < self.window)
            if not self.causal:
                conditions.append(k_pos - q_pos < self.window)
        if self.num_keys % self.block_k:
            conditions.append(k_pos < self.num_keys)
        if q_segments_IBt is not None:
            conditions.append(_along(at(q_segments_IBt, i), q_axis) == _along(at(k_segments_JBs, j), k_axis))
        return functools.reduce(jnp.logical_and, conditions) if conditions else None


def choose_blocks(rows: int, num_queries: int, num_keys: int, block_q: int | None, block_k: int | None):
    """Returns (block_q, block_k) for `rows` = batch * heads, where the caller left them open (None).

    Equal blocks, so that a ragged length pads little; a short query side (decoding) gets long key blocks.
    """
    area = _BLOCK_AREA.get(jax.default_backend(), _DEFAULT_BLOCK_AREA) // max(rows, 1)
    side = _clip(_power_of_two_below(math.isqrt(max(area, 1))), _MIN_BLOCK, _MAX_BLOCK)
    if block_q is None:
        block_q = _even(num_queries, side)
    if block_k is None:
        wide = _clip(_power_of_two_below(max(area // block_q, 1)), _MIN_BLOCK, 8 * _MAX_BLOCK)
        block_k = _even(num_keys, wide if block_q < side // 2 else side)
    return min(block_q, num_queries), min(block_k, num_keys)


def split_blocks(x_BTNH: jax.Array, num_kv_heads: int, block: int) -> jax.Array:
    """(B, T, N, H) -> (I, B, K, G * block, H), padded with zeros to whole blocks."""
    batch, length, heads, dim = x_BTNH.shape
    num_blocks = -(-length // block)
    x = jnp.pad(x_BTNH, ((0, 0), (0, num_blocks * block - length), (0, 0), (0, 0)))
    x = x.reshape(batch, num_blocks, block, num_kv_heads, heads // num_kv_heads, dim)
    return x.transpose(1, 0, 3, 4, 2, 5).reshape(num_blocks, batch, num_kv_heads, -1, dim)


def join_blocks(x: jax.Array, length: int, block: int) -> jax.Array:
    """The inverse of `split_blocks`: (I, B, K, G * block, H) -> (B, T, N, H)."""
    num_blocks, batch, num_kv_heads, rows, dim = x.shape
    x = x.reshape(num_blocks, batch, num_kv_heads, rows // block, block, dim)
    x = x.transpose(1, 0, 4, 2, 3, 5).reshape(batch, num_blocks * block, -1, dim)
    return x[:, :length]


def split_rows(x_BNT: jax.Array, num_kv_heads: int, block: int) -> jax.Array:
    """(B, N, T) -> (I, B, K, G * block): one number per query, in the order of `split_blocks`."""
    return split_blocks(x_BNT.swapaxes(1, 2)[..., None], num_kv_heads, block)[..., 0]


def join_rows(x: jax.Array, length: int, block: int) -> jax.Array:
    """The inverse of `split_rows`: (I, B, K, G * block) -> (B, N, T)."""
    return join_blocks(x[..., None], length, block)[..., 0].swapaxes(1, 2)


def split_segments(segments_BT: jax.Array | None, block: int) -> jax.Array | None:
    """(B, T) -> (I, B, block)."""
    if segments_BT is None:
        return None
    batch, length = segments_BT.shape
    num_blocks = -(-length // block)
    padded = jnp.pad(segments_BT, ((0, 0), (0, num_blocks * block - length)))
    return padded.reshape(batch, num_blocks, block).transpose(1, 0, 2)


def at(blocks, i):
    return jax.lax.dynamic_index_in_dim(blocks, i, 0, keepdims=False)


def put(blocks, value, i):
    return jax.lax.dynamic_update_index_in_dim(blocks, value, i, 0)


def _iota(size, axis):
    return jnp.arange(size, dtype=jnp.int32).reshape(_along_axis(size, axis))


def _along(x_Bt, axis):
    """(B, t) -> five axes with t on `axis`."""
    return x_Bt.reshape(x_Bt.shape[0], *_along_axis(x_Bt.shape[1], axis)[1:])


def _along_axis(size, axis):
    return tuple(size if a == axis else 1 for a in range(5))


def _even(length, largest):
    """The length of equal blocks, none longer than `largest`; a multiple of 8 where there are several."""
    num_blocks = max(1, -(-length // largest))
    return length if num_blocks == 1 else _round_up(-(-length // num_blocks), 8)


def _round_up(n, multiple):
    return -(-n // multiple) * multiple


def _power_of_two_below(n):
    return 1 << (n.bit_length() - 1)


def _clip(n, low, high):
    return max(low, min(high, n))
