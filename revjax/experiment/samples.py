"""Text from a trained model."""

import dataclasses
from collections.abc import Iterator

import jax
import numpy as np
from flax import nnx

from ..data import Tokenizer
from ..errors import ConfigError
from ..generation import Sampling, stream
from .config import SampleConfig


def sample_text(model: nnx.Module, tokenizer: Tokenizer, config: SampleConfig) -> str:
    """The prompt and what `model` makes of it. Raises `ConfigError` for a bad prompt."""
    return config.prompt + "".join(stream_text(model, tokenizer, config))


def stream_text(model: nnx.Module, tokenizer: Tokenizer, config: SampleConfig) -> Iterator[str]:
    """Yields what `model` makes of the prompt, as it comes, up to the end of the document or one of `config.stop`.

    Raises `ConfigError` for a bad prompt. What may be the beginning of a stop text is held back until it is not.
    """
    prompt = tokenizer.encode(config.prompt)
    sampling = {f.name: getattr(config, f.name) for f in dataclasses.fields(Sampling)}
    pieces = stream(
        model,
        prompt if len(prompt) else np.array([tokenizer.separator]),
        max_new_tokens=config.max_new_tokens,
        key=jax.random.key(config.seed),
        **sampling,
    )
    decode = tokenizer.stream(prompt.tolist())
    held, longest = "", max((len(stop) for stop in config.stop), default=1) - 1
    try:
        for tokens in pieces:
            ends = np.flatnonzero(tokens == tokenizer.separator)
            is_over = len(ends) > 0
            held += decode((tokens[: ends[0]] if is_over else tokens).tolist(), is_over)
            found = [at for stop in config.stop if (at := held.find(stop)) >= 0]
            if found:
                yield held[: min(found)]
                return
            cut = len(held) if is_over else max(len(held) - longest, 0)
            yield held[:cut]
            held = held[cut:]
            if is_over:
                return
    except ValueError as e:
        raise ConfigError(str(e)) from None
    yield held + decode([], True)
