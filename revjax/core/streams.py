"""How the streams of a reversible stack are held: int32 fixed point (exact), or floats (baseline).

    fixed point    x = q * 2**-fraction_bits,   q int32     with 16 bits: |x| < 32768, steps of 1.5e-5

Integer addition loses nothing, so an inverse returns the very bits that the forward pass had. What
integers would hide is counted in floats before the cast: an element that is not finite, or that does
not fit, is `unsafe`.

This file knows nothing of the recurrence: a coupling says what is added to what.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class FixedPoint:
    """Streams as int32 multiples of 2**-fraction_bits.

    More bits are a finer grid and a smaller range; streams are exact while |x| stays below `limit`.
    """

    fraction_bits: int = 16

    def __post_init__(self):
        if not 1 <= self.fraction_bits <= 24:
            raise ValueError(
                f"fraction_bits must be between 1 and 24, but got {self.fraction_bits}. "
                "16 holds |x| < 32768 in steps of 1.5e-5."
            )

    @property
    def limit(self) -> float:
        """An element with |x| at or above this is unsafe (a tenth of a percent below what int32 holds)."""
        return 2.0 ** (31 - self.fraction_bits) * (1 - 2.0**-10)

    def encode(self, x: jax.Array) -> jax.Array:
        """The nearest multiples of the grid, as int32. Anything outside `limit` comes out wrong: ask `unsafe`."""
        return jnp.round(x.astype(jnp.float32) * 2.0**self.fraction_bits).astype(jnp.int32)

    def decode(self, q: jax.Array) -> jax.Array:
        """What f sees: float32, the same for the same integers."""
        return q.astype(jnp.float32) * 2.0**-self.fraction_bits

    def unsafe(self, x: jax.Array) -> jax.Array:
        """True where the float `x` is not finite or does not fit."""
        return ~(jnp.abs(x) < self.limit)


@dataclasses.dataclass(frozen=True)
class Exact:
    """The arithmetic of fixed-point streams: the inverse is the inverse to the bit."""

    grid: FixedPoint

    def encode(self, x):
        return self.grid.encode(x)

    def decode(self, q) -> Any:
        return None if q is None else self.grid.decode(q)

    def step(self, coupling, q_prev, q, fx, n):
        """Returns x[l+1], the bits that the inverse needs, and how many elements of each row are unsafe."""
        q_next, kept = coupling.forward_exact(self.grid, q_prev, q, fx, n)
        unsafe = coupling.unsafe(self.grid, self.decode(q_prev), self.decode(q), fx, n)
        return q_next, kept, row_counts(unsafe)

    def unstep(self, coupling, q, q_next, fx, kept, n):
        return coupling.inverse_exact(self.grid, q, q_next, fx, kept, n)

    def unsafe(self, x):
        return row_counts(self.grid.unsafe(x))

    def checksum(self, q):
        return None if q is None else row_checksums(q)

    def max_abs(self, q):
        return _by_row(jnp.max, jnp.abs(q)).astype(jnp.float32) * 2.0**-self.grid.fraction_bits


@dataclasses.dataclass(frozen=True)
class Float:
    """The arithmetic of float streams: the inverse drifts, and nothing tells by how much. For baselines and tests."""

    dtype: jnp.dtype

    def encode(self, x):
        return x

    def decode(self, x) -> Any:
        return x

    def step(self, coupling, x_prev, x, fx, n):
        x_next = coupling.forward(x_prev, x, fx, n).astype(x.dtype)
        return x_next, None, self.unsafe(x_next)

    def unstep(self, coupling, x, x_next, fx, kept, n):
        return coupling.inverse(x, x_next, fx, n).astype(x.dtype)

    def unsafe(self, x):
        return row_counts(~jnp.isfinite(x))

    def checksum(self, x):
        return None

    def max_abs(self, x):
        return _by_row(jnp.max, jnp.abs(x)).astype(jnp.float32)


def row_counts(x: jax.Array) -> jax.Array:
    """How many elements of each row of booleans are true, in float32."""
    return _by_row(jnp.sum, x.astype(jnp.int32)).astype(jnp.float32)


def row_checksums(q: jax.Array) -> jax.Array:
    """A sum mod 2**32 with odd weights by place, for each row: no change of one element goes unseen.

    By row, so that a batch that is sharded needs no collective for it.
    """
    # A 0 that depends on q: without it XLA computes the places once, before a loop over layers, and keeps them.
    zero = jnp.minimum(q[(0,) * q.ndim] & 1, 0).astype(jnp.uint32)
    place = functools.reduce(
        lambda acc, axis: acc * q.shape[axis] + jax.lax.broadcasted_iota(jnp.uint32, q.shape, axis),
        range(min(1, q.ndim - 1), q.ndim),
        jnp.broadcast_to(zero, q.shape),
    )
    return _by_row(functools.partial(jnp.sum, dtype=jnp.uint32), q.astype(jnp.uint32) * (2 * place + 1))


def _by_row(reduce, x: jax.Array) -> jax.Array:
    """Reduces all axes but the first (the batch); a 1-D array is one row.

    The last axis comes last and by itself (the barrier keeps XLA from merging the two), so that the large part
    adds vectors: 2 to 3 times faster on CPU, where sums along a vector are done in turn.
    """
    if x.ndim > 2:
        x = jax.lax.optimization_barrier(reduce(x, axis=tuple(range(1, x.ndim - 1))))
    return reduce(x, axis=x.ndim - 1)


def pack_bits(bits: jax.Array, m: int) -> jax.Array:
    """(..., D) integers below 2**m -> (..., D * m / 8) bytes.

    Raises:
      ValueError: D * m does not fill whole bytes.
    """
    if bits.shape[-1] * m % 8:
        raise ValueError(
            f"This coupling keeps {m} bits for each element, and they must fill whole bytes: the last axis must be "
            f"a multiple of {8 // m}, but got shape {bits.shape}. Use a wider model, or a coupling that keeps nothing "
            "(RevNet())."
        )
    if m == 8:
        return bits.astype(jnp.uint8)
    per_byte = 8 // m
    bits = bits.reshape(*bits.shape[:-1], -1, per_byte).astype(jnp.uint8)
    return functools.reduce(jnp.bitwise_or, [bits[..., i] << (i * m) for i in range(per_byte)])


def unpack_bits(packed: jax.Array, m: int) -> jax.Array:
    """The inverse of `pack_bits`, as int32."""
    if m == 8:
        return packed.astype(jnp.int32)
    bits = jnp.stack([(packed >> (i * m)) & (2**m - 1) for i in range(8 // m)], axis=-1)
    return bits.reshape(*packed.shape[:-1], -1).astype(jnp.int32)
