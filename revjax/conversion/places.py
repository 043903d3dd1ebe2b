"""Which of our parameters belongs to which layer of a checkpoint.

Ours are stacked: stack.runs.0.1.mlp.up.kernel has the up kernels of the second branch of a period, one for each repeat.
Theirs are one for each layer.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np
from flax import nnx

from ..models import Decoder, DecoderConfig


@dataclasses.dataclass(frozen=True)
class Place:
    """One of our parameters, in one layer.

    Attributes:
      name: of the parameter.
      index: of its first axis; None where it is of no layer.
      layer: the number of the layer; None likewise.
      role: what it is in a layer: "attention.norm.scale"; of no layer, its name.
      shape: without the axis of repeats.
      num_inputs: how many of the first axes a product contracts.
    """

    name: str
    index: int | None
    layer: int | None
    role: str
    shape: tuple[int, ...]
    num_inputs: int


def parameter_shapes(config: DecoderConfig) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """The shape and dtype of every parameter of a decoder, by its name as `revjax export` writes it."""
    model = nnx.eval_shape(lambda: Decoder(config, plan="all", rngs=nnx.Rngs(0)))
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {".".join(map(str, path)): (p.get_value().shape, np.dtype(p.get_value().dtype)) for path, p in flat}


def places(config: DecoderConfig) -> Iterator[Place]:
    """Every parameter of every layer, and those of no layer; layer by layer within each parameter."""
    branches = 1 if config.granularity == "block" else 2
    period = len(config.period)
    whole = config.num_layers // period * period
    for name, (shape, _) in parameter_shapes(config).items():
        if not name.startswith("stack.runs."):
            yield Place(name, None, None, name, shape, 1)
            continue
        run, branch, role = name.removeprefix("stack.runs.").split(".", 2)
        in_rest = int(run) == 1 or whole == 0
        if branches == 2:
            role = f"{('attention', 'mlp')[int(branch) % 2]}.{role}"
        size = config.num_layers - whole if in_rest else period
        first = (whole if in_rest else 0) + int(branch) // branches
        num_inputs = 2 if role == "attention.attention.out.kernel" else 1
        for index in range(shape[0]):
            yield Place(name, index, first + index * size, role, shape[1:], num_inputs)
