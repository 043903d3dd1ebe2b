"""Logits -> tokens.

p = softmax(logits / temperature)      temperature 0: the largest logit (greedy)
top-k keeps the k largest of p         top-p keeps the largest until their sum reaches p   (arXiv:1904.09751)
"""

import jax
import jax.numpy as jnp


def sample(
    logits_BV: jax.Array,
    key: jax.Array,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> jax.Array:
    """Returns one token for each row, int32 of shape (B,). The filters work on the logits after the temperature.

    Args:
      temperature: 0 is greedy, 1 the model's own distribution.
      top_k: only the k likeliest tokens (more where logits are equal).
      top_p: only the fewest likeliest tokens whose probabilities sum to at least p; always one at least.

    >>> sample(jnp.array([[0.0, 5.0]]), jax.random.key(0), temperature=0)
    Array([1], dtype=int32)
    """
    check_options(temperature, top_k, top_p)
    if temperature == 0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    logits_BV = logits_BV / temperature
    if top_k is not None:
        logits_BV = keep_top_k(logits_BV, top_k)
    if top_p is not None:
        logits_BV = keep_top_p(logits_BV, top_p)
    return jax.random.categorical(key, logits_BV, axis=-1).astype(jnp.int32)


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


def check_options(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Raises `ValueError` for options that make no sense."""
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature must be at least 0 (greedy), but got {temperature}.")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, or None for all tokens, but got {top_k}.")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, or None for all tokens, but got {top_p}.")
