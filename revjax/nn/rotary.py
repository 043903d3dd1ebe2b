"""Rotary position embedding (RoFormer, arXiv:2104.09864), in the half-split layout of GPT-NeoX and LLaMA.

    angle_i = position * base^(-2 i / H)        for i < H / 2
    y_i         = x_i cos(angle_i)       - x_{i+H/2} sin(angle_i)
    y_{i+H/2}   = x_{i+H/2} cos(angle_i) + x_i sin(angle_i)

q . k then depends on positions only by their difference. Angles and products are fp32.
"""

import dataclasses

import jax
import jax.numpy as jnp

from .rope_scaling import RopeScaling, frequencies
from .rounding import accumulator


@dataclasses.dataclass(frozen=True)
class Rotary:
    """How positions turn queries and keys, as a value: pass it to `Attention(rotary=...)`.

    Attributes:
      scaling: for contexts longer than those of the first training; None is none.
    """

    base: float = 10_000.0
    scaling: RopeScaling | None = None

    def __post_init__(self):
        if self.base <= 0:
            raise ValueError(f"The base of rotary embeddings must be positive, but got {self.base}.")

    def frequencies(self, head_dim: int, positions_BT: jax.Array) -> jax.Array:
        """Returns radians per position for each pair of channels: fp32, (head_dim / 2,)."""
        if self.scaling is None:
            return frequencies(self.base, head_dim)
        return self.scaling.frequencies(self.base, head_dim, jnp.max(positions_BT) + 1)

    def __call__(self, x_BTNH: jax.Array, positions_BT: jax.Array) -> jax.Array:
        """Returns x turned by its positions, in x's dtype. `positions` may have one row for the whole batch."""
        head_dim = x_BTNH.shape[-1]
        if head_dim % 2:
            raise ValueError(f"Rotary embeddings pair up channels, so head_dim must be even, but got {head_dim}.")
        wide = accumulator(x_BTNH.dtype)
        positions_BT11 = positions_BT.astype(wide)[:, :, None, None]
        angles = positions_BT11 * self.frequencies(head_dim, positions_BT)[None, None, None, :]
        cos, sin = jnp.cos(angles), jnp.sin(angles)
        if self.scaling is not None and self.scaling.magnitude != 1:
            cos, sin = cos * self.scaling.magnitude, sin * self.scaling.magnitude
        first, second = jnp.split(x_BTNH.astype(wide), 2, axis=-1)
        y = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
        return y.astype(x_BTNH.dtype)


def rotary(x_BTNH: jax.Array, positions_BT: jax.Array, *, base: float = 10_000.0) -> jax.Array:
    """Returns x turned by its positions, in x's dtype: `Rotary(base)(x, positions)`."""
    return Rotary(base)(x_BTNH, positions_BT)
