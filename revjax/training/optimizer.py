"""AdamW with a warm-up and a cosine.

    lr(t) = peak * min(1, (t + 1) / warmup) * (final + (1 - final) (1 + cos(pi p)) / 2)
    p     = (t - warmup) / (total - warmup), between 0 and 1                         (arXiv:1608.03983)

    w    <- w - lr(t) (m / (sqrt(v) + eps) + decay w)        decay: matrices only    (arXiv:1711.05101)

t counts updates from 0. Gradients are scaled down to `clip_norm` before m and v see them.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

PyTree = Any
Schedule = Callable[[Any], jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """How parameters follow their gradients."""

    name: Literal["adamw"] = "adamw"
    learning_rate: float = 1e-3  # at its peak, after the warm-up
    warmup_steps: int = 100  # steps from 0 to the peak
    final_fraction: float = 0.1  # of the peak, where the cosine ends; 1 keeps the peak
    weight_decay: float = 0.1  # of matrices; norms, biases and embeddings have none
    clip_norm: float | None = 1.0  # largest norm of the gradient; null does not clip
    b1: float = 0.9  # memory of m
    b2: float = 0.95  # memory of v
    eps: float = 1e-8

    def __post_init__(self):
        for name in ("learning_rate", "eps"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be a number above 0, but got {getattr(self, name)}.")
        for name in ("warmup_steps", "weight_decay"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be at least 0, but got {getattr(self, name)}.")
        if not 0 <= self.final_fraction <= 1:
            raise ValueError(f"final_fraction must be in [0, 1], but got {self.final_fraction}.")
        for name in ("b1", "b2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), but got {getattr(self, name)}.")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ValueError(f"clip_norm must be above 0, or null for none, but got {self.clip_norm}.")


def make_schedule(config: OptimizerConfig, total_steps: int) -> Schedule:
    """Returns the learning rate as a function of the number of updates made before."""

    def schedule(t):
        t = jnp.asarray(t, jnp.float32)
        ramp = jnp.minimum(1.0, (t + 1) / max(config.warmup_steps, 1))
        p = jnp.clip((t - config.warmup_steps) / max(total_steps - config.warmup_steps, 1), 0.0, 1.0)
        cosine = 0.5 * (1 + jnp.cos(jnp.pi * p))
        return config.learning_rate * ramp * (config.final_fraction + (1 - config.final_fraction) * cosine)

    return schedule


def make_optimizer(config: OptimizerConfig, total_steps: int) -> optax.GradientTransformation:
    """Returns AdamW for a pytree of parameters, over `total_steps` updates.

    Parameters are named by their path: whatever has "norm", "bias", "scale" or an embedding "table" in it is
    not decayed, and neither is a vector. (Stacked layers make matrices of vectors, so shapes alone do not tell.)
    """
    clip = optax.identity() if config.clip_norm is None else optax.clip_by_global_norm(config.clip_norm)
    return optax.chain(
        clip,
        optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps),
        optax.add_decayed_weights(config.weight_decay, mask=is_decayed),
        optax.scale_by_learning_rate(make_schedule(config, total_steps)),
    )


def is_decayed(params: PyTree) -> PyTree:
    """Returns a bool for each parameter: whether weight decay pulls at it."""

    def decayed(path, x):
        name = jax.tree_util.keystr(path).lower()
        return x.ndim >= 2 and not any(word in name for word in ("norm", "bias", "scale", "table", "embedding"))

    return jax.tree.map_with_path(decayed, params)
