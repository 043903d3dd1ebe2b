"""Which of our parameters belongs to which layer of a checkpoint.

Ours are stacked: stack.runs.0.1.mlp.up.kernel has the up kernels of the second branch of a period, one for each repeat.
Theirs are one for each layer.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np
from flax import nnx

from ..models import EncoderDecoderConfig, ModelConfig, make_model


@dataclasses.dataclass(frozen=True)
class Place:
    """One of our parameters, in one layer.

    Attributes:
      name: of the parameter.
      index: of its first axis; None where it is of no layer.
      layer: the number of the layer; None likewise.
      role: what it is in a layer: "attention.norm.scale", "decoder.cross.norm.scale"; of no layer, its name.
      shape: without the axis of repeats.
      num_inputs: how many of the first axes a product contracts.
    """

    name: str
    index: int | None
    layer: int | None
    role: str
    shape: tuple[int, ...]
    num_inputs: int


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """The shape and dtype of every parameter of a model, by its name as `revjax export` writes it."""
    model = nnx.eval_shape(lambda: make_model(config, plan="all", rngs=nnx.Rngs(0)))
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {".".join(map(str, path)): (p.get_value().shape, np.dtype(p.get_value().dtype)) for path, p in flat}


def places(config: ModelConfig) -> Iterator[Place]:
    """Every parameter of every layer, and those of no layer; layer by layer within each parameter."""
    for name, (shape, _) in parameter_shapes(config).items():
        tower, is_layer, inside = name.partition("stack.runs.")
        if not is_layer:
            yield Place(name, None, None, name, shape, 1)
            continue
        of_decoder = tower == "decoder."
        num_layers = config.num_layers
        if isinstance(config, EncoderDecoderConfig) and of_decoder:
            num_layers = config.decoder_layers
        branches = ("attention.", "cross.", "mlp.") if of_decoder else ("attention.", "mlp.")
        branches = ("",) if config.granularity == "block" else branches
        period = len(config.period)
        whole = num_layers // period * period
        run, branch, role = inside.split(".", 2)
        in_rest = int(run) == 1 or whole == 0
        layer_in_period, i = divmod(int(branch), len(branches))
        first = (whole if in_rest else 0) + layer_in_period
        size = num_layers - whole if in_rest else period
        num_inputs = 2 if role.endswith("attention.out.kernel") else 1
        for index in range(shape[0]):
            yield Place(name, index, first + index * size, f"{tower}{branches[i]}{role}", shape[1:], num_inputs)
