"""Prompt -> continuation, with a KV cache.

    prefill    logits, cache = model.decode(prompt_BT, cache)         once
    decode     logits, cache = model.decode(token_B1, cache)          in one scan: shapes never change

Both are jitted by the structure of the model and by these shapes: another prompt of the same length, other
parameters and another key compile nothing.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from .sampling import check_options, sample


def generate(
    model: nnx.Module,
    prompt_tokens: np.ndarray | jax.Array,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    key: jax.Array | None = None,
) -> np.ndarray:
    """Returns `max_new_tokens` tokens that follow each prompt, int32: (T,) -> (new,), or (B, T) -> (B, new).

    Args:
      model: has `init_cache(batch, max_length)` and `decode(tokens_BT, cache)`, as `Decoder` does.
      prompt_tokens: integers in [0, vocab_size), at least one for each row.
      temperature, top_k, top_p: see `sample`; temperature 0 is greedy and needs no key.
      key: for the draws; None is `jax.random.key(0)`.

    Raises `ValueError` for a prompt that is empty, too long, or holds a token that the model does not know.

    >>> generate(model, tokenizer.encode("def "), max_new_tokens=100, temperature=0.7)
    """
    check_options(temperature, top_k, top_p)
    prompt = np.asarray(prompt_tokens)
    rows = prompt[None] if prompt.ndim == 1 else prompt
    check_prompt(rows, max_new_tokens, getattr(model, "config", None))
    graphdef, state = nnx.split(model)
    options = (float(temperature), top_k, top_p)
    key = jax.random.key(0) if key is None else key
    length = rows.shape[1] + max_new_tokens
    rows_BT = jnp.asarray(rows, jnp.int32)
    first_B, cache = _prefill(graphdef, state, rows_BT, key, length=length, options=options)
    rest = _decode(graphdef, state, first_B, cache, key, num_tokens=max_new_tokens - 1, options=options)
    new_tokens = np.concatenate([np.asarray(first_B)[:, None], np.asarray(rest)], axis=1)
    return new_tokens[0] if prompt.ndim == 1 else new_tokens


@functools.partial(jax.jit, static_argnames=("graphdef", "length", "options"))
def _prefill(graphdef, state, prompt_BT, key, *, length, options):
    model = nnx.merge(graphdef, state, copy=True)
    logits_BTV, cache = model.decode(prompt_BT, model.init_cache(prompt_BT.shape[0], length))
    return _sample(logits_BTV, key, 0, options), cache


@functools.partial(jax.jit, static_argnames=("graphdef", "num_tokens", "options"))
def _decode(graphdef, state, first_B, cache, key, *, num_tokens, options):
    def one(carry, i):
        token_B, cache = carry
        model = nnx.merge(graphdef, state, copy=True)
        logits_B1V, cache = model.decode(token_B[:, None], cache)
        token_B = _sample(logits_B1V, key, i, options)
        return (token_B, cache), token_B

    _, tokens = jax.lax.scan(one, (first_B, cache), 1 + jnp.arange(num_tokens, dtype=jnp.int32))
    return tokens.swapaxes(0, 1)


def _sample(logits_BTV, key, i, options):
    temperature, top_k, top_p = options
    key = jax.random.fold_in(key, i)
    return sample(logits_BTV[:, -1], key, temperature=temperature, top_k=top_k, top_p=top_p)


def check_prompt(prompt_BT: np.ndarray, max_new_tokens: int, config=None) -> None:
    """Raises `ValueError` where `prompt_BT` cannot be continued by `max_new_tokens` by a model with `config`."""
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, but got {max_new_tokens}.")
    if prompt_BT.size and not np.issubdtype(prompt_BT.dtype, np.integer):
        raise ValueError(f"A prompt is integers, the tokens, but got {prompt_BT.dtype}: encode the text first.")
    if prompt_BT.ndim != 2 or not prompt_BT.size:
        raise ValueError(
            f"A prompt needs at least one token, as (T,) or (B, T), but got the shape {prompt_BT.shape}. "
            "To start from nothing, give the token that separates documents (for bytes: 0)."
        )
    vocab_size = getattr(config, "vocab_size", None)
    low, high = prompt_BT.min(), prompt_BT.max()
    if low < 0 or (vocab_size is not None and high >= vocab_size):
        raise ValueError(
            f"The prompt holds the token {low if low < 0 else high}, but this model knows 0 to "
            f"{'...' if vocab_size is None else vocab_size - 1} (vocab_size={vocab_size})."
        )
    limit = getattr(config, "max_length", None) if getattr(config, "positions", None) == "learned" else None
    length = prompt_BT.shape[1] + max_new_tokens
    if limit is not None and length > limit:
        raise ValueError(
            f"The prompt ({prompt_BT.shape[1]} tokens) and {max_new_tokens} new ones are {length}, but this model's "
            f"learned positions end at max_length={limit}. Shorten the prompt, or ask for fewer tokens."
        )
