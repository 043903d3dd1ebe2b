"""Dynamic loss scaling for float16, whose gradients vanish below 6e-8 and overflow above 65504.

The loss is multiplied by `scale` before the backward pass and gradients are divided by it after. A gradient that
is not finite halves the scale, and no update is made of it; `GROW_AFTER` finite ones in a row double it
(arXiv:1710.03740). bfloat16 has the range of float32 and needs none of this.
"""

import jax
import jax.numpy as jnp

START, LOWEST, HIGHEST, GROW_AFTER = 2.0**15, 1.0, 2.0**24, 2000


def init_loss_scale() -> dict[str, jax.Array]:
    """The scale, and how many gradients in a row were finite."""
    return {"scale": jnp.float32(START), "finite": jnp.int32(0)}


def next_loss_scale(state: dict[str, jax.Array], is_finite: jax.Array) -> dict[str, jax.Array]:
    """After a gradient that is finite, or is not."""
    finite = jnp.where(is_finite, state["finite"] + 1, 0)
    grown = jnp.where(finite >= GROW_AFTER, 2 * state["scale"], state["scale"])
    scale = jnp.clip(jnp.where(is_finite, grown, state["scale"] / 2), LOWEST, HIGHEST)
    return {"scale": scale, "finite": jnp.where(finite >= GROW_AFTER, 0, finite)}
