"""Pretrained checkpoints of transformers as runs, and runs as such checkpoints.

from_hf    a folder that train.py (training.start_from), generate.py and evaluate.py take as they take a run's
to_hf      the stock architecture, as other tools load it
"""

import dataclasses
import json
import math
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
from ..data import (
    BYTE_0,
    BYTES,
    SEPARATORS,
    DataConfig,
    FileTokenizer,
    ImagesConfig,
    Tokenizer,
    byte_tokenizer_json,
    load_tokenizer,
    special_token,
)
from ..errors import CheckpointError, ConfigError, DataError
from ..logging import get_logger
from ..models import DecoderConfig, EncoderConfig, ModelConfig, VisionConfig
from ..training import OptimizerConfig, read_config
from .config import FolderConfig, MemoryConfig, RunConfig
from .fidelity import (
    Departure,
    Fidelity,
    departure,
    describe_fidelity,
    fitting_fraction_bits,
    measure,
)
from .fidelity_plot import plot_fidelity
from .probing import probe, source_logits
from .trained import PARAMETERS, TOKENIZER, has_checkpoints, named, read_file, read_parameters
from .versions import versions

TOKENIZER_CONFIG = "tokenizer_config.json"
PRETRAINED = "huggingface"  # what came with the parameters and goes out with them again: configs, tokenizer
IMAGES = "preprocessor_config.json"  # how images are scaled
_KEPT = (
    *(CONFIG, "generation_config.json", TOKENIZER, TOKENIZER_CONFIG, "special_tokens_map.json"),
    *("vocab.txt", "spiece.model", IMAGES),
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
    measure: bool = True  # how far it is from the pretrained one; needs memory for the whole model
    # What must not be exceeded; otherwise nothing is written.
    max_source_error: float = 1e-4  # of a logit beside transformers, packed or padded, as a part of the largest logit
    max_kl: float = 0.05  # of the reversible network from the ordinary one, nats a token; of revnet it is not asked
    max_gradient_error: float = 1e-5  # beside the stored run, relative


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToHFConfig:
    """What a checkpoint of transformers is written as."""

    output: str  # the folder to make
    dtype: Literal["float32", "bfloat16", "float16"] | None = None  # null is that of the pretrained model, or float32
    measure: bool = True  # what becoming the ordinary network changes; needs memory for the whole model


def from_hf(source: str | os.PathLike, config: FromHFConfig) -> tuple[RunConfig, Fidelity | None]:
    """Makes `config.output` a run that stands before its first step, with the parameters in `source`.

    Returns it, and how far it is from the pretrained model (None if that is not measured). Raises a `RevjaxError` where
    it cannot be made or is too far, and leaves nothing behind then.
    """
    found = open_pretrained(pathlib.Path(source))
    output = pathlib.Path(config.output).expanduser()
    model = _reversible(found, config)
    run = RunConfig(
        run=FolderConfig(name=output.name, folder=str(output.parent)),
        model=model,
        data=_data(found.folder, model, output),
        optimizer=OptimizerConfig(learning_rate=1e-4, warmup_steps=20),  # a tenth of the default: it is trained already
        memory=MemoryConfig(plan="nothing" if parse_coupling(model.coupling).reversible else "inputs"),
    )
    with _new_folder(output) as folder:
        metadata = {"config": json.dumps(dataclasses.asdict(run))}
        copy_parameters(found, model, folder / PARAMETERS, metadata)
        fidelity = None
        if config.measure:
            fidelity, model = _measured(found, model, folder)
            run = dataclasses.replace(run, model=model)
            _check_fidelity(fidelity, config)
            (folder / "fidelity.json").write_text(json.dumps(dataclasses.asdict(fidelity), indent=2) + "\n")
            title = f"{found.folder.name}: {model.coupling}, {model.granularity} by {model.granularity}"
            plot_fidelity(fidelity, folder / "fidelity.png", title=title)
        (folder / PRETRAINED).mkdir()
        for name in _KEPT:
            if (found.folder / name).is_file():
                shutil.copyfile(found.folder / name, folder / PRETRAINED / name)
        if not isinstance(model, VisionConfig):
            shutil.copyfile(found.folder / TOKENIZER, folder / TOKENIZER)
        header = f"# {versions()}, from {found.family.architecture} in {found.folder}\n"
        (folder / "config.yaml").write_text(header + dump(run), encoding="utf-8")
    return run, fidelity


def describe_from_hf(source: str | os.PathLike, run: RunConfig, fidelity: Fidelity | None) -> str:
    """What `from_hf` made, how far it is from the source, and what can be done with it."""
    model, folder = run.model, run.run.path
    measured = "" if fidelity is None else ", fidelity.json, fidelity.png"
    knows = f"{model.num_classes:,} classes" if isinstance(model, VisionConfig) else f"vocabulary {model.vocab_size:,}"
    tokenizer = "" if isinstance(model, VisionConfig) else f", {TOKENIZER}"
    generates, data = isinstance(model, DecoderConfig), "IMAGES" if isinstance(model, VisionConfig) else "TEXT"
    lines = {
        "model": f"{model.num_layers} layers, d_model {model.d_model}, {model.num_heads} heads, {knows}, from {source}",
        "coupling": f"{model.coupling}, {model.granularity} by {model.granularity}, "
        f"{'exact' if model.exact else 'float'} streams of {model.fraction_bits} fraction bits, {model.dtype}",
        "report": "" if fidelity is None else describe_fidelity(fidelity),
        "written": f"{folder}/: config.yaml, {PARAMETERS}{tokenizer}, {PRETRAINED}/{measured}",
        "on": f"python scripts/generate.py {folder} --prompt='...'" if generates else "",
        "" if generates else "on": f"python scripts/train.py {folder}/config.yaml --run.name={run.run.name}-tuned "
        f"--training.start_from={folder} --training.epochs=1 --data.source={data}",
    }
    return "\n".join(text if name == "report" else f"{name:<12} {text}" for name, text in lines.items() if text)


def to_hf(source: str | os.PathLike, config: ToHFConfig) -> tuple[str, Departure | None]:
    """Writes the parameters of the run in `source` as a checkpoint of transformers.

    It is the ordinary network (b = 0) with these parameters. Returns its class, and how far it is from the network that
    was trained (None if that is not measured). Raises a `RevjaxError` where there is none, and leaves
    nothing behind then.
    """
    source = pathlib.Path(source).expanduser()
    run = read_config(source, RunConfig)
    like = read_config_json(source / PRETRAINED) if (source / PRETRAINED / CONFIG).is_file() else None
    model = dataclasses.replace(run.model, lora=None)  # adapters are added to what they are beside
    stock_config(model, like)  # before any work
    output = pathlib.Path(config.output).expanduser()
    dtype = config.dtype or (like or {}).get("dtype") or (like or {}).get("torch_dtype") or "float32"
    params = read_parameters(source) if config.measure or has_checkpoints(source) else None
    if params is None:
        read: Any = _parameters_file(source).read
    else:
        by_name = named(params)
        read = lambda name, index: by_name[name] if index is None else by_name[name][index]
    found = None
    if config.measure:
        assert params is not None
        found = departure(model, params, probe(_tokenizer_of(run, source), model), dtype)
    with _new_folder(output) as folder:
        tokenizer = _tokenizer_of(run, source)
        more = {} if like or tokenizer is None else {"eos_token_id": tokenizer.separator}
        family = write_pretrained(model, read, folder, like=like, more=more, dtype=dtype)
        for name in _KEPT:
            if name != CONFIG and (source / PRETRAINED / name).is_file():
                shutil.copyfile(source / PRETRAINED / name, folder / name)
        if isinstance(run.data, ImagesConfig):
            pass
        elif run.data.tokenizer == BYTES:
            (folder / TOKENIZER).write_text(byte_tokenizer_json(), encoding="utf-8")
            fast = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": BYTE_0}
            (folder / TOKENIZER_CONFIG).write_text(json.dumps(fast, indent=2) + "\n")
        elif not (folder / TOKENIZER).exists():
            shutil.copyfile(source / TOKENIZER, folder / TOKENIZER)
    return family.architecture_of(model), found


def keep_pretrained(source: str | os.PathLike, folder: pathlib.Path) -> None:
    """Copies what came with the pretrained parameters of the run `source`, if any did, into another run's folder."""
    there, new = pathlib.Path(source).expanduser() / PRETRAINED, folder / PRETRAINED
    if there.is_dir() and not new.exists():
        temporary = folder / f"{PRETRAINED}.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.copytree(there, temporary)
        temporary.rename(new)


def _measured(found: Pretrained, model: ModelConfig, folder: pathlib.Path) -> tuple[Fidelity, ModelConfig]:
    """How far `model`, with the parameters in `folder`, is from `found`; and `model` with streams wide enough."""
    log = get_logger(__name__)
    tokenizer = None
    if not isinstance(model, VisionConfig):
        path, separator = str(found.folder / TOKENIZER), _separator(found.folder)
        tokenizer = load_tokenizer(DataConfig(tokenizer=path, separator=separator))
    tokens, params = probe(tokenizer, model), read_file(folder / PARAMETERS, model)
    log.info("logits by transformers")
    logits, no_logits = source_logits(found.folder, tokens, model)
    log.info("logits and gradients of the networks in between")
    fidelity = measure(model, params, tokens, logits, no_logits)
    bits = fitting_fraction_bits(model, max(fidelity.largest_x))
    if model.exact and bits < model.fraction_bits:
        log.info(
            "streams reach %.3g: %d fraction bits instead of %d", max(fidelity.largest_x), bits, model.fraction_bits
        )
        model = dataclasses.replace(model, fraction_bits=bits)
        fidelity = measure(model, params, tokens, logits, no_logits)
    return fidelity, model


def _check_fidelity(found: Fidelity, config: FromHFConfig) -> None:
    """Raises `CheckpointError` for a converted model that is not what it should be."""
    names = {"source": "beside transformers", "packed": "of packed texts", "padded": "after padding"}
    limits = [
        (f"a logit {what}", found.distances[name].largest, config.max_source_error, "--max_source_error")
        for name, what in names.items()
        if name in found.distances
    ]
    if config.coupling.startswith(("near-residual", "bdia", "residual")):  # revnet is another function
        limits.append(("KL of the reversible network", found.distances["coupling"].kl, config.max_kl, "--max_kl"))
    if found.gradient_error is not None:
        what = "gradients beside the stored run"
        limits.append((what, found.gradient_error, config.max_gradient_error, "--max_gradient_error"))
    missed = [f"{what}: {x:.2g}, and not above {limit:g} ({name})" for what, x, limit, name in limits if not x <= limit]
    if found.canary or found.unsafe:
        missed.append(f"exactness: canary {found.canary}, unsafe {found.unsafe}")
    if missed or not math.isfinite(found.loss):
        raise CheckpointError(
            f"The converted model is not what it should be: {'; '.join(missed) or 'its loss is no number'}. Nothing "
            "was written. A larger M of --coupling=near-residual:M comes nearer.\n" + describe_fidelity(found)
        )


def _reversible(found: Pretrained, config: FromHFConfig) -> ModelConfig:
    """The reversible network of `config`; raises `ConfigError` where it cannot be, or a run could not train it."""
    if isinstance(found.config, EncoderConfig) and not found.config.head:
        raise ConfigError(
            f"{found.folder} has no head, so a run has nothing to train it for: take a checkpoint of "
            f"{found.family.architecture}. (revjax.conversion.open_pretrained reads it as it is.)"
        )
    try:
        model = dataclasses.replace(
            found.config,
            coupling=config.coupling,
            granularity=config.granularity,
            exact=config.exact,
            dtype=config.dtype,
            param_dtype=config.param_dtype,
            **_of_other_files(found),
        )
        # The pretrained head reads the last stream.
        order = parse_coupling(model.coupling).for_step(None).order
        return dataclasses.replace(model, readout="last") if order > 1 else model
    except ConfigError:
        raise
    except ValueError as e:
        raise ConfigError(str(e)) from None


def _of_other_files(found: Pretrained) -> dict[str, Any]:
    """Fields of the model that are not said by its config.json: what hides tokens, how images are scaled."""
    if isinstance(found.config, EncoderConfig):
        mask = special_token(found.folder / TOKENIZER, "[MASK]")
        return {} if mask is None else {"mask_token": mask}
    path = found.folder / IMAGES
    if not isinstance(found.config, VisionConfig) or not path.is_file():
        return {}
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
        scale = {ours: tuple(map(float, said[ours])) for ours in ("image_mean", "image_std") if ours in said}
    except (OSError, ValueError, TypeError) as e:
        raise CheckpointError(f"{path} cannot be read: {e}.") from None
    return scale


def _data(folder: pathlib.Path, model: ModelConfig, output: pathlib.Path) -> DataConfig | ImagesConfig:
    if isinstance(model, VisionConfig):
        return ImagesConfig()
    separator = _check_tokenizer(folder, model)
    longest = model.max_length if isinstance(model, DecoderConfig | EncoderConfig) else 512
    return DataConfig(tokenizer=str(output / TOKENIZER), separator=separator, sequence_length=min(longest, 1024))


def _check_tokenizer(folder: pathlib.Path, model: ModelConfig) -> str | None:
    """Returns the token between documents, where it is not one of the usual ones; raises `DataError` for none."""
    assert not isinstance(model, VisionConfig)
    if not (folder / TOKENIZER).is_file():
        raise DataError(
            f"{folder} has no {TOKENIZER}. With transformers: AutoTokenizer.from_pretrained(FOLDER)"
            ".save_pretrained(FOLDER)"
        )
    separator = _separator(folder)
    tokenizer = FileTokenizer(folder / TOKENIZER, separator, setting=f"eos_token in {folder / TOKENIZER_CONFIG}")
    if tokenizer.vocab_size > model.vocab_size:
        raise DataError(
            f"The tokenizer in {folder} has {tokenizer.vocab_size} tokens, but the model knows {model.vocab_size}: "
            "they are not of one model."
        )
    return separator


def _separator(folder: pathlib.Path) -> str | None:
    """What tokenizer_config.json says ends a text; None for one of the usual tokens."""
    try:
        token = json.loads((folder / TOKENIZER_CONFIG).read_text(encoding="utf-8")).get("eos_token")
    except (OSError, ValueError, AttributeError):
        return None
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) and token not in SEPARATORS else None


def _tokenizer_of(run: RunConfig, folder: pathlib.Path) -> Tokenizer | None:
    """That of a run, as it lies in its folder; None where it reads images."""
    if isinstance(run.data, ImagesConfig):
        return None
    is_bytes = run.data.tokenizer == BYTES
    return load_tokenizer(run.data if is_bytes else dataclasses.replace(run.data, tokenizer=str(folder / TOKENIZER)))


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
