"""The learning rate over a run of S updates; t counts updates from 0, u runs from 0 (warm) to 1 (t = S).

lr(t)   = peak * min(1, (t + 1) / warmup) * (final + (1 - final) shape(u))

cosine    (1 + cos(pi u)) / 2                                                   (arXiv:1608.03983)
linear    1 - u
wsd       1, then linearly to 0 over the last `decay` updates: warmup, stable, decay   (arXiv:2404.06395)
constant  1
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ..config import import_function
from .optimizer import OptimizerConfig

Schedule = Callable[[Any], jax.Array]


def make_schedule(config: OptimizerConfig, total_steps: int) -> Schedule:
    """Returns the learning rate as a function of the number of updates made before.

    `config.schedule` may name a function of the user's own, which gets these arguments and returns such a function.
    Raises `ConfigError` where there is none of that name.
    """
    if config.schedule not in SHAPES:
        own = import_function(config.schedule, what="schedule", known=SHAPES, takes=("config", "total_steps"))
        return own(config, total_steps)
    shape = SHAPES[config.schedule]
    decay = config.decay_steps or max(total_steps // 10, 1)

    def schedule(t):
        t = jnp.asarray(t, jnp.float32)
        ramp = jnp.minimum(1.0, (t + 1) / max(config.warmup_steps, 1))
        u = jnp.clip((t - config.warmup_steps) / max(total_steps - config.warmup_steps, 1), 0.0, 1.0)
        left = jnp.clip((total_steps - t) / decay, 0.0, 1.0)  # of the decay at the end
        return config.learning_rate * ramp * (config.final_fraction + (1 - config.final_fraction) * shape(u, left))

    return schedule


SHAPES: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "cosine": lambda u, left: 0.5 * (1 + jnp.cos(jnp.pi * u)),
    "linear": lambda u, left: 1 - u,
    "wsd": lambda u, left: left,
    "constant": lambda u, left: jnp.ones_like(u),
}
