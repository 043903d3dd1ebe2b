"""Couplings that the study of quality tries, beside those that `revjax.core` has; each is also how to write one.

    revnet           b = 1 everywhere                   v[l+1] = -v[l] + f        v[l] = x[l] - x[l-1]
    leapfrog         b = -1 everywhere                  v[l+1] =  v[l] + f
    alternating      b = 1, -1, 1, -1 ...
    random_signs     b = 1 or -1, drawn once for each f
    falling_steps    b = 1, h falls from 3/2 in the first f to 1/2 in the last
    rising_steps     the other way round
    half_late        b = 1, and 1/2 in the second half of the f's
    half_early       b = 1/2, and 1 in the second half
    half_every_4th   b = 1, and 1/2 in every fourth f

With |b| = 1 nothing is lost and nothing is kept, so v keeps its size; with b = 1/2 it shrinks, for a bit an element.
Named in a config as `coupling: revjax.benchmarking.couplings:alternating`.
"""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

from ..core import AbstractCoupling, LinearCoupling
from ..core.streams import pack_bits, unpack_bits


@dataclasses.dataclass(frozen=True, kw_only=True)
class ByDepth(LinearCoupling):
    """A linear coupling whose signs or steps are functions of how many f's there are."""

    signs: Callable[[int], np.ndarray] | None = None  # (num_fns,) of 1 and -1
    steps: Callable[[int], np.ndarray] | None = None  # (num_fns,)

    def numbers(self, num_fns, x):
        sign = self.sign if self.signs is None else jnp.asarray(self.signs(num_fns), jnp.int32)
        h = self.h if self.steps is None else jnp.asarray(self.steps(num_fns), jnp.float32)
        return LinearCoupling(sign=sign, h=h, shift=self.shift).numbers(num_fns, x)


@dataclasses.dataclass(frozen=True, kw_only=True)
class HalfWhere(AbstractCoupling):
    """b = 1/2 in some f's, and 1 in the others. A bit is kept for each f, though only those with 1/2 need theirs."""

    linear = True
    kept_bits = 1
    where: Callable[[int], np.ndarray]  # (num_fns,) of booleans

    def numbers(self, num_fns, x):
        return jnp.asarray(self.where(num_fns)).reshape(num_fns, *[1] * x.ndim)

    def forward(self, x_prev, x, fx, n):
        return x + jnp.where(n, 0.5, 1.0) * (x_prev - x) + fx.astype(x.dtype)

    def inverse(self, x, x_next, fx, n):
        return x + jnp.where(n, 2.0, 1.0) * (x_next - x - fx.astype(x.dtype))

    def forward_exact(self, grid, q_prev, q, fx, n):
        gap = q_prev - q
        return q + jnp.where(n, (gap + 1) >> 1, gap) + grid.encode(fx), pack_bits((gap + 1) & 1, 1)

    def inverse_exact(self, grid, q, q_next, fx, kept, n):
        gap = q_next - q - grid.encode(fx)
        return q + jnp.where(n, (gap << 1 | unpack_bits(kept, 1)) - 1, gap)

    def unsafe(self, grid, x_prev, x, fx, n):
        return super().unsafe(grid, x_prev, x, fx, n) | grid.unsafe(x_prev - x)


def alternating() -> AbstractCoupling:
    return ByDepth(signs=lambda num: 1 - 2 * (np.arange(num) % 2))


def random_signs() -> AbstractCoupling:
    return ByDepth(signs=lambda num: 1 - 2 * np.random.default_rng(0).integers(0, 2, num))


def falling_steps() -> AbstractCoupling:
    return ByDepth(steps=lambda num: np.linspace(1.5, 0.5, num))


def rising_steps() -> AbstractCoupling:
    return ByDepth(steps=lambda num: np.linspace(0.5, 1.5, num))


def half_late() -> AbstractCoupling:
    return HalfWhere(where=lambda num: np.arange(num) >= num // 2)


def half_early() -> AbstractCoupling:
    return HalfWhere(where=lambda num: np.arange(num) < num // 2)


def half_every_4th() -> AbstractCoupling:
    return HalfWhere(where=lambda num: np.arange(num) % 4 == 3)
