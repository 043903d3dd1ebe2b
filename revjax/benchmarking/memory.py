"""Memory of a gradient: reversible, beside `jax.checkpoint` per layer, beside stored.

Figures are XLA's temporary bytes of the compiled program; parameters and gradients are inputs and
outputs, and not among them. Nothing is run, so any depth can be asked for.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx

from ..memory import activation_memory, residual_stack, temp_bytes
from ..models import Decoder, DecoderConfig, value_and_grad


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryConfig:
    """One shape: the whole decoder's value_and_grad, or, with `stack_only`, the stack's gradient alone."""

    num_layers: int
    d_model: int
    sequence_length: int
    batch_size: int
    vocab_size: int = 256
    dtype: str = "bfloat16"
    coupling: str = "revnet"
    stack_only: bool = False

    def decoder(self) -> DecoderConfig:
        return DecoderConfig(
            num_layers=self.num_layers,
            d_model=self.d_model,
            num_heads=max(1, self.d_model // 64),
            vocab_size=self.vocab_size,
            dtype=self.dtype,  # pyright: ignore[reportArgumentType]
            coupling=self.coupling,
        )


def memory(config: MemoryConfig) -> dict[str, int | str]:
    """Temporary bytes by "reversible", "checkpoint" and "stored"."""
    decoder = config.decoder()
    if not config.stack_only:
        return dataclasses.asdict(config) | activation_memory(decoder, config.batch_size, config.sequence_length)
    model = nnx.eval_shape(lambda: Decoder(decoder, rngs=nnx.Rngs(0)))
    x = jax.ShapeDtypeStruct((config.batch_size, config.sequence_length, config.d_model), jnp.float32)

    def ours(model, x):
        return value_and_grad(lambda model: jnp.mean(model.stack(x) ** 2))(model)

    def theirs(model, x, *, remat):
        graphdef, params, rest = nnx.split(model, nnx.Param, ...)

        def loss(params):
            y = residual_stack(nnx.merge(graphdef, params, rest), x.astype(jnp.dtype(config.dtype)), remat=remat)
            return jnp.mean(y.astype(jnp.float32) ** 2)

        return jax.grad(loss)(params)

    return dataclasses.asdict(config) | {
        "reversible": temp_bytes(ours, model, x),
        "checkpoint": temp_bytes(functools.partial(theirs, remat=True), model, x),
        "stored": temp_bytes(functools.partial(theirs, remat=False), model, x),
    }
