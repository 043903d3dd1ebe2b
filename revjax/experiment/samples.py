"""Text from a trained model."""

import os
import pathlib

import jax
import numpy as np
from flax import nnx

from ..checkpoint import Checkpointer
from ..data import END_OF_FILE, ByteTokenizer
from ..errors import CheckpointError, ConfigError
from ..generation import generate
from ..logging import get_logger
from ..models import Decoder
from ..training import split
from ..training.folder import read_config
from .config import RunConfig, SampleConfig


def sample_text(model: nnx.Module, config: SampleConfig) -> str:
    """The prompt and what `model` makes of it, up to the end of a file. Raises `ConfigError` for a bad prompt.

    An empty prompt is the beginning of a file.
    """
    tokenizer = ByteTokenizer()
    prompt = tokenizer.encode(config.prompt)
    given = prompt if len(prompt) else np.array([END_OF_FILE], np.uint8)
    try:
        new_tokens = generate(
            model,
            given,
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            key=jax.random.key(config.seed),
        )
    except ValueError as e:
        raise ConfigError(str(e)) from None
    ends = np.flatnonzero((new_tokens == END_OF_FILE) | (new_tokens > 255))
    new_tokens = new_tokens[: ends[0]] if len(ends) else new_tokens
    return tokenizer.decode(np.concatenate([prompt, new_tokens]))


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
    return skeleton.merge(jax.tree.map(cast, params, trained))  # type: ignore[return-value]
