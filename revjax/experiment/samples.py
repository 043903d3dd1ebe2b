"""Text from a trained model."""

import codecs
import dataclasses
import os
import pathlib
import typing
from collections.abc import Iterator

import jax
import numpy as np
from flax import nnx

from ..checkpoint import Checkpointer
from ..data import END_OF_FILE, ByteTokenizer
from ..errors import CheckpointError, ConfigError
from ..generation import Sampling, stream
from ..logging import get_logger
from ..models import Decoder
from ..training import split
from ..training.folder import read_config
from .config import RunConfig, SampleConfig


def sample_text(model: nnx.Module, config: SampleConfig) -> str:
    """The prompt and what `model` makes of it. Raises `ConfigError` for a bad prompt."""
    return config.prompt + "".join(stream_text(model, config))


def stream_text(model: nnx.Module, config: SampleConfig) -> Iterator[str]:
    """Yields what `model` makes of the prompt, as it comes, up to the end of a file or one of `config.stop`.

    Raises `ConfigError` for a bad prompt. What may be the beginning of a stop text is held back until it is not.
    """
    prompt = ByteTokenizer().encode(config.prompt)
    sampling = {f.name: getattr(config, f.name) for f in dataclasses.fields(Sampling)}
    pieces = stream(
        model,
        prompt if len(prompt) else np.array([END_OF_FILE], np.uint8),
        max_new_tokens=config.max_new_tokens,
        key=jax.random.key(config.seed),
        **sampling,
    )
    decode = codecs.getincrementaldecoder("utf-8")(errors="replace").decode  # a character may come in two pieces
    held, longest = "", max((len(stop) for stop in config.stop), default=1) - 1
    try:
        for tokens in pieces:
            ends = np.flatnonzero((tokens == END_OF_FILE) | (tokens > 255))
            is_over = len(ends) > 0
            held += decode((tokens[: ends[0]] if is_over else tokens).astype(np.uint8).tobytes(), is_over)
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
    yield held + decode(b"", True)


def load_model(folder: str | os.PathLike) -> Decoder:
    """The model of the latest checkpoint of the run in `folder`, with the running mean of its parameters if it has one.

    Raises `RunFolderError` or `CheckpointError` where there is none.
    """
    folder = pathlib.Path(folder).expanduser()
    config = read_config(folder, RunConfig)
    abstract = nnx.eval_shape(lambda: Decoder(config.model, plan=config.memory.plan, rngs=nnx.Rngs(0)))
    with Checkpointer(folder / "checkpoints") as checkpointer:
        nested, _, damaged = checkpointer.restore_latest()
    for error in damaged.values():
        get_logger(__name__).warning("%s An older one is used here.", error)
    _, params = split(abstract)
    trained = nested.get("ema", nested["params"])
    described = lambda tree: {jax.tree_util.keystr(path): x.shape for path, x in jax.tree.flatten_with_path(tree)[0]}
    if described(params) != described(trained):
        raise CheckpointError(f"The checkpoint in {folder} does not fit its config.yaml: was one of them changed?")
    skeleton, _ = split(Decoder(config.model, plan=config.memory.plan, rngs=nnx.Rngs(0)))
    cast = lambda like, x: jax.numpy.asarray(x, like.dtype)
    return typing.cast(Decoder, skeleton.merge(jax.tree.map(cast, params, trained)))
