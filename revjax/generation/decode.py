"""Prompt -> continuation, with a KV cache.

    prefill    logits, cache = model.decode(prompt_BT, cache)         once
    decode     logits, cache = model.decode(token_B1, cache)          in a scan: shapes never change

Both are jitted by the structure of the model and by these shapes: another prompt of the same length, other
parameters and another key compile nothing. Prompts of unequal lengths get padding before them, which nothing sees.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from .sampling import Sampling, sample


def generate(
    model: nnx.Module,
    prompt_tokens: np.ndarray | jax.Array | Sequence[np.ndarray],
    *,
    max_new_tokens: int,
    key: jax.Array | None = None,
    **sampling: Any,
) -> np.ndarray:
    """Returns `max_new_tokens` tokens that follow each prompt, int32: (T,) -> (new,), or (B, T) -> (B, new).

    Args:
      model: has `init_cache(batch, max_length)`, which for rows of unequal lengths takes `padding_B` too, and
        `decode(tokens_BT, cache)`, as `Decoder` does.
      prompt_tokens: integers in [0, vocab_size), at least one for each row; or a list of rows of unequal lengths.
      key: for the draws; None is `jax.random.key(0)`.
      sampling: fields of `Sampling`; temperature 0 is greedy and needs no key.

    Raises `ValueError` for a prompt that is empty, too long, or holds a token that the model does not know.

    >>> generate(model, tokenizer.encode("def "), max_new_tokens=100, temperature=0.7)
    """
    pieces = stream(model, prompt_tokens, max_new_tokens=max_new_tokens, every=max_new_tokens, key=key, **sampling)
    return np.concatenate(list(pieces), axis=-1)


def stream(
    model: nnx.Module,
    prompt_tokens: np.ndarray | jax.Array | Sequence[np.ndarray],
    *,
    max_new_tokens: int,
    every: int = 16,
    pad_to: int | None = None,
    key: jax.Array | None = None,
    **sampling: Any,
) -> Iterator[np.ndarray]:
    """Yields what `generate` returns in pieces: the first token, then up to `every` tokens at a time.

    With `pad_to` shorter prompts get padding up to so many tokens: batches of one such length compile once.
    """
    how = Sampling(**sampling)
    rows, padding, one_row = _rows(prompt_tokens, pad_to)
    check_prompt(rows, max_new_tokens, getattr(model, "config", None))
    graphdef, state = nnx.split(model)
    key = jax.random.key(0) if key is None else key
    start = functools.partial(_prefill, graphdef, state, length=rows.shape[1] + max_new_tokens, how=how)
    token_B, carry = start(jnp.asarray(rows, jnp.int32), padding, key)
    yield np.asarray(token_B)[0:1] if one_row else np.asarray(token_B)[:, None]
    for done in range(1, max_new_tokens, every):
        num_tokens = min(every, max_new_tokens - done)
        token_B, carry, tokens = _decode(graphdef, state, token_B, carry, key, done, num_tokens=num_tokens, how=how)
        yield np.asarray(tokens)[0] if one_row else np.asarray(tokens)


def _rows(prompt_tokens, pad_to: int | None) -> tuple[np.ndarray, np.ndarray | None, bool]:
    """(rows of one length, padding before each or None, whether there was one prompt and no list of them)."""
    is_list = isinstance(prompt_tokens, Sequence)
    if pad_to is not None or (is_list and len({np.size(row) for row in prompt_tokens}) > 1):
        rows = [np.asarray(row) for row in prompt_tokens]
        if any(row.ndim != 1 for row in rows):
            raise ValueError(f"Each prompt of a list is (T,), but got the shapes {[row.shape for row in rows]}.")
        check_prompt(min(rows, key=len)[None], 1)
        length = max(*map(len, rows), pad_to or 0)
        padding = np.array([length - len(row) for row in rows], np.int32)
        return np.stack([np.pad(row, (n, 0)) for row, n in zip(rows, padding)]), padding, False
    prompt = np.asarray(prompt_tokens)
    return (prompt[None], None, True) if prompt.ndim == 1 else (prompt, None, False)


@functools.partial(jax.jit, static_argnames=("graphdef", "length", "how"))
def _prefill(graphdef, state, prompt_BT, padding_B, key, *, length, how):
    model, (batch, prompt_length) = nnx.merge(graphdef, state, copy=True), prompt_BT.shape
    padding = {} if padding_B is None else {"padding_B": padding_B}
    logits_BTV, cache = model.decode(prompt_BT, model.init_cache(batch, length, **padding))
    seen_BV = None
    if how.repetition_penalty != 1:
        padding_B = jnp.zeros(batch, jnp.int32) if padding_B is None else padding_B
        is_text_BT = jnp.arange(prompt_length)[None] >= padding_B[:, None]
        empty_BV = jnp.zeros((batch, logits_BTV.shape[-1]), bool)
        seen_BV = jax.vmap(lambda seen_V, tokens_T, x_T: seen_V.at[tokens_T].max(x_T))(empty_BV, prompt_BT, is_text_BT)
    return _draw(logits_BTV, (cache, seen_BV), key, 0, how)


@functools.partial(jax.jit, static_argnames=("graphdef", "num_tokens", "how"))
def _decode(graphdef, state, token_B, carry, key, start, *, num_tokens, how):
    def one(carry, i):
        token_B, (cache, seen_BV) = carry
        model = nnx.merge(graphdef, state, copy=True)
        logits_B1V, cache = model.decode(token_B[:, None], cache)
        token_B, carry = _draw(logits_B1V, (cache, seen_BV), key, i, how)
        return (token_B, carry), token_B

    steps = start + jnp.arange(num_tokens, dtype=jnp.int32)
    (token_B, carry), tokens = jax.lax.scan(one, (token_B, carry), steps)
    return token_B, carry, tokens.swapaxes(0, 1)


def _draw(logits_BTV, carry, key, i, how):
    """The token that follows, and (cache, which tokens were there) with it."""
    cache, seen_BV = carry
    token_B = sample(logits_BTV[:, -1], jax.random.fold_in(key, i), how, seen_BV=seen_BV)
    if seen_BV is not None:
        seen_BV = jax.vmap(lambda seen_V, token: seen_V.at[token].set(True))(seen_BV, token_B)
    return token_B, (cache, seen_BV)


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
