"""What a family of pretrained models is: its config.json and its tensors, each beside ours."""

import dataclasses
import re
from collections.abc import Callable, Container, Mapping
from typing import Any, Literal

import numpy as np

from ...models import DecoderConfig, ModelConfig
from ..fields import Fields


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Where a parameter is in their checkpoint.

    Attributes:
      name: theirs, with {} for the number of a layer.
      layout: "same" flattens all axes (a vector) or leaves a table as it is; "linear" is (out, in), as torch.nn.Linear
        has it; "conv1d" is (in, out); "conv2d" is (out, channels, height, width), ours (height, width, channels, out).
      part: (which, of how many) where theirs holds several of ours, one after another along its outputs.
      lead: how many axes of length 1 theirs begins with.
    """

    name: str
    layout: Literal["same", "table", "linear", "conv1d", "conv2d"] = "same"
    part: tuple[int, int] = (0, 1)
    lead: int = 0

    def shape(self, ours: tuple[int, ...], num_inputs: int) -> tuple[int, ...]:
        """The shape of theirs, for a parameter of the shape `ours` whose first `num_inputs` axes are inputs."""
        inputs, outputs = int(np.prod(ours[:num_inputs])), int(np.prod(ours[num_inputs:]))
        if self.layout == "linear":
            return outputs * self.part[1], inputs
        if self.layout == "conv1d":
            return inputs, outputs * self.part[1]
        if self.layout == "conv2d":
            height, width, channels, out = ours
            return out, channels, height, width
        own = ours if self.layout == "table" else (int(np.prod(ours)) * self.part[1],)
        return (1,) * self.lead + own

    def to_ours(self, theirs: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """Our parameter, of the shape `shape`, out of their tensor."""
        if self.layout == "conv2d":
            return theirs.transpose(2, 3, 1, 0)
        x = theirs.T if self.layout == "linear" else np.squeeze(theirs, tuple(range(self.lead)))
        if self.layout != "table":
            size = x.shape[-1] // self.part[1]
            x = x[..., self.part[0] * size : (self.part[0] + 1) * size]
        return x.reshape(shape)

    def to_theirs(self, ours: np.ndarray, num_inputs: int) -> np.ndarray:
        """Their tensor, or its part, with outputs last or, for "linear", first."""
        if self.layout == "conv2d":
            return ours.transpose(3, 2, 0, 1)
        if self.layout in ("same", "table"):
            own = ours if self.layout == "table" else ours.reshape(-1)
            return own.reshape((1,) * self.lead + own.shape)
        x = ours.reshape(int(np.prod(ours.shape[:num_inputs])), -1)
        return x.T if self.layout == "linear" else x

    @property
    def axis(self) -> int:
        """Along which parts of theirs follow one another."""
        return 0 if self.layout == "linear" else -1


@dataclasses.dataclass(frozen=True)
class Family:
    """One architecture of transformers.

    Attributes:
      model_type, architecture: what config.json calls it, and the class with a head.
      read: takes the fields of a config.json; returns those of a `config`.
      write: the other way round: the fields that say the architecture. Raises nothing for a config that is of another
        family: what it writes then reads as another config.
      tensors: by our name ("attention.", "cross." and "mlp." are the branches of a layer), theirs.
      prefix: what a model with a head has before the names of the others; checkpoints of a bare one have it not.
      ignored: a pattern of tensors that are no parameters.
      config: the class of our configuration.
      read_tensors: takes the names of their tensors; returns fields of our configuration that these alone tell.
      other_tensors: as `tensors`, where these depend on the configuration.
      is_bare: whether a model goes out without a head, and then without the prefix.
      other_architectures: classes whose checkpoints hold such a model as well.
      old_names: (part of a name, what it was in old checkpoints).
    """

    model_type: str
    architecture: str
    read: Callable[[Fields], dict[str, Any]]
    write: Callable[[Any], dict[str, Any]]
    tensors: Mapping[str, Tensor]
    prefix: str
    ignored: str
    config: type[ModelConfig] = DecoderConfig
    read_tensors: Callable[[Container[str]], dict[str, Any]] = lambda names: {}
    other_tensors: Callable[[Any], Mapping[str, Tensor]] | None = None
    is_bare: Callable[[Any], bool] = lambda config: False
    other_architectures: tuple[str, ...] = ()
    old_names: tuple[tuple[str, str], ...] = ()

    def tensors_of(self, config: ModelConfig) -> Mapping[str, Tensor]:
        """`tensors`, for a model of that configuration."""
        return self.tensors if self.other_tensors is None else self.other_tensors(config)

    @property
    def bare_architecture(self) -> str:
        """The class without a head."""
        return re.sub("(For[A-Z][A-Za-z]+|LMHeadModel)$", "Model", self.architecture)

    def architecture_of(self, config: ModelConfig) -> str:
        """The class that a model of that configuration goes out as."""
        return self.bare_architecture if self.is_bare(config) else self.architecture
