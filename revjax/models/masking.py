"""Which tokens a masked language model has to guess (BERT, arXiv:1810.04805).

As many places in each row, drawn without replacement, so that the head runs on these alone. Of them 80 % become the
mask, 10 % a random token, and 10 % stay as they are.
"""

import jax
import jax.numpy as jnp


def mask_tokens(
    tokens_BT: jax.Array, key: jax.Array, *, rate: float, mask_token: int, vocab_size: int
) -> tuple[jax.Array, jax.Array]:
    """Returns (tokens_BT with what is to be guessed hidden, places_BM: where, M = rate T in each row, at least 1).

    Args:
      vocab_size: random tokens are drawn from [0, vocab_size).
    """
    batch, length = tokens_BT.shape
    num_masked = max(1, round(rate * length))
    where, how, which = jax.random.split(key, 3)
    _, places_BM = jax.lax.top_k(jax.random.uniform(where, (batch, length)), num_masked)
    draw = jax.random.uniform(how, (batch, num_masked))
    other = jax.random.randint(which, (batch, num_masked), 0, vocab_size, tokens_BT.dtype)
    there = jnp.take_along_axis(tokens_BT, places_BM, axis=1)
    hidden = jnp.where(draw < 0.8, mask_token, jnp.where(draw < 0.9, other, there)).astype(tokens_BT.dtype)
    rows = jnp.arange(batch)[:, None]
    return tokens_BT.at[rows, places_BM].set(hidden), places_BM
