"""Dropout as functions of a key: the same key gives the same mask, also when a layer is run again.

    dropout            y = x mask / (1 - rate)          one draw per element          (JMLR 15:1929)
    stochastic_depth   y = x mask / (1 - rate)          one draw per sample (axis 0)  (arXiv:1603.09382)

There is no module that holds a random state: replayed, it would draw another mask.
"""

import jax
import jax.numpy as jnp


def dropout(x: jax.Array, rate: float | jax.Array, key: jax.Array | None) -> jax.Array:
    """Zeroes each element with probability `rate`, which may be traced. The identity where `key` is None or it is 0."""
    return _drop(x, rate, key, x.shape)


def stochastic_depth(x: jax.Array, rate: float | jax.Array, key: jax.Array | None) -> jax.Array:
    """Zeroes a whole sample (entry of the leading axis) with probability `rate`: its branch is skipped.

    The identity where `key` is None or `rate` is 0. It may be traced, so that it can grow with depth.
    """
    return _drop(x, rate, key, (x.shape[0], *(1,) * (x.ndim - 1)))


def _drop(x, rate, key, mask_shape):
    if isinstance(rate, (int, float)) and not 0 <= rate < 1:
        raise ValueError(f"A dropout rate must be at least 0 and below 1, but got {rate}.")
    if key is None or (isinstance(rate, (int, float)) and rate == 0):
        return x
    keep = jax.random.bernoulli(key, 1 - rate, mask_shape)
    return jnp.where(keep, x / jnp.asarray(1 - rate, x.dtype), 0)
