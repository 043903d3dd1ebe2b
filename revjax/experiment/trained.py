"""What a run left, to be used."""

import dataclasses
import os
import pathlib
import typing

import jax
from flax import nnx

from ..checkpoint import Checkpointer
from ..data import DataConfig, Tokenizer, load_tokenizer
from ..errors import CheckpointError
from ..logging import get_logger
from ..models import Decoder
from ..training import split
from ..training.folder import read_config
from .config import RunConfig

TOKENIZER = "tokenizer.json"  # in the folder of a run whose text is not in bytes


@dataclasses.dataclass(frozen=True)
class TrainedRun:
    """A trained model with its tokenizer."""

    config: RunConfig
    data: DataConfig  # of the configuration, with the tokenizer that lies in the folder
    model: Decoder
    tokenizer: Tokenizer


def load_run(folder: str | os.PathLike) -> TrainedRun:
    """The model of the latest checkpoint of the run in `folder`, with the running mean of its parameters if it has one.

    Raises a `RevjaxError` where there is no run, no checkpoint, or no tokenizer.
    """
    folder = pathlib.Path(folder).expanduser()
    config = read_config(folder, RunConfig)
    model = _load_model(folder, config)
    data = config.data
    if (folder / TOKENIZER).exists():
        data = dataclasses.replace(data, tokenizer=str(folder / TOKENIZER))
    return TrainedRun(config, data, model, load_tokenizer(data))


def _load_model(folder: pathlib.Path, config: RunConfig) -> Decoder:
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
