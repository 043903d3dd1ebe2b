"""Tokens and positions as vectors.

    x_BTD = table_VD[tokens_BT]                 and, where the output head is tied,
    logits_BTV = x_BTD . table_VD^T

Both come out in fp32: they start the streams, which are wider than the compute dtype. A token or position
beyond the table gives NaN, not its last row.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from .rounding import accumulator


class Embedding(nnx.Module):
    """One vector per token. Tie the output head by using `head_kernel`, not by a second Param."""

    def __init__(self, vocab_size: int, d_model: int, *, init_std: float = 0.02, dtype=jnp.bfloat16, rngs: nnx.Rngs):
        self.table = nnx.Param(init_std * jax.random.normal(rngs.params(), (vocab_size, d_model), jnp.float32))
        self.dtype = dtype

    def encode(self, tokens_BT: jax.Array) -> jax.Array:
        """Returns x_BTD, fp32."""
        return _rows(self.table[...], tokens_BT)

    @property
    def head_kernel(self) -> jax.Array:
        """The table as kernel_DV, for `cross_entropy` or a tied head."""
        return self.table[...].T

    def attend(self, x_BTD: jax.Array) -> jax.Array:
        """Returns logits_BTV, fp32; the product runs in `dtype`."""
        table_VD = self.table[...].astype(self.dtype)
        dims = (((x_BTD.ndim - 1,), (1,)), ((), ()))
        return jax.lax.dot_general(
            x_BTD.astype(self.dtype), table_VD, dims, preferred_element_type=accumulator(self.dtype)
        )


class LearnedPositions(nnx.Module):
    """One vector per position, up to `max_length` of them."""

    def __init__(self, max_length: int, d_model: int, *, init_std: float = 0.02, rngs: nnx.Rngs):
        self.table = nnx.Param(init_std * jax.random.normal(rngs.params(), (max_length, d_model), jnp.float32))

    def __call__(self, positions_BT: jax.Array) -> jax.Array:
        """Returns x_BTD, fp32."""
        return _rows(self.table[...], positions_BT)


def _rows(table, indices):
    """NaN where there is no such row (and none is counted from the end), so that `unsafe` says so."""
    return table.at[indices].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
