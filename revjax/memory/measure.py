"""How much memory a gradient needs, asked of XLA: it compiles the program and says, without running it."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ..core.plan import Plan
from ..models.decoder import Decoder
from ..models.decoder_config import DecoderConfig
from ..models.gradients import value_and_grad
from .baseline import checkpoint_loss, stored_loss


def temp_bytes(
    f: Callable, *args, donate_argnums: int | tuple[int, ...] = (), compiler_options: dict[str, Any] | None = None
) -> int:
    """The temporary bytes of `f` as XLA compiles it for this device: what exists beside inputs and outputs.

    `args` may be abstract (jax.ShapeDtypeStruct), so nothing is allocated. Outputs take the place of
    arguments in `donate_argnums`.
    """
    lowered = jax.jit(f, donate_argnums=donate_argnums).lower(*args)
    analysis = lowered.compile(compiler_options=compiler_options).memory_analysis()
    assert analysis is not None, "XLA tells no memory on this backend"
    return analysis.temp_size_in_bytes


def activation_memory(
    config: DecoderConfig, batch_size: int, sequence_length: int, *, plan: Plan = "nothing"
) -> dict[str, int]:
    """Temporary bytes of the loss's gradient: reversible, beside `jax.checkpoint` per layer, beside stored.

    Parameters and gradients are inputs and outputs, and not counted. Compiles three programs (seconds each).

    Returns:
      Bytes by "reversible", "checkpoint" and "stored".
    """
    model = nnx.eval_shape(lambda: Decoder(config, plan=plan, rngs=nnx.Rngs(0)))
    tokens = jax.ShapeDtypeStruct((batch_size, sequence_length), jnp.int32)

    def ours(model, tokens):
        return value_and_grad(lambda model: jnp.divide(*model.loss(tokens, tokens)))(model)

    def theirs(loss):
        graphdef, params, rest = nnx.split(model, nnx.Param, ...)
        with_loss = lambda params, rest, tokens: loss(nnx.merge(graphdef, params, rest), tokens, tokens)
        return temp_bytes(jax.value_and_grad(with_loss), params, rest, tokens)

    return {
        "reversible": temp_bytes(ours, model, tokens),
        "checkpoint": theirs(checkpoint_loss),
        "stored": theirs(stored_loss),
    }
