"""The norm of all gradients together, and clipping by it.

    |g| = sqrt(sum of g^2)        g <- g min(1, clip_norm / |g|)

Written as one sum, XLA makes an array of squares as large as all gradients. Layers are stacked along the first axis,
so squares of one after another are added to an array of one layer instead; devices that share a layer need to talk
once, after the last. For the same reason the training step tells the clipping the norm, which would else need the
divided gradients by themselves.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

PyTree = Any
_WORTH_A_LOOP = 2**14  # elements of a layer


@dataclasses.dataclass(frozen=True, eq=False)
class KnownNorm:
    """The norm of these very arrays."""

    tree: PyTree
    norm: jax.Array

    def is_of(self, tree: PyTree) -> bool:
        """Whether `tree` is that one, and not a part of it, or what something made of it."""
        ours, theirs = jax.tree.leaves(self.tree), jax.tree.leaves(tree)
        return len(ours) == len(theirs) and all(a is b for a, b in zip(ours, theirs, strict=True))


def global_norm(tree: PyTree) -> jax.Array:
    """The norm of all arrays of a tree together, fp32."""
    return jnp.sqrt(sum(map(_sum_of_squares, jax.tree.leaves(tree)), jnp.zeros(())))


def clip_by_global_norm(largest: float) -> optax.GradientTransformationExtraArgs:
    """As `optax.clip_by_global_norm`; `update(..., known_norm=...)` takes the norm where it is that of the updates."""

    def update(updates, state, params=None, *, known_norm: KnownNorm | None = None, **_):
        del params
        if known_norm is None or not known_norm.is_of(updates):
            known_norm = KnownNorm(updates, global_norm(updates))
        norm = known_norm.norm
        factor = jnp.where(norm <= largest, 1.0, largest / norm)  # NaN stays NaN
        return jax.tree.map(lambda g: (g * factor).astype(g.dtype), updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def _sum_of_squares(x: jax.Array) -> jax.Array:
    square = lambda x: jnp.square(jnp.abs(x).astype(jnp.float32))
    if x.ndim < 3 or x.size < _WORTH_A_LOOP * x.shape[0] or not x.size:  # no stack of matrices, or of small ones
        return jnp.sum(square(x))
    return jnp.sum(jax.lax.fori_loop(1, x.shape[0], lambda i, total: total + square(x[i]), square(x[0])))
