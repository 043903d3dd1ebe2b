"""What a run left, to be used."""

import dataclasses
import json
import os
import pathlib
import typing
from typing import Any

import jax
import numpy as np
from flax import nnx
from safetensors import SafetensorError
from safetensors.numpy import save_file

from ..checkpoint import Checkpointer
from ..data import DataConfig, Tokenizer, load_tokenizer
from ..errors import CheckpointError, ConfigError
from ..logging import get_logger
from ..models import Decoder
from ..training import split, split_abstract
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


def parameters_of(folder: str | os.PathLike, like: dict[str, Any], tokenizer: Tokenizer) -> dict[str, Any]:
    """The parameters of the run in `folder`, for a model whose own are as `like` and which reads `tokenizer`'s tokens.

    Raises a `RevjaxError` where there are none, or they are not for such a model.
    """
    run = load_run(folder)
    if run.tokenizer.fingerprint != tokenizer.fingerprint:
        raise ConfigError(
            f"The run in {folder} (training.start_from) reads other tokens. Set --data.tokenizer={run.data.tokenizer}"
        )
    _, params = split(run.model)
    ours, theirs = _shapes(like), _shapes(params)
    for name in sorted(ours.keys() | theirs.keys()):
        if ours.get(name) != theirs.get(name):
            raise ConfigError(
                f"The model of {folder} (training.start_from) has another shape: {name} is "
                f"{theirs.get(name, 'not there')}, and here {ours.get(name, 'not there')}. Take the model section of "
                f"{folder}/config.yaml."
            )
    return jax.tree.map(lambda x, p: p.astype(x.dtype), like, params)


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    return {jax.tree_util.keystr(path): x.shape for path, x in jax.tree.flatten_with_path(tree)[0]}


def export(folder: str | os.PathLike, output: str | os.PathLike) -> int:
    """Writes the parameters of the run in `folder` as safetensors; returns how many numbers these are.

    Tensors have the names of the checkpoint, joined by dots: stack.runs.0.0.attention.query.kernel, whose first axis
    counts layers. The file's metadata has the configuration, as JSON. Raises a `RevjaxError` where there is nothing to
    export, and where `output` is there already or cannot be written.
    """
    output = pathlib.Path(output).expanduser()
    if output.exists():
        raise CheckpointError(f"{output} is there already. Delete it, or set --output to another place.")
    run = load_run(folder)
    _, params = split(run.model)
    tensors = {
        ".".join(str(getattr(k, "key", k)) for k in path): np.asarray(x)
        for path, x in jax.tree.flatten_with_path(params)[0]
    }
    temporary = output.with_name(f"{output.name}.tmp")
    try:
        save_file(tensors, temporary, metadata={"config": json.dumps(dataclasses.asdict(run.config))})
        os.replace(temporary, output)
    except (OSError, SafetensorError) as e:  # a full disk comes as either
        temporary.unlink(missing_ok=True)
        raise CheckpointError(f"Cannot write {output}: {e}. Set --output to another place.") from None
    return sum(x.size for x in tensors.values())


def _load_model(folder: pathlib.Path, config: RunConfig) -> Decoder:
    with Checkpointer(folder / "checkpoints") as checkpointer:
        nested, _, damaged = checkpointer.restore_latest()
    for error in damaged.values():
        get_logger(__name__).warning("%s An older one is used here.", error)
    skeleton, params = split_abstract(lambda: Decoder(config.model, plan=config.memory.plan, rngs=nnx.Rngs(0)))
    trained = nested.get("ema", nested["params"])
    if _shapes(params) != _shapes(trained):
        raise CheckpointError(f"The checkpoint in {folder} does not fit its config.yaml: was one of them changed?")
    cast = lambda like, x: jax.numpy.asarray(x, like.dtype)
    return typing.cast(Decoder, skeleton.merge(jax.tree.map(cast, params, trained)))
