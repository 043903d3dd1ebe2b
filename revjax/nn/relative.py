"""Relative positions as a bias of the scores of attention (T5, arXiv:1910.10683).

    s[t, s] += table[bucket(s - t)]

Near distances have a bucket each; farther ones share buckets that widen logarithmically, up to `max_distance`. With
`causal`, all buckets are for the past, and what is ahead falls into that of distance 0; otherwise half are for each.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np


def relative_bias(
    table_RN: jax.Array, num_queries: int, num_keys: int, *, causal: bool, max_distance: int = 128
) -> jax.Array:
    """Returns bias_1NTS in the table's dtype, for queries and keys that both count from 0.

    Args:
      table_RN: for each of R buckets, a number for each head. R is even unless `causal`.
      max_distance: from which on all distances share the last bucket.
    """
    buckets = buckets_of(table_RN.shape[0], causal=causal, max_distance=max_distance)
    farthest = buckets.shape[0] // 2
    by_distance_N = table_RN[buckets]  # from -farthest to farthest
    ahead_TS = jnp.arange(num_keys, dtype=jnp.int32)[None] - jnp.arange(num_queries, dtype=jnp.int32)[:, None]
    bias_TSN = by_distance_N[jnp.clip(ahead_TS, -farthest, farthest) + farthest]
    return bias_TSN.transpose(2, 0, 1)[None]


def buckets_of(num_buckets: int, *, causal: bool, max_distance: int) -> np.ndarray:
    """The bucket of each s - t from -max_distance to max_distance, int32."""
    if num_buckets < 4 or (num_buckets % 2 and not causal):
        raise ValueError(f"There must be at least 4 buckets, and an even number of them, but got {num_buckets}.")
    each = num_buckets if causal else num_buckets // 2
    exact = each // 2
    if max_distance <= exact:
        raise ValueError(
            f"max_distance must be above {exact}, which {num_buckets} buckets reach, but got {max_distance}."
        )
    distance = np.arange(max_distance + 1)
    # In float32, as it was when the tables were learned: a boundary may fall on either side of a whole number.
    wide = np.log(np.maximum(distance, 1).astype(np.float32) / exact) / np.float32(math.log(max_distance / exact))
    wide = np.minimum(exact + (wide * (each - exact)).astype(np.int32), each - 1)
    past = np.where(distance < exact, distance, wide)
    ahead = np.zeros_like(past[1:]) if causal else each + past[1:]
    return np.concatenate([past[::-1], ahead]).astype(np.int32)
