"""A dense layer from some trailing axes to others.

    y_BTNH = x_BTD . kernel_DNH + bias_NH
    y_BTNH += scale (x_BTD . a_DR) . b_RNH          with an adapter of low rank R (LoRA, arXiv:2106.09685)

The kernel is stored in fp32 and cast for the product, and its gradient is accumulated in fp32.
`init_std=None` is 1 / sqrt(fan-in), which keeps the variance of x.

    backward    dx = dy . kernel^T        dkernel = x^T . dy

On CPU each product is an fp32 one that is rounded afterwards: XLA computes bf16 results of bf16 operands
up to seven times slower there. Measured on 2 CPU cores, an MLP forward and backward takes 0.4 of the time
of plain bf16 products on jax 0.10.2 (D = 256 and 512), and 0.15 on jax 0.12.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from .rounding import accumulator, rounded


class Linear(nnx.Module):
    """Contracts the last axes `in_dims` of x with the first axes of `kernel`, which has (*in_dims, *out_dims).

    >>> Linear(8, (2, 4), rngs=nnx.Rngs(0))(jnp.ones((3, 8))).shape
    (3, 2, 4)
    """

    adapter: Any = None  # a `LowRank`: see `revjax.models.add_adapters`

    def __init__(
        self,
        in_dims: int | Sequence[int],
        out_dims: int | Sequence[int],
        *,
        init_std: float | None = None,
        use_bias: bool = False,
        dtype=jnp.bfloat16,
        rngs: nnx.Rngs,
    ):
        self.in_dims = _as_tuple(in_dims)
        out_dims = _as_tuple(out_dims)
        init_std = 1 / math.sqrt(math.prod(self.in_dims)) if init_std is None else init_std
        kernel = init_std * jax.random.normal(rngs.params(), (*self.in_dims, *out_dims), jnp.float32)
        self.kernel = nnx.Param(kernel)
        self.bias = nnx.Param(jnp.zeros(out_dims, jnp.float32)) if use_bias else None
        self.dtype = dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        n = len(self.in_dims)
        if x.shape[-n:] != self.in_dims:
            raise ValueError(f"The last axes of x must be {self.in_dims}, but x has the shape {x.shape}.")
        y: Any = _dense(n, x.astype(self.dtype), self.kernel[...])
        if self.bias is not None:
            bias = self.bias[...].astype(self.dtype)
            y = y + bias.reshape((1,) * (y.ndim - bias.ndim) + bias.shape)
        return y if self.adapter is None else y + self.adapter(x)


class LowRank(nnx.Module):
    """scale (x . a) . b: what an adapter adds to a `Linear` of these axes. 0 at the start, since b is."""

    def __init__(self, in_dims, out_dims, *, rank: int, scale: float, dtype=jnp.bfloat16, rngs: nnx.Rngs):
        in_dims, out_dims = _as_tuple(in_dims), _as_tuple(out_dims)
        std = 1 / math.sqrt(math.prod(in_dims))
        self.a = nnx.Param(std * jax.random.normal(rngs.params(), (*in_dims, rank), jnp.float32))
        self.b = nnx.Param(jnp.zeros((rank, *out_dims), jnp.float32))
        self.scale, self.dtype = scale, dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        a = self.a[...]
        y: Any = _dense(1, _dense(a.ndim - 1, x.astype(self.dtype), a), self.b[...])
        return self.scale * y


def _contract(n, x, kernel):
    """Contracts the last n axes of x with the first n of the kernel, in x's dtype."""
    axes = (tuple(range(x.ndim - n, x.ndim)), tuple(range(n)))
    return _product(x, kernel.astype(x.dtype), axes, x.dtype)


_dense = jax.custom_vjp(_contract, nondiff_argnums=(0,))


def _dense_fwd(n, x, kernel):
    return _contract(n, x, kernel), (x, kernel)  # not by `_dense`, into which no policy of jax.checkpoint would see


def _dense_bwd(n, residuals, dy):
    x, kernel = residuals
    rows = tuple(range(x.ndim - n))
    outs = (tuple(range(len(rows), dy.ndim)), tuple(range(n, kernel.ndim)))
    dx = _product(dy, kernel.astype(x.dtype), outs, x.dtype)
    return dx, _product(x, dy, (rows, rows), kernel.dtype)


_dense.defvjp(_dense_fwd, _dense_bwd)


def _product(a, b, axes, dtype):
    """The product of a and b in `dtype`; sums run in fp32 on every backend."""
    if jax.default_backend() != "cpu":
        return jax.lax.dot_general(a, b, (axes, ((), ())), preferred_element_type=dtype)
    y = jax.lax.dot_general(a, b, (axes, ((), ())), preferred_element_type=accumulator(a.dtype))
    return rounded(y, dtype)


def _as_tuple(dims) -> tuple[int, ...]:
    return (dims,) if isinstance(dims, int) else tuple(dims)
