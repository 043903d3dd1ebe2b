"""A reversible stack of transformer layers, and what is read of the two streams that it ends with.

    readout    mean       norm((x[l-1] + x[l]) / 2)
               last       norm(x[l])
               learned    norm(a x[l-1] + c x[l])          a, c for each channel, 1/2 at the start
               concat     halves of norm([x[l-1], x[l]]), added: Reformer's, for a head that is tied
               auto       last with couplings near the ordinary network, concat with others

Layers that norm what they return (`norm_placement: post`) need no norm there, but for concat.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ..core import parse_coupling
from ..core.plan import Plan
from .branches import make_norm
from .stack import MakeBlock, ReversibleStack
from .transformer_config import TransformerConfig

PyTree = Any


class Tower(nnx.Module):
    """The layers of a transformer, without what makes vectors of its input, and without a head.

    Args:
      config: the shape of the layers.
      layers: functions of rngs that make the branches of a layer, repeated over `config.num_layers`.
      plan: what the backward pass finds kept: "nothing", "attention", "inputs:K", "host:K" or "all".
      constrain, gather: for the streams, and for the parameters of a layer, where devices share them (see
        `revjax.sharding.constrain_rows` and `gather_layer`).
      rngs: for the parameters.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layers: Sequence[MakeBlock],
        *,
        plan: Plan,
        constrain: Callable[[jax.Array], jax.Array] | None = None,
        gather: Callable[[PyTree], PyTree] | None = None,
        rngs: nnx.Rngs,
    ):
        self.stack = ReversibleStack(
            layers,
            num_layers=config.num_layers,
            coupling=parse_coupling(config.coupling),
            plan=plan,
            exact=config.exact,
            fraction_bits=config.fraction_bits,
            constrain=constrain,
            gather=gather,
            rngs=rngs,
        )
        self.readout = config.resolved_readout
        learned, both = self.readout == "learned", self.readout == "concat"
        self.readout_scale = nnx.Param(jnp.full((2, config.d_model), 0.5)) if learned else None
        normed = config.norm_placement == "post" and not both
        self.norm = None if normed else make_norm(config, width=(2 if both else 1) * config.d_model, rngs=rngs)

    def read_out(self, previous_BTD: jax.Array | None, last_BTD: jax.Array) -> jax.Array:
        """Returns what a head reads of the two streams that the stack ends with: normed, (B, T, D)."""
        if previous_BTD is None or self.readout == "last":
            return self._normed(last_BTD)
        if self.readout == "mean":
            return self._normed(0.5 * (previous_BTD + last_BTD))
        if self.readout_scale is not None:
            previous, last = self.readout_scale[...]
            return self._normed(previous[None, None] * previous_BTD + last[None, None] * last_BTD)
        both = self._normed(jnp.concatenate([previous_BTD, last_BTD], axis=-1))
        previous_BTD, last_BTD = jnp.split(both, 2, axis=-1)
        return previous_BTD + last_BTD

    def _normed(self, x):
        return x if self.norm is None else self.norm(x)


def both_streams(x: jax.Array, second_stream: str) -> tuple[jax.Array, jax.Array]:
    """The two streams to start from, where the second has no embedding of its own: "copy" or "zero"."""
    return (jnp.zeros_like(x) if second_stream == "zero" else x), x


def cast_parameters(model: nnx.Module, dtype: str) -> None:
    """Gives every parameter of `model` that dtype."""
    if dtype != "float32":
        nnx.update(model, jax.tree.map(lambda p: p.astype(dtype), nnx.state(model, nnx.Param)))
