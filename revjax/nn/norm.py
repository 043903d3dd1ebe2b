"""Normalisation over the last axis, with fp32 statistics whatever the dtypes around it.

RMSNorm      y = x / sqrt(mean(x^2) + eps) * (offset + scale)            (arXiv:1910.07467)
LayerNorm    y = (x - mean x) / sqrt(var x + eps) * scale + bias         (arXiv:1607.06450)
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from .rounding import accumulator


class RMSNorm(nnx.Module):
    """Divides by the root mean square of the last axis. Starts as a pure normalisation: offset + scale = 1.

    `offset=1.0` stores the scale's distance from 1 (Gemma), which weight decay then pulls to 1 and not to 0.
    """

    def __init__(self, dim: int, *, eps: float = 1e-6, offset: float = 0.0, dtype=jnp.bfloat16, rngs: nnx.Rngs):
        del rngs  # nothing random: it is taken so that all norms are made alike
        self.scale = nnx.Param(jnp.full((dim,), 1.0 - offset, jnp.float32))
        self.eps = eps
        self.offset = offset
        self.dtype = dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        return _normalize(self.offset + self.scale[...], None, x, self.eps, self.dtype, False)


class LayerNorm(nnx.Module):
    """Subtracts the mean of the last axis and divides by its standard deviation."""

    def __init__(self, dim: int, *, eps: float = 1e-5, use_bias: bool = True, dtype=jnp.bfloat16, rngs: nnx.Rngs):
        del rngs  # nothing random: it is taken so that all norms are made alike
        self.scale = nnx.Param(jnp.ones((dim,), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((dim,), jnp.float32)) if use_bias else None
        self.eps = eps
        self.dtype = dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        bias = None if self.bias is None else self.bias[...]
        return _normalize(self.scale[...], bias, x, self.eps, self.dtype, True)


@functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=(3, 4, 5))
def _normalize(scale_D, bias_D, x, eps, dtype, centred):
    """The backward pass computes it again from x, and keeps no fp32 of x's size."""
    x = x.astype(accumulator(x.dtype))
    if centred:
        x = x - jnp.mean(x, axis=-1, keepdims=True)
    y = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps)
    y = y * _like(scale_D, y)
    if bias_D is not None:
        y = y + _like(bias_D, y)
    return y.astype(dtype)


def _like(p_D, x):
    """Adds leading axes, since ranks are never promoted silently."""
    return p_D.reshape((1,) * (x.ndim - 1) + p_D.shape)
