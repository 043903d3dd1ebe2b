"""Checkpoints of transformers as parameters of a `Decoder`, and parameters as such a checkpoint.

Both ways go tensor by tensor, so that memory is that of the largest few, and by the same tables (see `families`). What
does not fit is found before anything is written, and said at once.
"""

import dataclasses
import json
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from ..core import parse_coupling
from ..errors import CheckpointError, ConfigError, nearest
from ..models import DecoderConfig
from .families import FAMILIES, Family, Tensor
from .fields import Fields
from .places import Place, parameter_shapes, places
from .tensor_files import DTYPES, INDEX, WEIGHTS, TensorFiles, TensorWriter

CONFIG = "config.json"
_LARGEST_FILE = 5 * 10**9
Read = Callable[[str, int | None], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A checkpoint of transformers whose config and tensors fit together.

    Attributes:
      config: the ordinary network that it is: float streams, in float32.
      names: by parameter and index of ours, the tensor of theirs.
    """

    folder: pathlib.Path
    family: Family
    config: DecoderConfig
    tensors: TensorFiles
    bare: bool  # without the prefix of a model with a head

    def name(self, tensor: Tensor, layer: int | None) -> str:
        """What `tensor` is called in these files."""
        name = tensor.name.format(layer)
        return name.removeprefix(self.family.prefix) if self.bare else name


def open_pretrained(folder: str | pathlib.Path) -> Pretrained:
    """Reads config.json and the headers of the safetensors files in `folder`.

    Raises a `RevjaxError` for another architecture, for fields that are not understood, and, all at once, for tensors
    that are missing, too many, or of another shape.
    """
    folder = pathlib.Path(folder).expanduser()
    if not folder.is_dir():
        raise CheckpointError(f"There is no folder {folder}. Give one with {CONFIG} and {WEIGHTS}.")
    theirs = read_config_json(folder)
    family = _family_of(theirs, folder)
    config = decoder_of(family, theirs, str(folder / CONFIG))
    tensors = TensorFiles(folder)
    bare = not any(name.startswith(family.prefix) for name in tensors)
    found = Pretrained(folder, family, config, tensors, bare)
    _check_tensors(found)
    return found


def read_config_json(folder: pathlib.Path) -> dict[str, Any]:
    """The config.json in `folder`; raises `CheckpointError` where there is none."""
    path = folder / CONFIG
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{folder} has no {CONFIG}: it is not the folder of a pretrained model.") from None
    except (OSError, ValueError) as e:
        raise CheckpointError(f"{path} cannot be read as JSON: {e}.") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} must hold an object, but got {type(found).__name__}.")
    return found


def decoder_of(family: Family, theirs: Mapping[str, Any], where: str) -> DecoderConfig:
    """The ordinary network that a config.json of `family` says; raises `ConfigError` where it cannot be."""
    fields = Fields(theirs, where)
    ours = family.read(fields)
    fields.finish()
    try:
        return DecoderConfig(**ours, coupling="residual", exact=False, dtype="float32")
    except ValueError as e:
        raise ConfigError(f"{where}: {e}") from None


def copy_parameters(found: Pretrained, config: DecoderConfig, path: pathlib.Path, metadata: dict[str, str]) -> None:
    """Writes the parameters of `found` to `path`, as those of a decoder of `config`.

    `config` has the architecture of `found.config`. Raises `CheckpointError` for values that are not finite, naming all
    of their tensors.
    """
    wrong: dict[str, None] = {}
    with TensorWriter(path, parameter_shapes(config), metadata) as writer:
        for place in places(config):
            tensor = found.family.tensors[place.role]
            name = found.name(tensor, place.layer)
            theirs = found.tensors.read(name)
            if not np.isfinite(theirs.astype(np.float32)).all():
                wrong[name] = None
            writer.write(place.name, tensor.to_ours(theirs, place.shape), place.index)
    if wrong:
        raise CheckpointError(f"{found.folder} has values that are not finite, in {_some(list(wrong))}.")


def write_pretrained(
    config: DecoderConfig,
    read: Read,
    folder: pathlib.Path,
    *,
    like: Mapping[str, Any] | None = None,
    dtype: str = "float32",
) -> Family:
    """Writes a checkpoint of the stock architecture into `folder`, which is there and empty; returns its family.

    Args:
      read: (name of a parameter, index of its first axis, or None for all of it) -> its values.
      like: a config.json that this one is to be like, where its architecture is that of `config`.
      dtype: of the tensors.

    Raises `ConfigError` where no family has the architecture of `config`, and `CheckpointError` for values that are not
    finite.
    """
    family, theirs = stock_config(config, like)
    target = np.dtype(DTYPES[{"float32": "F32", "float16": "F16", "bfloat16": "BF16"}[dtype]])
    tensors = dict(_theirs(family, config))
    shapes = {
        name: (family.tensors[parts[0].role].shape(parts[0].shape, parts[0].num_inputs), target)
        for name, parts in tensors.items()
    }
    files = list(_files(shapes))
    wrong = []
    for i, names in enumerate(files):
        file = WEIGHTS if len(files) == 1 else f"model-{i + 1:05}-of-{len(files):05}.safetensors"
        with TensorWriter(folder / file, {name: shapes[name] for name in names}, {"format": "pt"}) as writer:
            for name in names:
                value = _their_value(family, tensors[name], read, target)
                if not np.isfinite(value.astype(np.float32)).all():
                    wrong.append(name)
                writer.write(name, value)
    if wrong:
        raise CheckpointError(f"In {dtype}, values of these tensors are not finite: {_some(wrong)}.")
    if len(files) > 1:
        _write_index(folder, files, shapes)
    (folder / CONFIG).write_text(json.dumps(theirs | {"dtype": dtype}, indent=2) + "\n")
    return family


def stock_config(config: DecoderConfig, like: Mapping[str, Any] | None = None) -> tuple[Family, dict[str, Any]]:
    """The family and config.json of the ordinary network that `config` comes near to.

    Raises `ConfigError` where no family has its architecture, or its coupling does not come near to the ordinary one.
    """
    _check_coupling(config)
    wanted = architecture(config)
    if like is not None and like.get("model_type") in FAMILIES:
        family = FAMILIES[like["model_type"]]
        if architecture(decoder_of(family, like, CONFIG)) == wanted:
            return family, {k: v for k, v in like.items() if k not in ("dtype", "torch_dtype")}
    for family in FAMILIES.values():
        theirs = {"model_type": family.model_type, "architectures": [family.architecture]} | family.write(config)
        try:
            if architecture(decoder_of(family, theirs, CONFIG)) == wanted:
                return family, theirs
        except (ConfigError, KeyError):  # it cannot even be said
            continue
    raise ConfigError(
        "No family of transformers has this architecture. A model of your own can be one: the shape of Llama is norm: "
        "rms, gated: true, use_bias: false, positions: rotary, window: null. Known are "
        f"{', '.join(f.architecture for f in FAMILIES.values())}."
    )


def architecture(config: DecoderConfig) -> DecoderConfig:
    """`config` with what does not change the ordinary network at its defaults, and everything else said."""
    bias = lambda own: config.use_bias if own is None else own
    return DecoderConfig(
        **{name: getattr(config, name) for name in _SAME},
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
        max_length=config.max_length if config.positions == "learned" else 1024,
        attention_scale=round(config.attention_scale or config.head_size**-0.5, 9),
        embedding_scale=round(config.embedding_scale, 6),
        layer_pattern=_pattern(config),
        coupling="residual",
        exact=False,
    )


_SAME = (
    *("vocab_size", "d_model", "num_layers", "num_heads", "activation", "gated", "norm", "norm_offset", "post_norm"),
    *("qk_norm", "positions", "rope_scaling", "window", "attention_softcap", "logit_softcap", "tie_embeddings"),
)


def _pattern(config: DecoderConfig) -> tuple:
    return () if config.window is None or "global" not in config.period else config.period


def _check_coupling(config: DecoderConfig) -> None:
    coupling = parse_coupling(config.coupling).for_step(None)
    near = coupling.order == 1 or config.coupling.partition(":")[0] == "near-residual"
    if not near:
        raise ConfigError(
            f"A model with the coupling {config.coupling!r} is not near to a stock architecture, which its parameters "
            "would not make. near-residual, bdia and residual are."
        )
    own = {"layer_scale": config.layer_scale is not None, "second_stream": config.second_stream == "own"}
    own |= {"readout": config.readout in ("learned", "concat")}
    if any(own.values()):
        names = ", ".join(name for name, is_there in own.items() if is_there)
        raise ConfigError(f"A stock architecture has no place for the parameters of {names}.")


def _family_of(theirs: Mapping[str, Any], folder: pathlib.Path) -> Family:
    name = theirs.get("model_type")
    if name not in FAMILIES:
        hint = nearest(name, FAMILIES) if isinstance(name, str) else ""
        hint = " Convert its text model alone (text_config)." if name == "gemma3" else hint
        raise ConfigError(
            f"{folder / CONFIG}: model_type {name!r} is not known. Known are {', '.join(FAMILIES)}.{hint}"
        )
    family = FAMILIES[name]
    classes = theirs.get("architectures") or [family.architecture]
    bare = re.sub("(ForCausalLM|LMHeadModel)$", "Model", family.architecture)
    if not any(c in (family.architecture, bare, bare.replace("Model", "TextModel")) for c in classes):
        raise ConfigError(
            f"{folder / CONFIG}: architectures {classes!r} is not a language model ({family.architecture})."
        )
    return family


def _theirs(family: Family, config: DecoderConfig) -> Iterator[tuple[str, list[Place]]]:
    """Each of their tensors, with the parameters of ours that it holds, in its order; layer by layer."""
    found: dict[str, list[Place]] = {}
    ordered = sorted(places(config), key=lambda p: -1 if p.layer is None else p.layer)
    for place in ordered:
        if place.role not in family.tensors:
            raise ConfigError(f"{family.architecture} has no place for the parameter {place.name}.")
        found.setdefault(family.tensors[place.role].name.format(place.layer), []).append(place)
    for name, parts in found.items():
        yield name, sorted(parts, key=lambda p: family.tensors[p.role].part[0])


def _their_value(family: Family, parts: list[Place], read: Read, dtype: np.dtype) -> np.ndarray:
    values = [family.tensors[p.role].to_theirs(read(p.name, p.index), p.num_inputs) for p in parts]
    value = values[0] if len(values) == 1 else np.concatenate(values, family.tensors[parts[0].role].axis)
    with np.errstate(over="ignore"):  # what does not fit is infinite, and named
        return value.astype(dtype, copy=False)


def _check_tensors(found: Pretrained) -> None:
    """Raises `CheckpointError` with all that does not fit."""
    family, tensors = found.family, found.tensors
    wanted: dict[str, tuple[int, ...]] = {}
    for place in places(found.config):
        tensor = family.tensors[place.role]
        wanted[found.name(tensor, place.layer)] = tensor.shape(place.shape, place.num_inputs)
    tied = family.tensors["head.kernel"].name if found.config.tie_embeddings else None
    missing = [name for name in wanted if name not in tensors]
    extra = [n for n in tensors if n not in wanted and n != tied and not re.fullmatch(family.ignored, n)]
    shapes = [
        f"{name} is {tensors.shape(name)}, not {shape}"
        for name, shape in wanted.items()
        if name in tensors and tensors.shape(name) != shape
    ]
    dtypes = [
        f"{name} is {tensors.dtype(name)}" for name in wanted if name in tensors and tensors.dtype(name) not in DTYPES
    ]
    problems = {"missing": missing, "not known": extra, "of another shape": shapes, "of another kind of number": dtypes}
    lines = [f"{what}: {_some(names)}" for what, names in problems.items() if names]
    if not lines and tied is not None and tied in tensors:
        embedding = found.name(family.tensors["embedding.table"], None)
        if not np.array_equal(tensors.read(tied), tensors.read(embedding)):
            lines = [f"{tied} differs from {embedding}, though tie_word_embeddings says that they are one"]
    if lines:
        raise CheckpointError(
            f"The tensors in {found.folder} do not fit its {CONFIG} ({family.architecture}): {'; '.join(lines)}."
        )


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


def _some(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
