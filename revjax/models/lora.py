"""Low-rank adaptation (LoRA, arXiv:2106.09685): a model that is frozen, and small products that are trained beside it.

    y = x W + (alpha / rank) (x A) B        W frozen; A random and B = 0 at the start, so nothing changes at first

Frozen parameters have no gradients and no moments, and no gradient with respect to them is computed. What the backward
pass rebuilds, and what it keeps, is as without adapters.
"""

import dataclasses
from typing import Any

import jax
import numpy as np
from flax import nnx

from ..nn import Linear, LowRank

Nested = dict[str, Any]
ADAPTED = ("query", "key", "value", "out", "gate", "up", "down")


class Frozen(nnx.Variable):
    """A parameter that is not trained."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """Which layers get adapters, and how large these are."""

    rank: int = 16
    alpha: float = 32.0  # what an adapter computes is multiplied by alpha / rank
    layers: tuple[str, ...] = ADAPTED  # of attention: query, key, value, out; of the MLP: gate, up, down

    def __post_init__(self):
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1, but got {self.rank}.")
        if not 0 < self.alpha < float("inf"):
            raise ValueError(f"alpha must be above 0, but got {self.alpha}.")
        unknown = [name for name in self.layers if name not in ADAPTED]
        if unknown or not self.layers:
            raise ValueError(f"layers must be some of {', '.join(ADAPTED)}, but got {', '.join(unknown) or 'none'}.")

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


def add_adapters(model: nnx.Module, config: LoRAConfig, *, rngs: nnx.Rngs) -> None:
    """Freezes every parameter of `model`, and gives the `Linear`s in its stacks that `config` names an adapter each."""
    for _, node in list(nnx.iter_graph(model)):
        if isinstance(node, nnx.Module):
            for name, value in list(vars(node).items()):
                if isinstance(value, nnx.Param):
                    setattr(node, name, Frozen(value[...]))
    for path, node in list(nnx.iter_graph(model)):
        if isinstance(node, Linear) and "runs" in path and path[-1] in config.layers:
            node.adapter = _stacked_adapter(node, config, rngs)


def _stacked_adapter(linear: Linear, config: LoRAConfig, rngs: nnx.Rngs) -> LowRank:
    """One for each layer of the stack that `linear` stands for."""
    length, *dims = linear.kernel.shape
    out_dims = dims[len(linear.in_dims) :]
    make = lambda key: LowRank(
        linear.in_dims, out_dims, rank=config.rank, scale=config.scale, dtype=linear.dtype, rngs=nnx.Rngs(key)
    )
    return jax.vmap(make)(jax.random.split(rngs.params(), length))


def without_adapters(params: Nested) -> Nested:
    """The parameters of `params`, nested, that are no adapter's."""
    inner = lambda value: without_adapters(value) if isinstance(value, dict) else value
    return {name: inner(value) for name, value in params.items() if name != "adapter"}


def merge_adapters(params: Nested, config: LoRAConfig) -> Nested:
    """Nested parameters in numpy, adapters added to their kernels: those of the same model without adapters.

    Sums are in float32, and rounded to the kernel's dtype.
    """
    if "adapter" not in params:
        inner = lambda value: merge_adapters(value, config) if isinstance(value, dict) else value
        return {name: inner(value) for name, value in params.items()}
    kernel, a, b = params["kernel"], params["adapter"]["a"], params["adapter"]["b"]
    length, rank = b.shape[:2]
    product = np.matmul(a.reshape(length, -1, rank), b.reshape(length, rank, -1)).reshape(kernel.shape)
    merged = (kernel.astype(np.float32) + np.float32(config.scale) * product).astype(kernel.dtype)
    return without_adapters(params) | {"kernel": merged}
