"""Checkpoints of transformers as parameters of a model.

Tensor by tensor, so that memory is that of the largest few, and by tables (see `families`) that serve both ways. What
does not fit is found before anything is written, and said at once.
"""

import dataclasses
import json
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..errors import CheckpointError, ConfigError, nearest
from ..models import ModelConfig
from .families import FAMILIES, Family, Tensor
from .fields import Fields
from .places import parameter_shapes, places
from .tensor_files import DTYPES, WEIGHTS, TensorFiles, TensorWriter, some

CONFIG = "config.json"


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A checkpoint of transformers whose config and tensors fit together.

    Attributes:
      config: the ordinary network that it is: float streams, in float32.
      bare: whether its tensors have not the prefix of a model with a head.
    """

    folder: pathlib.Path
    family: Family
    config: ModelConfig
    tensors: TensorFiles
    bare: bool

    def name(self, tensor: Tensor, layer: int | None) -> str:
        """What `tensor` is called in these files."""
        name = tensor.name.format(layer)
        name = name.removeprefix(self.family.prefix) if self.bare else name
        old = [name.replace(new, before) for new, before in self.family.old_names if new in name]
        return next((n for n in old if n in self.tensors and name not in self.tensors), name)


def open_pretrained(folder: str | pathlib.Path) -> Pretrained:
    """Reads config.json and the headers of the safetensors files in `folder`.

    Raises a `RevjaxError` for another architecture, for fields that are not understood, and, all at once, for tensors
    that are missing, too many, or of another shape.
    """
    folder = pathlib.Path(folder).expanduser()
    if not folder.is_dir():
        hub = re.fullmatch(r"[\w.-]+/[\w.-]+", str(folder))
        fetch = f" A model of the Hugging Face hub is fetched first: hf download {folder} --local-dir={folder.name}."
        raise CheckpointError(
            f"There is no folder {folder}. Give one with {CONFIG} and {WEIGHTS}.{fetch if hub else ''}"
        )
    theirs = read_config_json(folder)
    family = _family_of(theirs, folder)
    tensors = TensorFiles(folder)
    config = dataclasses.replace(
        config_of(family, theirs, str(folder / CONFIG)), **family.read_tensors(frozenset(tensors))
    )
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


def config_of(family: Family, theirs: Mapping[str, Any], where: str) -> ModelConfig:
    """The ordinary network that a config.json of `family` says; raises `ConfigError` where it cannot be."""
    fields = Fields(theirs, where)
    ours = family.read(fields)
    fields.finish()
    try:
        return family.config(**ours, coupling="residual", exact=False, dtype="float32")
    except ValueError as e:
        raise ConfigError(f"{where}: {e}") from None


def copy_parameters(found: Pretrained, config: ModelConfig, path: pathlib.Path, metadata: dict[str, str]) -> None:
    """Writes the parameters of `found` to `path`, as those of a model of `config`.

    `config` has the architecture of `found.config`. Raises `CheckpointError` for values that are not finite, naming all
    of their tensors.
    """
    wrong: dict[str, None] = {}
    of_role = found.family.tensors_of(config)
    with TensorWriter(path, parameter_shapes(config), metadata) as writer:
        for place in places(config):
            tensor = of_role[place.role]
            name = found.name(tensor, place.layer)
            theirs = found.tensors.read(name)
            if not np.isfinite(theirs).all():
                wrong[name] = None
            writer.write(place.name, tensor.to_ours(theirs, place.shape), place.index)
    if wrong:
        raise CheckpointError(f"{found.folder} has values that are not finite, in {some(list(wrong))}.")


def _family_of(theirs: Mapping[str, Any], folder: pathlib.Path) -> Family:
    name = theirs.get("model_type")
    if name not in FAMILIES:
        hint = nearest(name, FAMILIES) if isinstance(name, str) else ""
        hint = " Its text model can be taken out first: docs/pretrained.md says how." if name == "gemma3" else hint
        raise ConfigError(
            f"{folder / CONFIG}: model_type {name!r} is not known. Known are {', '.join(FAMILIES)}.{hint}"
        )
    family = FAMILIES[name]
    classes = theirs.get("architectures") or [family.architecture]
    bare = family.bare_architecture
    known = (family.architecture, bare, bare.replace("Model", "TextModel"), *family.other_architectures)
    if not any(c in known for c in classes):
        raise ConfigError(
            f"{folder / CONFIG}: architectures {classes!r} is not a {family.architecture}, which is what is known of "
            f"{family.model_type}."
        )
    return family


def _check_tensors(found: Pretrained) -> None:
    """Raises `CheckpointError` with all that does not fit."""
    family, tensors = found.family, found.tensors
    wanted: dict[str, tuple[int, ...]] = {}
    of_role = family.tensors_of(found.config)
    for place in places(found.config):
        tensor = of_role[place.role]
        wanted[found.name(tensor, place.layer)] = tensor.shape(place.shape, place.num_inputs)
    head = of_role.get("head.kernel")
    tied = head.name if head is not None and head.name not in wanted else None
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
    lines = [f"{what}: {some(names)}" for what, names in problems.items() if names]
    if not lines and tied is not None and tied in tensors:
        embedding = found.name(of_role["embedding.table"], None)
        if not np.array_equal(tensors.read(tied), tensors.read(embedding)):
            lines = [f"{tied} differs from {embedding}, though tie_word_embeddings says that they are one"]
    if lines:
        raise CheckpointError(
            f"The tensors in {found.folder} do not fit its {CONFIG} ({family.architecture}): {'; '.join(lines)}."
        )
