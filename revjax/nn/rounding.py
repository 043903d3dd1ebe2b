"""Roundings to low precision that XLA may not leave out.

Where XLA fuses, it may keep an fp32 value and skip its rounding to bf16 ("excess precision"), and it fuses
differently in different programs. `reduce_precision` says that the rounding is meant.
"""

import jax
import jax.numpy as jnp

_BITS = {jnp.dtype("bfloat16"): (8, 7), jnp.dtype("float16"): (5, 10)}  # exponent and mantissa


def rounded(x: jax.Array, dtype) -> jax.Array:
    """Returns x in `dtype`, rounded exactly once."""
    bits = _BITS.get(jnp.dtype(dtype))
    return (jax.lax.reduce_precision(x, *bits) if bits else x).astype(dtype)


def accumulator(dtype):
    """The dtype of sums of products of `dtype`: fp32, or fp64 where the operands are."""
    return jnp.promote_types(dtype, jnp.float32)
