"""Logits -> tokens.

p = softmax(logits / temperature)      temperature 0: the largest logit (greedy)
top-k keeps the k largest of p         top-p keeps the largest until their sum reaches p         (arXiv:1904.09751)
min-p keeps those of at least m times the largest                                                (arXiv:2407.01082)
a repetition penalty r, before all: logits of tokens that were there are divided by r, or multiplied where negative
                                                                                                 (arXiv:1909.05858)
"""

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn."""

    temperature: float = 1.0  # 0 always takes the likeliest token, 1 is the model's own distribution
    top_k: int | None = None  # only the k likeliest tokens (more where logits are equal)
    top_p: float | None = None  # only the fewest likeliest tokens whose probabilities sum to at least p
    min_p: float | None = None  # only tokens of at least so many times the probability of the likeliest
    repetition_penalty: float = 1.0  # above 1, tokens that were there already become less likely

    def __post_init__(self):
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be at least 0 (greedy), but got {self.temperature}.")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, or null for all tokens, but got {self.top_k}.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, or null for all tokens, but got {self.top_p}.")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p must be between 0 and 1, or null for all tokens, but got {self.min_p}.")
        if not 0 < self.repetition_penalty < float("inf"):
            raise ValueError(f"repetition_penalty must be above 0 (1: none), but got {self.repetition_penalty}.")


def sample(
    logits_BV: jax.Array, key: jax.Array, how: Sampling | None = None, *, seen_BV: jax.Array | None = None
) -> jax.Array:
    """Returns one token for each row, int32 of shape (B,).

    Args:
      how: Sampling() if None. top-k, top-p and min-p work one after another on the logits after the temperature.
      seen_BV: which tokens were there already, for the repetition penalty; bool.

    >>> sample(jnp.array([[0.0, 5.0]]), jax.random.key(0), Sampling(temperature=0))
    Array([1], dtype=int32)
    """
    how = Sampling() if how is None else how
    if seen_BV is not None:
        logits_BV = penalize(logits_BV, seen_BV, how.repetition_penalty)
    if how.temperature == 0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    logits_BV = logits_BV / how.temperature
    if how.top_k is not None:
        logits_BV = keep_top_k(logits_BV, how.top_k)
    if how.top_p is not None:
        logits_BV = keep_top_p(logits_BV, how.top_p)
    if how.min_p is not None:
        logits_BV = keep_min_p(logits_BV, how.min_p)
    return jax.random.categorical(key, logits_BV, axis=-1).astype(jnp.int32)


def penalize(logits_BV: jax.Array, seen_BV: jax.Array, penalty: float) -> jax.Array:
    """Lower logits where a token was there already (for a penalty above 1)."""
    lower_BV = jnp.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
    return jnp.where(seen_BV, lower_BV, logits_BV)


def keep_top_k(logits_BV: jax.Array, k: int) -> jax.Array:
    """-inf for all but the k largest of each row."""
    smallest_B1 = jax.lax.top_k(logits_BV, min(k, logits_BV.shape[-1]))[0][:, -1:]
    return jnp.where(logits_BV < smallest_B1, -jnp.inf, logits_BV)


def keep_top_p(logits_BV: jax.Array, p: float) -> jax.Array:
    """-inf for all but the fewest largest of each row whose probabilities sum to at least p."""
    sorted_BV = -jnp.sort(-logits_BV, axis=-1)
    p_BV = jax.nn.softmax(sorted_BV, axis=-1)
    before_BV = jnp.cumsum(p_BV, axis=-1) - p_BV  # what the larger ones sum to
    inside_BV = (before_BV < p).at[:, 0].set(True)
    smallest_B1 = jnp.min(jnp.where(inside_BV, sorted_BV, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits_BV < smallest_B1, -jnp.inf, logits_BV)


def keep_min_p(logits_BV: jax.Array, m: float) -> jax.Array:
    """-inf for all whose probability is below m times the largest of the row."""
    largest_B1 = jnp.max(logits_BV, axis=-1, keepdims=True)
    return jnp.where(logits_BV < largest_B1 + jnp.log(m), -jnp.inf, logits_BV)
