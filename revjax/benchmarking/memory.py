"""Memory of a gradient against depth: reversible, beside `jax.checkpoint` per layer, beside stored.

Figures are XLA's temporary bytes of the compiled program; parameters and gradients are inputs and
outputs, and not among them. Nothing is run, so any depth can be asked for.
"""

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from flax import nnx

from ..memory import activation_memory, residual_stack, temp_bytes
from ..models import Decoder, DecoderConfig, value_and_grad


def stack_memory_table(
    config: DecoderConfig, depths: tuple[int, ...], batch_size: int, sequence_length: int
) -> Iterator[dict[str, int]]:
    """Yields for each depth the temporary bytes of the gradient of the stack alone (no embedding, no loss)."""
    x = jax.ShapeDtypeStruct((batch_size, sequence_length, config.d_model), jnp.float32)
    for depth in depths:
        model = nnx.eval_shape(
            lambda depth=depth: Decoder(dataclasses.replace(config, num_layers=depth), rngs=nnx.Rngs(0))
        )
        graphdef, params, rest = nnx.split(model, nnx.Param, ...)

        def rival(remat, graphdef=graphdef, rest=rest):
            def loss(params, x):
                model = nnx.merge(graphdef, params, jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), rest))
                y = residual_stack(model, x.astype(jnp.dtype(config.dtype)), remat=remat)
                return jnp.mean(y.astype(jnp.float32) ** 2)

            return jax.grad(loss, argnums=(0, 1))

        ours = lambda model, x: value_and_grad(lambda model: jnp.mean(model.stack(x) ** 2))(model)
        yield {
            "num_layers": depth,
            "reversible": temp_bytes(ours, model, x),
            "checkpoint": temp_bytes(rival(True), params, x),
            "stored": temp_bytes(rival(False), params, x),
        }


def decoder_memory_table(
    config: DecoderConfig, depths: tuple[int, ...], batch_size: int, sequence_length: int
) -> Iterator[dict[str, int]]:
    """Yields for each depth the temporary bytes of the whole decoder's value_and_grad."""
    for depth in depths:
        deeper = dataclasses.replace(config, num_layers=depth)
        yield {"num_layers": depth} | activation_memory(deeper, batch_size, sequence_length)
