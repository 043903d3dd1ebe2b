"""The feed-forward layer.

plain    y = act(x up) down
gated    y = (act(x gate) * (x up)) down            (GLU variants, arXiv:2002.05202)
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from .dropout import dropout as apply_dropout
from .linear import Linear
from .rounding import accumulator, rounded

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": jax.nn.gelu,  # the tanh approximation, as in GPT-2
    "gelu_exact": functools.partial(jax.nn.gelu, approximate=False),
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
}


# The backward pass computes the activation again, and keeps none of the steps inside it.
_from_inputs = functools.partial(jax.checkpoint, prevent_cse=False)


class MLP(nnx.Module):
    """Two dense layers, three if `gated`. `dropout` acts on the hidden layer h_BTF."""

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        *,
        activation: str = "gelu",
        gated: bool = False,
        use_bias: bool = False,
        out_init_scale: float = 1.0,
        dropout: float = 0.0,
        dtype=jnp.bfloat16,
        rngs: nnx.Rngs,
    ):
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, but got {activation!r}.")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, but got {dropout}.")
        self.up = Linear(d_model, d_ff, use_bias=use_bias, dtype=dtype, rngs=rngs)
        self.gate = Linear(d_model, d_ff, use_bias=use_bias, dtype=dtype, rngs=rngs) if gated else None
        out_std = out_init_scale / math.sqrt(d_ff)
        self.down = Linear(d_ff, d_model, init_std=out_std, use_bias=use_bias, dtype=dtype, rngs=rngs)
        self.activation = activation
        self.dropout = dropout

    def __call__(self, x_BTD: jax.Array, *, key: jax.Array | None = None) -> jax.Array:
        act, up_BTF = ACTIVATIONS[self.activation], self.up(x_BTD)
        wide = accumulator(up_BTF.dtype)  # one rounding at the end: as exact as it gets, and faster on CPU
        if self.gate is None:
            h_BTF = _from_inputs(lambda up: act(up.astype(wide)))(up_BTF)
        else:
            h_BTF = _from_inputs(lambda gate, up: act(gate.astype(wide)) * up.astype(wide))(self.gate(x_BTD), up_BTF)
        return self.down(rounded(apply_dropout(h_BTF, self.dropout, key), up_BTF.dtype))
