"""Rotary frequencies for contexts longer than those that a model was first trained on.

With w_i = base^(-2 i / H), the radians per position of channel pair i, N the context of the first training, and s the
factor by which it grew:

    linear     w_i / s                                                       (Chen et al. 2023, arXiv:2306.15595)
    dynamic    base' = base (s T / N - (s - 1))^(H / (H - 2)) where T > N     (NTK-aware, bloc97 2023)
    llama3     w_i / s where a wave is longer than N / low_freq_factor, w_i where it is shorter than
               N / high_freq_factor, and a mixture of both between            (Llama 3.1, arXiv:2407.21783)
    yarn       w_i / s where a channel turns less than beta_slow times in N, w_i where it turns more than beta_fast
               times, a mixture between; and queries and keys are scaled      (arXiv:2309.00071)
    longrope   w_i / short_factor_i where T <= N, else w_i / long_factor_i; and queries and keys are scaled
                                                                             (arXiv:2402.13753)

T is the number of positions in use. Formulas and their rounding follow `modeling_rope_utils.py` of transformers 5, so
that a checkpoint means the same here.
"""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are changed, as a value: `Rotary(base, RopeScaling(kind="linear", factor=8))`."""

    kind: Literal["linear", "dynamic", "llama3", "yarn", "longrope"]
    factor: float = 1.0
    original_max_length: int = 8192  # the context before it was extended; not used by linear
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    truncate: bool = True  # yarn: whole channels
    attention_factor: float | None = None  # yarn and longrope: of queries and keys; null is computed from the others
    mscale: float | None = None  # yarn: what it is computed from
    mscale_all_dim: float | None = None  # yarn
    short_factor: tuple[float, ...] = ()  # longrope: one for each pair of channels
    long_factor: tuple[float, ...] = ()  # longrope

    def __post_init__(self):
        if self.factor <= 0 or self.original_max_length < 1:
            raise ValueError(
                "factor must be positive and original_max_length at least 1, but got "
                f"{self.factor} and {self.original_max_length}."
            )
        if self.kind == "llama3" and self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(
                "low_freq_factor must be below high_freq_factor, but got "
                f"{self.low_freq_factor} and {self.high_freq_factor}."
            )
        if self.kind == "longrope" and not len(self.short_factor) == len(self.long_factor) > 0:
            raise ValueError(
                "longrope needs short_factor and long_factor, a number for each pair of channels, but got "
                f"{len(self.short_factor)} and {len(self.long_factor)} of them."
            )

    def frequencies(self, base: float, head_dim: int, length: jax.Array) -> jax.Array:
        """Radians per position for each pair of channels: fp32, (head_dim / 2,). `length` positions are in use."""
        return getattr(self, f"_{self.kind}")(base, head_dim, length)

    @property
    def magnitude(self) -> float:
        """What queries and keys are multiplied by."""
        if self.kind not in ("yarn", "longrope"):
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        if self.kind == "longrope":
            return math.sqrt(1 + max(math.log(self.factor), 0.0) / math.log(self.original_max_length))
        if self.mscale and self.mscale_all_dim:
            return _mscale(self.factor, self.mscale) / _mscale(self.factor, self.mscale_all_dim)
        return _mscale(self.factor, 1.0)

    def _linear(self, base, head_dim, length):
        del length
        return frequencies(base, head_dim) / self.factor

    def _dynamic(self, base, head_dim, length):
        used = jnp.maximum(length, self.original_max_length).astype(jnp.float32)
        grown = self.factor * used / self.original_max_length - (self.factor - 1)
        return frequencies(base * grown ** (head_dim / (head_dim - 2)), head_dim)

    def _llama3(self, base, head_dim, length):
        del length
        w, low, high = frequencies(base, head_dim), self.low_freq_factor, self.high_freq_factor
        waves = 2 * math.pi / w
        smooth = (self.original_max_length / waves - low) / (high - low)
        between = (1 - smooth) * w / self.factor + smooth * w
        is_long, is_short = waves > self.original_max_length / low, waves < self.original_max_length / high
        return jnp.where(is_long, w / self.factor, jnp.where(is_short, w, between))

    def _yarn(self, base, head_dim, length):
        del length
        turning = lambda turns: (
            head_dim * math.log(self.original_max_length / (turns * 2 * math.pi)) / (2 * math.log(base))
        )
        low, high = turning(self.beta_fast), turning(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, head_dim - 1)
        high += 0.001 if low == high else 0
        share = jnp.clip((jnp.arange(head_dim // 2, dtype=jnp.float32) - low) / (high - low), 0, 1)  # of the stretched
        w = frequencies(base, head_dim)
        return w / self.factor * share + w * (1 - share)

    def _longrope(self, base, head_dim, length):
        if len(self.short_factor) != head_dim // 2:
            raise ValueError(f"longrope needs {head_dim // 2} factors, but got {len(self.short_factor)}.")
        short, long = jnp.asarray(self.short_factor, jnp.float32), jnp.asarray(self.long_factor, jnp.float32)
        return frequencies(base, head_dim) / jnp.where(length > self.original_max_length, long, short)


def frequencies(base: float | jax.Array, head_dim: int) -> jax.Array:
    """base^(-2 i / H): fp32, (head_dim / 2,)."""
    return base ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)


def _mscale(factor: float, m: float) -> float:
    return 0.1 * m * math.log(factor) + 1 if factor > 1 else 1.0
