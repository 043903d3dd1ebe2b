"""The keys and values of earlier positions, for generation.

    append    k_BSKH[:, length : length + T] = k_BTKH        length' = length + T

A value: `append` returns a new cache. It has no rule for what to forget.
"""

import dataclasses

import jax
import jax.core
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of one attention layer, of which the first `length` positions are filled."""

    k_BSKH: jax.Array
    v_BSKH: jax.Array
    length: jax.Array  # int32 scalar

    @classmethod
    def zeros(cls, batch: int, max_length: int, num_kv_heads: int, head_dim: int, dtype=jnp.bfloat16) -> "KVCache":
        """Returns an empty cache with room for `max_length` positions."""
        empty = jnp.zeros((batch, max_length, num_kv_heads, head_dim), dtype)
        return cls(empty, jnp.zeros_like(empty), jnp.zeros((), jnp.int32))

    @property
    def max_length(self) -> int:
        return self.k_BSKH.shape[-3]

    def append(self, k_BTKH: jax.Array, v_BTKH: jax.Array) -> "KVCache":
        """Returns the cache with T more positions, in the cache's dtype.

        Under `jax.jit` a full cache cannot raise: the caller keeps `length + T <= max_length`.
        """
        self._check_room(k_BTKH)
        return KVCache(
            jax.lax.dynamic_update_slice_in_dim(self.k_BSKH, k_BTKH.astype(self.k_BSKH.dtype), self.length, axis=1),
            jax.lax.dynamic_update_slice_in_dim(self.v_BSKH, v_BTKH.astype(self.v_BSKH.dtype), self.length, axis=1),
            self.length + k_BTKH.shape[1],
        )

    def _check_room(self, k_BTKH):
        batch, _, num_kv_heads, head_dim = self.k_BSKH.shape
        if (k_BTKH.shape[0], *k_BTKH.shape[2:]) != (batch, num_kv_heads, head_dim):
            raise ValueError(
                f"This cache takes keys of shape ({batch}, T, {num_kv_heads}, {head_dim}), but got {k_BTKH.shape}."
            )
        filled = 0 if isinstance(self.length, jax.core.Tracer) else int(self.length)
        if filled + k_BTKH.shape[1] > self.max_length:
            raise ValueError(
                f"This cache has room for {self.max_length} positions and holds {filled}, so {k_BTKH.shape[1]} more "
                "do not fit. Make it longer: `KVCache.zeros(batch, max_length, ...)`."
            )
