"""The norm of all gradients together, and clipping by it.

    |g| = sqrt(sum of g^2)        g <- g min(1, clip_norm / |g|)

Written as one sum, XLA makes an array of squares as large as all gradients. Layers are stacked along the first axis,
so squares of one after another are added to an array of one layer instead; devices that share a layer need to talk
once, after the last. For the same reason the training step says the norm to the clipping, which would else need the
divided gradients by themselves.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

PyTree = Any


def global_norm(tree: PyTree) -> jax.Array:
    """The norm of all arrays of a tree together, fp32."""
    return jnp.sqrt(sum(map(_sum_of_squares, jax.tree.leaves(tree)), jnp.zeros(())))


def clip_by_global_norm(largest: float) -> optax.GradientTransformationExtraArgs:
    """As `optax.clip_by_global_norm`; `update(..., grad_norm=...)` takes the norm where it is known."""

    def update(updates, state, params=None, *, grad_norm: jax.Array | None = None, **_):
        del params
        norm = global_norm(updates) if grad_norm is None else grad_norm
        factor = jnp.where(norm > largest, largest / norm, 1.0)
        return jax.tree.map(lambda g: (g * factor).astype(g.dtype), updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def _sum_of_squares(x: jax.Array) -> jax.Array:
    square = lambda x: jnp.square(x.astype(jnp.float32))
    if x.ndim < 3:  # no stack of matrices
        return jnp.sum(square(x))
    return jnp.sum(jax.lax.fori_loop(1, x.shape[0], lambda i, total: total + square(x[i]), square(x[0])))
