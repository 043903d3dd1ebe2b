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
from ..conversion import TensorFiles
from ..data import CHAT_TEMPLATE, ChatTemplate, ChatTokenizer, DataConfig, ImagesConfig, Tokenizer, load_tokenizer
from ..errors import CheckpointError, ConfigError
from ..logging import get_logger
from ..models import Decoder, Model, ModelConfig, make_model, merge_adapters
from ..training import split, split_abstract, united
from ..training.folder import read_config
from .config import RunConfig

TOKENIZER = "tokenizer.json"  # in the folder of a run whose text is not in bytes
PARAMETERS = "model.safetensors"  # in the folder of a converted one, which has no checkpoint


@dataclasses.dataclass(frozen=True)
class TrainedRun:
    """A trained model, with its tokenizer where it reads text."""

    config: RunConfig
    data: DataConfig | ImagesConfig  # of the configuration, with the tokenizer that lies in the folder
    model: Model
    tokenizer: Tokenizer | None


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """A trained decoder with its tokenizer, which generates text."""

    config: RunConfig
    data: DataConfig
    model: Decoder
    tokenizer: Tokenizer


def load_language_model(folder: str | os.PathLike) -> LanguageModel:
    """As `load_run`; raises `ConfigError` where the run's model generates no text."""
    run = load_run(folder)
    if not isinstance(run.model, Decoder):
        raise ConfigError(
            f"The model of {folder} is of the family {run.config.model.family}, which generates no text here: that "
            "needs a decoder."
        )
    assert isinstance(run.data, DataConfig) and run.tokenizer is not None
    return LanguageModel(run.config, run.data, run.model, run.tokenizer)


def load_run(folder: str | os.PathLike) -> TrainedRun:
    """The model of the latest checkpoint of the run in `folder`, with the running mean of its parameters if it has one.

    Raises a `RevjaxError` where there is no run, no checkpoint, or no tokenizer.
    """
    config, data, params = _read(folder, merged=False)
    skeleton, _ = split_abstract(lambda: _model(config))
    model = typing.cast(Model, skeleton.merge(jax.tree.map(jax.numpy.asarray, params)))
    return TrainedRun(config, data, model, load_tokenizer(data) if isinstance(data, DataConfig) else None)


def chat_tokenizer(run: LanguageModel, folder: str | os.PathLike) -> ChatTokenizer:
    """The tokenizer of the run in `folder`, for prompts that are what a user says.

    Raises `ConfigError` where the run has no chat template: neither one that it learned from, nor one that came with
    pretrained parameters.
    """
    return ChatTokenizer(run.tokenizer, ChatTemplate(run.data.chat_template or os.fspath(folder)))


def parameters_of(folder: str | os.PathLike, like: dict[str, Any], tokenizer: Tokenizer | None) -> dict[str, Any]:
    """The parameters of the run in `folder`, for a model whose own are as `like` and which reads `tokenizer`'s tokens.

    Adapters are added to what they are beside. All are numpy's: on no device yet. Raises a `RevjaxError` where there
    are none, or they are not for such a model.
    """
    _, _, params = _read(folder)
    _check_parameters(folder, params, like, tokenizer)
    return jax.tree.map(lambda x, p: p.astype(x.dtype), like, params)


def check_start(folder: str | os.PathLike, model: ModelConfig, tokenizer: Tokenizer | None) -> None:
    """Raises what `parameters_of` would raise for a run with this model, as far as shapes and names tell."""
    path = pathlib.Path(folder).expanduser()
    config = read_config(path, RunConfig)
    if not has_checkpoints(path) and not (path / PARAMETERS).is_file():
        raise CheckpointError(f"The run in {folder} (training.start_from) has no checkpoint: was it ever trained?")
    make = lambda model: make_model(_without_adapters(model), plan="all", rngs=nnx.Rngs(0))
    base = lambda model: split(nnx.eval_shape(lambda: make(model)))[1]
    _check_parameters(folder, base(config.model), base(model), tokenizer)


def _check_parameters(
    folder: str | os.PathLike, params: dict[str, Any], like: dict[str, Any], tokenizer: Tokenizer | None
) -> None:
    path = pathlib.Path(folder).expanduser()
    data = _data(path, read_config(path, RunConfig))
    reads_text = isinstance(data, DataConfig)
    if reads_text and tokenizer is not None and load_tokenizer(data).fingerprint != tokenizer.fingerprint:
        raise ConfigError(
            f"The run in {folder} (training.start_from) reads other tokens. Set --data.tokenizer={data.tokenizer}"
        )
    ours, theirs = _shapes(like), _shapes(params)
    for name in sorted(ours.keys() | theirs.keys()):
        if ours.get(name) != theirs.get(name):
            raise ConfigError(
                f"The model of {folder} (training.start_from) has another shape: {name} is "
                f"{theirs.get(name, 'not there')}, and here {ours.get(name, 'not there')}. Take the model section of "
                f"{folder}/config.yaml."
            )


def has_checkpoints(folder: pathlib.Path) -> bool:
    """Whether the run in `folder` was trained, so that its parameters are those of a checkpoint."""
    return any(path.name.isdecimal() for path in (folder / "checkpoints").glob("*"))


def read_parameters(folder: str | os.PathLike) -> dict[str, Any]:
    """The parameters of the run in `folder`, adapters added, nested."""
    return _read(folder)[2]


def read_file(path: pathlib.Path, config: ModelConfig) -> dict[str, Any]:
    """The parameters of a model of `config` in a file that `export` or `from_hf` wrote, nested."""
    return _of_file(path, split(nnx.eval_shape(lambda: make_model(config, plan="all", rngs=nnx.Rngs(0))))[1])


def _model(config: RunConfig) -> Model:
    return make_model(config.model, plan=config.memory.plan, rngs=nnx.Rngs(0))


def _read(
    folder: str | os.PathLike, *, merged: bool = True
) -> tuple[RunConfig, DataConfig | ImagesConfig, dict[str, Any]]:
    """The configuration of a run, its data section with tokenizer and template of its folder, and its parameters.

    These are numpy's; with `merged`, of the model without adapters, and so is its configuration.
    """
    folder = pathlib.Path(folder).expanduser()
    config = read_config(folder, RunConfig)
    _, shapes = split(nnx.eval_shape(lambda: _model(config)))
    is_converted = (folder / PARAMETERS).is_file() and not has_checkpoints(folder)
    trained = _of_file(folder / PARAMETERS, shapes) if is_converted else _of_checkpoint(folder)
    if _shapes(shapes) != _shapes(trained):
        raise CheckpointError(f"The checkpoint in {folder} does not fit its config.yaml: was one of them changed?")
    if not all(np.isfinite(x.astype(np.float32)).all() for x in jax.tree.leaves(trained)):
        get_logger(__name__).warning("The parameters of %s are not all finite: its training diverged.", folder)
    params = jax.tree.map(lambda shape, x: x.astype(shape.dtype), shapes, trained)
    if merged and config.model.lora is not None:
        params = merge_adapters(params, config.model.lora)
        config = dataclasses.replace(config, model=_without_adapters(config.model))
    return config, _data(folder, config), params


def _without_adapters(model: ModelConfig) -> ModelConfig:
    return dataclasses.replace(model, lora=None)


def _data(folder: pathlib.Path, config: RunConfig) -> DataConfig | ImagesConfig:
    """The data section of the run in `folder`, with the tokenizer and the template that lie there."""
    data = config.data
    if isinstance(data, ImagesConfig):
        return data
    if (folder / TOKENIZER).exists():
        data = dataclasses.replace(data, tokenizer=str(folder / TOKENIZER))
    if (folder / CHAT_TEMPLATE).exists():
        data = dataclasses.replace(data, chat_template=str(folder / CHAT_TEMPLATE))
    return data


def _of_checkpoint(folder: pathlib.Path) -> dict[str, Any]:
    with Checkpointer(folder / "checkpoints") as checkpointer:
        nested, meta, damaged = checkpointer.restore_latest()
    for step, error in damaged.items():
        message = "The checkpoint of step %d in %s is damaged (%s): that of step %d is used here."
        get_logger(__name__).warning(message, step, folder, error.why, meta["step"])
    return united(nested.get("ema", nested["params"]), nested.get("frozen", {}))


def _of_file(path: pathlib.Path, shapes: dict[str, Any]) -> dict[str, Any]:
    tensors, names = TensorFiles(path), list(named(shapes))
    if set(names) != set(tensors):
        raise CheckpointError(f"{path} does not fit its config.yaml: was one of them changed?")
    return jax.tree.unflatten(jax.tree.structure(shapes), [tensors.read(name) for name in names])


def named(params: dict[str, Any]) -> dict[str, Any]:
    """Nested parameters by name: stack.runs.0.0.attention.query.kernel."""
    return {".".join(str(getattr(k, "key", k)) for k in path): x for path, x in jax.tree.flatten_with_path(params)[0]}


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
    config, _, params = _read(folder)
    tensors = named(params)
    temporary = output.with_name(f"{output.name}.tmp")
    try:
        save_file(tensors, temporary, metadata={"config": json.dumps(dataclasses.asdict(config))})
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # as any other file of the run
        os.replace(temporary, output)
    except (OSError, SafetensorError) as e:  # a full disk comes as either
        temporary.unlink(missing_ok=True)
        raise CheckpointError(f"Cannot write {output}: {e}. Set --output to another place.") from None
    return sum(x.size for x in tensors.values())
