"""The keys and values of earlier positions, for generation.

    append    k_BSKH[:, length : length + T] = k_BTKH        length' = length + T

A value: `append` returns a new cache. It has no rule for what to forget. Texts of unequal lengths have padding before
them, so that all end together.
"""

import dataclasses

import jax
import jax.core
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of one attention layer, of which the first `length` places are filled."""

    k_BSKH: jax.Array
    v_BSKH: jax.Array
    length: jax.Array  # int32 scalar
    padding_B: jax.Array | None = None  # int32: so many places before each text are padding; None where none are

    @classmethod
    def zeros(
        cls,
        batch: int,
        max_length: int,
        num_kv_heads: int,
        head_dim: int,
        dtype=jnp.bfloat16,
        *,
        padding_B: jax.Array | None = None,
    ) -> "KVCache":
        """Returns an empty cache with room for `max_length` places."""
        empty = jnp.zeros((batch, max_length, num_kv_heads, head_dim), dtype)
        return cls(empty, jnp.zeros_like(empty), jnp.zeros((), jnp.int32), padding_B)

    @property
    def max_length(self) -> int:
        return self.k_BSKH.shape[-3]

    def positions(self, num_tokens: int) -> jax.Array:
        """(1, T) or (B, T): the positions of the next `num_tokens` in their texts; below 0 in padding."""
        positions_1T = self.length + jnp.arange(num_tokens, dtype=jnp.int32)[None]
        return positions_1T if self.padding_B is None else positions_1T - self.padding_B[:, None]

    def segments(self, num_tokens: int) -> tuple[jax.Array, jax.Array] | tuple[None, None]:
        """(B, T) of the next `num_tokens`, (B, S) of all places: 1 in texts, 0 in padding, where there is any."""
        if self.padding_B is None:
            return None, None
        places_1S = jnp.arange(self.max_length, dtype=jnp.int32)[None]
        is_text = lambda positions: (positions >= 0).astype(jnp.int32)
        return is_text(self.positions(num_tokens)), is_text(places_1S - self.padding_B[:, None])

    def append(self, k_BTKH: jax.Array, v_BTKH: jax.Array) -> "KVCache":
        """Returns the cache with T more places, in the cache's dtype.

        Under `jax.jit` a full cache cannot raise: the caller keeps `length + T <= max_length`.
        """
        self._check_room(k_BTKH)
        return KVCache(
            jax.lax.dynamic_update_slice_in_dim(self.k_BSKH, k_BTKH.astype(self.k_BSKH.dtype), self.length, axis=1),
            jax.lax.dynamic_update_slice_in_dim(self.v_BSKH, v_BTKH.astype(self.v_BSKH.dtype), self.length, axis=1),
            self.length + k_BTKH.shape[1],
            self.padding_B,
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
                f"This cache has room for {self.max_length} places and holds {filled}, so {k_BTKH.shape[1]} more "
                "do not fit. Make it longer: `KVCache.zeros(batch, max_length, ...)`."
            )
