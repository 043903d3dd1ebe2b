"""Pretrained checkpoints of transformers as runs, and runs as such checkpoints.

from_hf    a folder that train.py (training.start_from), generate.py and evaluate.py take as they take a run's
to_hf      the stock architecture, as other tools load it
"""

import dataclasses
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

from ..config import dump
from ..conversion import (
    CONFIG,
    Pretrained,
    TensorFiles,
    copy_parameters,
    open_pretrained,
    read_config_json,
    stock_config,
    write_pretrained,
)
from ..core import parse_coupling
from ..data import DataConfig, load_tokenizer
from ..errors import CheckpointError, ConfigError, DataError
from ..models import DecoderConfig
from ..training import read_config
from .config import FolderConfig, MemoryConfig, RunConfig
from .trained import PARAMETERS, TOKENIZER, has_checkpoints, read_parameters
from .versions import versions

PRETRAINED = "huggingface"  # what came with the parameters and goes out with them again: configs, tokenizer
_KEPT = (
    *(CONFIG, "generation_config.json", TOKENIZER, "tokenizer_config.json", "special_tokens_map.json"),
    *("chat_template.jinja", "chat_template.json", "added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FromHFConfig:
    """How a pretrained model becomes a reversible one."""

    output: str  # the folder to make
    # near-residual:M comes the nearer to the pretrained network the larger M is, and keeps M bits an element and f;
    # bdia:M is that network when it is evaluated; residual is that network, and keeps whole layers; revnet is another
    coupling: str = "near-residual:4"
    granularity: Literal["branch", "block"] = "branch"  # what one f is
    exact: bool = True  # integer streams
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"  # of the computation
    param_dtype: Literal["float32", "bfloat16"] = "float32"  # of the parameters


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToHFConfig:
    """What a checkpoint of transformers is written as."""

    output: str  # the folder to make
    dtype: Literal["float32", "bfloat16", "float16"] | None = None  # null is that of the pretrained model, or float32


def from_hf(source: str | os.PathLike, config: FromHFConfig) -> RunConfig:
    """Makes `config.output` a run that stands before its first step, with the parameters in `source`; returns it.

    Raises a `RevjaxError` where that cannot be, and leaves nothing behind then.
    """
    found = open_pretrained(pathlib.Path(source))
    output = pathlib.Path(config.output).expanduser()
    model = _reversible(found, config)
    tokenizer = _check_tokenizer(found.folder, model)
    run = RunConfig(
        run=FolderConfig(name=output.name, folder=str(output.parent)),
        model=model,
        data=DataConfig(
            tokenizer=str(output / TOKENIZER),
            separator=tokenizer,
            sequence_length=min(found.config.max_length, 1024),
        ),
        memory=MemoryConfig(plan="nothing" if parse_coupling(model.coupling).reversible else "inputs"),
    )
    with _new_folder(output) as folder:
        metadata = {"config": json.dumps(dataclasses.asdict(run))}
        copy_parameters(found, model, folder / PARAMETERS, metadata)
        (folder / PRETRAINED).mkdir()
        for name in _KEPT:
            if (found.folder / name).is_file():
                shutil.copyfile(found.folder / name, folder / PRETRAINED / name)
        shutil.copyfile(found.folder / TOKENIZER, folder / TOKENIZER)
        header = f"# {versions()}, from {found.family.architecture} in {found.folder}\n"
        (folder / "config.yaml").write_text(header + dump(run), encoding="utf-8")
    return run


def describe_from_hf(source: str | os.PathLike, run: RunConfig) -> str:
    """What `from_hf` made, and what can be done with it, in a few lines."""
    model, folder = run.model, run.run.path
    lines = {
        "model": f"{model.num_layers} layers, d_model {model.d_model}, {model.num_heads} heads, vocabulary "
        f"{model.vocab_size:,}, from {source}",
        "coupling": f"{model.coupling}, {model.granularity} by {model.granularity}, "
        f"{'exact' if model.exact else 'float'} streams, {model.dtype}",
        "written": f"{folder}/: config.yaml, {PARAMETERS}, {TOKENIZER}, {PRETRAINED}/",
        "on": f"python scripts/generate.py {folder} --prompt='...'",
        "": f"python scripts/train.py {folder}/config.yaml --run.name={run.run.name}-tuned "
        f"--training.start_from={folder} --data.source=TEXT",
    }
    return "\n".join(f"{name:<12} {text}" for name, text in lines.items())


def to_hf(source: str | os.PathLike, config: ToHFConfig) -> str:
    """Writes the parameters of the run in `source` as a checkpoint of transformers; returns its class.

    It is the ordinary network (b = 0) with these parameters. Raises a `RevjaxError` where there is none, and leaves
    nothing behind then.
    """
    source = pathlib.Path(source).expanduser()
    run = read_config(source, RunConfig)
    like = read_config_json(source / PRETRAINED) if (source / PRETRAINED / CONFIG).is_file() else None
    stock_config(run.model, like)  # before any work
    output = pathlib.Path(config.output).expanduser()
    dtype = config.dtype or (like or {}).get("dtype") or (like or {}).get("torch_dtype") or "float32"
    if has_checkpoints(source):
        trained = read_parameters(source)
        read: Any = lambda name, index: trained[name] if index is None else trained[name][index]
    else:
        read = _parameters_file(source).read
    with _new_folder(output) as folder:
        family = write_pretrained(run.model, read, folder, like=like, dtype=dtype)
        for name in _KEPT:
            if name != CONFIG and (source / PRETRAINED / name).is_file():
                shutil.copyfile(source / PRETRAINED / name, folder / name)
        if (source / TOKENIZER).is_file() and not (folder / TOKENIZER).exists():
            shutil.copyfile(source / TOKENIZER, folder / TOKENIZER)
    return family.architecture


def keep_pretrained(source: str | os.PathLike, folder: pathlib.Path) -> None:
    """Copies what came with the pretrained parameters of the run `source`, if any did, into another run's folder."""
    there, new = pathlib.Path(source).expanduser() / PRETRAINED, folder / PRETRAINED
    if there.is_dir() and not new.exists():
        temporary = folder / f"{PRETRAINED}.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.copytree(there, temporary)
        temporary.rename(new)


def _reversible(found: Pretrained, config: FromHFConfig) -> DecoderConfig:
    try:
        model = dataclasses.replace(
            found.config,
            coupling=config.coupling,
            granularity=config.granularity,
            exact=config.exact,
            dtype=config.dtype,
            param_dtype=config.param_dtype,
        )
        # The pretrained head reads the last stream.
        order = parse_coupling(model.coupling).for_step(None).order
        return dataclasses.replace(model, readout="last") if order > 1 else model
    except ConfigError:
        raise
    except ValueError as e:
        raise ConfigError(str(e)) from None


def _check_tokenizer(folder: pathlib.Path, model: DecoderConfig) -> str | None:
    """Returns the token between documents, where it is not one of the usual ones."""
    if not (folder / TOKENIZER).is_file():
        raise DataError(
            f"{folder} has no {TOKENIZER}. With transformers: AutoTokenizer.from_pretrained(FOLDER)"
            ".save_pretrained(FOLDER)"
        )
    separator = None
    try:
        tokenizer = load_tokenizer(DataConfig(tokenizer=str(folder / TOKENIZER)))
    except DataError as e:
        separator = _end_of_text(folder)
        if "data.separator" not in str(e) or separator is None:
            raise
        tokenizer = load_tokenizer(DataConfig(tokenizer=str(folder / TOKENIZER), separator=separator))
    if tokenizer.vocab_size > model.vocab_size:
        raise DataError(
            f"The tokenizer in {folder} has {tokenizer.vocab_size} tokens, but the model knows {model.vocab_size}: "
            "they are not of one model."
        )
    return separator


def _end_of_text(folder: pathlib.Path) -> str | None:
    """The token that tokenizer_config.json says ends a text."""
    try:
        token = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8")).get("eos_token")
    except (OSError, ValueError, AttributeError):
        return None
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None


def _parameters_file(folder: pathlib.Path) -> TensorFiles:
    if not (folder / PARAMETERS).is_file():
        raise CheckpointError(f"{folder} has no checkpoint, and no {PARAMETERS}.")
    return TensorFiles(folder / PARAMETERS)


@contextmanager
def _new_folder(output: pathlib.Path) -> Iterator[pathlib.Path]:
    """A folder that becomes `output` at the end, or is gone."""
    if output.exists():
        raise CheckpointError(f"{output} is there already. Delete it, or choose another --output.")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        folder = pathlib.Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    except OSError as e:
        raise CheckpointError(
            f"Cannot write to {output.parent}: {e.strerror}. Set --output to another place."
        ) from None
    try:
        yield folder
        umask = os.umask(0)
        os.umask(umask)
        folder.chmod(0o777 & ~umask)
        os.rename(folder, output)
    except OSError as e:
        raise CheckpointError(f"Cannot write {output}: {e.strerror}. Choose another --output.") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)
