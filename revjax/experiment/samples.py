"""Text from a trained model."""

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Iterator, Sequence

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
    for (text,) in _stream_texts(model, tokenizer, [config.prompt], config):
        yield text


def sample_texts(
    model: nnx.Module, tokenizer: Tokenizer, prompts: Sequence[str], config: SampleConfig
) -> Iterator[tuple[str, str]]:
    """Yields each of `prompts` and what `model` makes of it, `config.batch_size` of them at once.

    The texts depend on `config.batch_size` and on the order of the prompts, unless the temperature is 0. Raises
    `ConfigError` for a bad prompt.
    """
    lengths = [len(_encoded(tokenizer, prompt)) for prompt in prompts]
    most = _room(model, max(lengths), config)
    size = min(config.batch_size, len(prompts))
    for i, start in enumerate(range(0, len(prompts), size)):
        batch, longest = prompts[start : start + size], max(lengths[start : start + size])
        full = [*batch, *[batch[-1]] * (size - len(batch))]  # of one size, or it would be compiled again
        pad_to = min(max(2 ** math.ceil(math.log2(longest)), 16), most)  # few lengths, for the same reason
        pieces = list(_stream_texts(model, tokenizer, full, config, draw=i, pad_to=pad_to))
        yield from zip(batch, map("".join, zip(*pieces)))


def _room(model: nnx.Module, longest: int, config: SampleConfig) -> float:
    """How many tokens a prompt may have; raises `ConfigError` where `longest` are too many."""
    shape = getattr(model, "config", None)
    limit = math.inf
    if shape is not None and shape.positions == "learned":
        limit = shape.max_length - config.max_new_tokens
    if longest > limit:
        raise ConfigError(
            f"The longest prompt has {longest} tokens, but with {config.max_new_tokens} new ones this model's learned "
            f"positions leave room for {limit}. Shorten it, or set a smaller --max_new_tokens."
        )
    return limit


def read_prompts(path: str | os.PathLike) -> list[str]:
    """The prompts of a .jsonl file, in the field `prompt` of each line, or of any other, whose lines they are.

    Raises `ConfigError` where there are none.
    """
    file = pathlib.Path(path).expanduser()
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(
            f"Cannot read {path} (--prompts): {getattr(e, 'strerror', None) or 'it is not UTF-8'}."
        ) from None
    lines = [(i, line) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise ConfigError(f"{path} (--prompts) has no prompts: write one a line.")
    return [_field(line, f"{path}:{i}") if file.suffix == ".jsonl" else line.rstrip("\r") for i, line in lines]


def _field(line: str, where: str) -> str:
    try:
        row = json.loads(line)
    except ValueError as e:
        raise ConfigError(f"{where} is not JSON: {e}.") from None
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
        raise ConfigError(f'{where} must be an object with the text of a prompt, {{"prompt": "..."}}: {line:.80}')
    return row["prompt"]


def _stream_texts(
    model: nnx.Module,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    config: SampleConfig,
    *,
    draw: int = 0,
    pad_to: int | None = None,
) -> Iterator[list[str]]:
    """Yields the next piece of what follows each prompt, until all have ended; `draw` has its own randomness."""
    encoded = [_encoded(tokenizer, prompt) for prompt in prompts]
    continuations = [_Continuation(tokenizer, prompt, config.stop) for prompt in encoded]
    key = jax.random.key(config.seed)
    pieces = stream(
        model,
        encoded,
        max_new_tokens=config.max_new_tokens,
        pad_to=pad_to,
        key=jax.random.fold_in(key, draw) if draw else key,
        **{f.name: getattr(config, f.name) for f in dataclasses.fields(Sampling)},
    )
    try:
        for tokens_BN in pieces:
            yield [continuation.text(tokens) for continuation, tokens in zip(continuations, tokens_BN)]
            if all(continuation.is_over for continuation in continuations):
                return
    except ValueError as e:
        raise ConfigError(str(e)) from None
    yield [continuation.rest() for continuation in continuations]


def _encoded(tokenizer: Tokenizer, prompt: str) -> np.ndarray:
    """With what begins a document; an empty prompt is the beginning of one."""
    tokens = np.concatenate([np.array(tokenizer.begin, np.int32), tokenizer.encode(prompt)])
    return tokens if len(tokens) else np.array([tokenizer.separator])


class _Continuation:
    """The text of tokens as they come, up to the end of the document or a stop text."""

    def __init__(self, tokenizer: Tokenizer, prompt: np.ndarray, stop: Sequence[str]):
        self.separator, self.stop = tokenizer.separator, stop
        self.decode = tokenizer.stream(prompt.tolist())
        self.longest = max((len(text) for text in stop), default=1) - 1  # of what may be the beginning of a stop text
        self.held, self.is_over = "", False

    def text(self, tokens: np.ndarray) -> str:
        """What is certain once these `tokens` are there."""
        if self.is_over:
            return ""
        ends = np.flatnonzero(tokens == self.separator)
        self.is_over = len(ends) > 0
        self.held += self.decode((tokens[: ends[0]] if self.is_over else tokens).tolist(), self.is_over)
        found = [at for stop in self.stop if (at := self.held.find(stop)) >= 0]
        self.is_over = self.is_over or bool(found)
        cut = min(found) if found else len(self.held) if self.is_over else max(len(self.held) - self.longest, 0)
        certain, self.held = self.held[:cut], self.held[cut:]
        return certain

    def rest(self) -> str:
        """What was held back, when no more tokens come."""
        return "" if self.is_over else self.held + self.decode([], True)
