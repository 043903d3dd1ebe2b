"""What a family of pretrained decoders is: its config.json and its tensors, each beside ours."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np

from ...models import DecoderConfig
from ..fields import Fields


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Where a parameter is in their checkpoint.

    Attributes:
      name: theirs, with {} for the number of a layer.
      layout: "same" flattens all axes (a vector) or leaves a table as it is; "linear" is (out, in), as torch.nn.Linear
        has it; "conv1d" is (in, out).
      part: (which, of how many) where theirs holds several of ours, one after another along its outputs.
    """

    name: str
    layout: Literal["same", "table", "linear", "conv1d"] = "same"
    part: tuple[int, int] = (0, 1)

    def shape(self, ours: tuple[int, ...], num_inputs: int) -> tuple[int, ...]:
        """The shape of theirs, for a parameter of the shape `ours` whose first `num_inputs` axes are inputs."""
        inputs, outputs = int(np.prod(ours[:num_inputs])), int(np.prod(ours[num_inputs:]))
        if self.layout == "linear":
            return outputs * self.part[1], inputs
        if self.layout == "conv1d":
            return inputs, outputs * self.part[1]
        return ours if self.layout == "table" else (int(np.prod(ours)) * self.part[1],)

    def to_ours(self, theirs: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """Our parameter, of the shape `shape`, out of their tensor."""
        x = theirs.T if self.layout == "linear" else theirs
        if self.layout != "table":
            size = x.shape[-1] // self.part[1]
            x = x[..., self.part[0] * size : (self.part[0] + 1) * size]
        return x.reshape(shape)

    def to_theirs(self, ours: np.ndarray, num_inputs: int) -> np.ndarray:
        """Their tensor, or its part, with outputs last or, for "linear", first."""
        if self.layout == "table":
            return ours
        if self.layout == "same":
            return ours.reshape(-1)
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
      read: takes the fields of a config.json; returns those of a `DecoderConfig`.
      write: the other way round: the fields that say the architecture. Raises nothing for a config that is of another
        family: what it writes then reads as another config.
      tensors: by our name ("attention." and "mlp." are the branches of a layer), theirs.
      prefix: what a model with a head has before the names of the others; checkpoints of a bare one have it not.
      ignored: a pattern of tensors that are no parameters.
    """

    model_type: str
    architecture: str
    read: Callable[[Fields], dict[str, Any]]
    write: Callable[[DecoderConfig], dict[str, Any]]
    tensors: Mapping[str, Tensor]
    prefix: str
    ignored: str
