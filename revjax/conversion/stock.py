"""Parameters as a checkpoint of the stock architecture.

A network that comes near to an ordinary one, or is one when it is evaluated, goes out as that: with b = 0.
"""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from ..core import parse_coupling
from ..errors import CheckpointError, ConfigError
from ..models import DecoderConfig, EncoderConfig, EncoderDecoderConfig, ModelConfig
from .families import FAMILIES, Family, Tensor
from .places import Place, places
from .pretrained import CONFIG, config_of
from .tensor_files import DTYPES, INDEX, WEIGHTS, TensorWriter, some

_LARGEST_FILE = 5 * 10**9
Read = Callable[[str, int | None], np.ndarray]


def write_pretrained(
    config: ModelConfig,
    read: Read,
    folder: pathlib.Path,
    *,
    like: Mapping[str, Any] | None = None,
    more: Mapping[str, Any] | None = None,
    dtype: str = "float32",
) -> Family:
    """Writes a checkpoint of the stock architecture into `folder`, which is there and empty; returns its family.

    Args:
      read: (name of a parameter, index of its first axis, or None for all of it) -> its values.
      like: a config.json that this one is to be like, where its architecture is that of `config`.
      more: fields of config.json that are not of the architecture, where there is none to be like.
      dtype: of the tensors.

    Raises `ConfigError` where no family has the architecture of `config`, and `CheckpointError` for values that are not
    finite.
    """
    family, theirs = stock_config(config, like)
    if _says(family, theirs, config) != architecture(config):
        config, read = _without_embedding_scale(config), _folded(config, read)
    target = np.dtype(DTYPES[{"float32": "F32", "float16": "F16", "bfloat16": "BF16"}[dtype]])
    of_role, tensors = family.tensors_of(config), dict(_theirs(family, config))
    shapes = {
        name: (of_role[parts[0].role].shape(parts[0].shape, parts[0].num_inputs), target)
        for name, parts in tensors.items()
    }
    files = list(_files(shapes))
    wrong = []
    for i, names in enumerate(files):
        file = WEIGHTS if len(files) == 1 else f"model-{i + 1:05}-of-{len(files):05}.safetensors"
        with TensorWriter(folder / file, {name: shapes[name] for name in names}, {"format": "pt"}) as writer:
            for name in names:
                value = _their_value(of_role, tensors[name], read, target)
                if not np.isfinite(value).all():
                    wrong.append(name)
                writer.write(name, value)
    if wrong:
        raise CheckpointError(f"In {dtype}, values of these tensors are not finite: {some(wrong)}.")
    if len(files) > 1:
        _write_index(folder, files, shapes)
    (folder / CONFIG).write_text(json.dumps({**(more or {}), **theirs, "dtype": dtype}, indent=2) + "\n")
    return family


def stock_config(config: ModelConfig, like: Mapping[str, Any] | None = None) -> tuple[Family, dict[str, Any]]:
    """The family and config.json of the ordinary network that `config` comes near to.

    Raises `ConfigError` where no family has its architecture, or its coupling does not come near to the ordinary one.
    """
    _check_coupling(config)
    wanted = architecture(config)
    if like is not None and like.get("model_type") in FAMILIES:
        family = FAMILIES[like["model_type"]]
        if _says(family, like, config) == wanted:
            return family, {k: v for k, v in like.items() if k not in ("dtype", "torch_dtype")}
    for family in FAMILIES.values():
        if family.config is not type(config):
            continue
        classes = [family.architecture_of(config)]
        theirs = {"model_type": family.model_type, "architectures": classes} | family.write(config)
        try:
            if _says(family, theirs, config) == wanted:
                return family, theirs
        except (ConfigError, KeyError):  # it cannot even be said
            continue
    if (folded := _without_embedding_scale(config)) != config:
        return stock_config(folded, like)
    hint = ""
    if isinstance(config, DecoderConfig):
        hint = (
            " A model of your own can be one: the shape of Llama is norm: rms, gated: true, use_bias: false, "
            "positions: rotary, window: null."
        )
    raise ConfigError(
        f"No family of transformers has this architecture.{hint} Known are "
        f"{', '.join(f.architecture for f in FAMILIES.values())}."
    )


def _says(family: Family, theirs: Mapping[str, Any], config: ModelConfig) -> ModelConfig:
    """The architecture that a config.json says, where its tensors are those of `config`."""
    if family.config is not type(config):
        raise ConfigError(f"{family.architecture} is another kind of model.")
    tensors = {name: getattr(config, name) for name in family.read_tensors(())}
    return architecture(dataclasses.replace(config_of(family, theirs, CONFIG), **tensors))


def architecture(config: ModelConfig) -> ModelConfig:
    """`config` with what does not change the ordinary network at its defaults, and everything else said."""
    bias = lambda own: config.use_bias if own is None else own
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    said: dict[str, Any] = {name: defaults[name] for name in _NOT_OF_THE_NETWORK if name in defaults}
    said |= dict(
        num_kv_heads=config.kv_heads,
        head_dim=config.head_size,
        d_ff=config.mlp_width,
        norm_eps=config.eps,
        qkv_bias=bias(config.qkv_bias),
        out_bias=bias(config.out_bias),
        mlp_bias=bias(config.mlp_bias),
        use_bias=config.use_bias and config.norm == "layer",
        rope_base=config.rope_base if config.positions == "rotary" else 10_000.0,
        local_rope_base=None if config.local_rope_base == config.rope_base else config.local_rope_base,
        attention_scale=round(config.attention_scale or config.head_size**-0.5, 9),
        layer_pattern=_pattern(config),
        coupling="residual",
        exact=False,
    )
    if isinstance(config, DecoderConfig | EncoderConfig) and config.positions != "learned":
        said["max_length"] = defaults["max_length"]
    if isinstance(config, DecoderConfig | EncoderDecoderConfig):
        said["embedding_scale"] = round(config.embedding_scale, 6)
    if isinstance(config, EncoderDecoderConfig):
        said |= dict(num_decoder_layers=config.decoder_layers, start_token=config.start)
        said["logit_scale"] = None if config.logit_scale is None else round(config.logit_scale, 9)
    return dataclasses.replace(config, **said)


_NOT_OF_THE_NETWORK = (
    *("dropout", "attention_dropout", "stochastic_depth", "dtype", "param_dtype", "granularity", "readout", "lora"),
    *("second_stream", "layer_scale", "fraction_bits", "mlp_chunk", "loss_tile", "mask_rate", "mask_token"),
    *("label_smoothing", "image_mean", "image_std"),
)


def _pattern(config: ModelConfig) -> tuple:
    return () if config.window is None or "global" not in config.period else config.period


def _without_embedding_scale(config: ModelConfig) -> ModelConfig:
    """`config` with larger embeddings instead of a factor, where it can be: see `_folded`."""
    if not isinstance(config, DecoderConfig) or config.embedding_scale == 0:
        return config
    if config.tie_embeddings and config.norm_placement == "post":  # there is no last norm
        return config
    return dataclasses.replace(config, embedding_scale=1.0)


def _folded(config: ModelConfig, read: Read) -> Read:
    """Parameters of the same network without `embedding_scale`, which most families have no field for.

    E' = scale E; and where the head is tied to E, the last norm is divided: (norm / scale) . E' = norm . E. With a
    scale that is a power of two this is so to the bit.
    """
    assert isinstance(config, DecoderConfig)
    scale, offset = config.embedding_scale, config.norm_offset
    change: dict[str, Callable[[np.ndarray], np.ndarray]] = {"embedding.table": lambda x: x * scale}
    if config.tie_embeddings:
        change |= {"norm.scale": lambda x: (x + offset) / scale - offset, "norm.bias": lambda x: x / scale}

    def folded(name: str, index: int | None) -> np.ndarray:
        value = read(name, index)
        return change[name](value.astype(np.float32)) if name in change else value

    return folded


def _check_coupling(config: ModelConfig) -> None:
    coupling = parse_coupling(config.coupling).for_step(None)
    near = coupling.order == 1 or config.coupling.partition(":")[0] == "near-residual"
    if not near:
        raise ConfigError(
            f"A model that was trained with the coupling {config.coupling!r} is another network than a stock "
            "architecture with its parameters. Train one with --model.coupling=near-residual:4, bdia:4 or residual."
        )
    own = {"layer_scale": config.layer_scale is not None, "second_stream": config.second_stream == "own"}
    own |= {"readout": config.resolved_readout in ("learned", "concat")}
    if any(own.values()):
        names = ", ".join(name for name, is_there in own.items() if is_there)
        raise ConfigError(f"A stock architecture has no place for the parameters of {names}.")


def _theirs(family: Family, config: ModelConfig) -> Iterator[tuple[str, list[Place]]]:
    """Each of their tensors, with the parameters of ours that it holds, in its order; layer by layer."""
    found: dict[str, list[Place]] = {}
    of_role, bare = family.tensors_of(config), family.is_bare(config)
    ordered = sorted(places(config), key=lambda p: -1 if p.layer is None else p.layer)
    for place in ordered:
        if place.role not in of_role:
            raise ConfigError(f"{family.architecture} has no place for the parameter {place.name}.")
        name = of_role[place.role].name.format(place.layer)
        found.setdefault(name.removeprefix(family.prefix) if bare else name, []).append(place)
    for name, parts in found.items():
        yield name, sorted(parts, key=lambda p: of_role[p.role].part[0])


def _their_value(of_role: Mapping[str, Tensor], parts: list[Place], read: Read, dtype: np.dtype) -> np.ndarray:
    values = [of_role[p.role].to_theirs(read(p.name, p.index), p.num_inputs) for p in parts]
    value = values[0] if len(values) == 1 else np.concatenate(values, of_role[parts[0].role].axis)
    with np.errstate(over="ignore"):  # what does not fit is infinite, and named
        return value.astype(dtype, copy=False)


def _files(shapes: Mapping[str, tuple[tuple[int, ...], np.dtype]]) -> Iterator[list[str]]:
    """Names, file by file."""
    names, size = [], 0
    for name, (shape, dtype) in shapes.items():
        bytes_of = int(np.prod(shape)) * dtype.itemsize
        if names and size + bytes_of > _LARGEST_FILE:
            yield names
            names, size = [], 0
        names.append(name)
        size += bytes_of
    yield names


def _write_index(folder: pathlib.Path, files: list[list[str]], shapes: Mapping) -> None:
    total = sum(int(np.prod(shape)) * dtype.itemsize for shape, dtype in shapes.values())
    place = {n: f"model-{i + 1:05}-of-{len(files):05}.safetensors" for i, names in enumerate(files) for n in names}
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": place}, indent=2) + "\n")
