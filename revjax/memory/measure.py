"""How much memory a gradient needs, asked of XLA: it compiles the program and says, without running it."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ..core import parse_coupling
from ..core.plan import Plan
from ..models import DecoderConfig, ModelConfig, example_batch, loss_of, make_model, value_and_grad
from .baseline import as_residual


def options_to_measure(backend: str) -> dict[str, Any]:
    """What to compile a program with that is asked for its memory, and not run: `.compile(compiler_options=...)`.

    Buffers are laid out before machine code is made, which need not be good then. On CPU, decoders and
    encoder-decoders, reversible, checkpointed and stored, had the same bytes in half of the time.
    """
    return {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True} if backend == "cpu" else {}


def temp_bytes(
    f: Callable, *args, donate_argnums: int | tuple[int, ...] = (), compiler_options: dict[str, Any] | None = None
) -> int:
    """The temporary bytes of `f` as XLA compiles it for this device: what exists beside inputs and outputs.

    `args` may be abstract (jax.ShapeDtypeStruct), so nothing is allocated. Outputs take the place of
    arguments in `donate_argnums`.
    """
    lowered = jax.jit(f, donate_argnums=donate_argnums).lower(*args)
    options = options_to_measure(jax.default_backend()) | (compiler_options or {})
    analysis = lowered.compile(compiler_options=options).memory_analysis()
    assert analysis is not None, "XLA tells no memory on this backend"
    return analysis.temp_size_in_bytes


def activation_memory(
    config: ModelConfig, batch_size: int, sequence_length: int, *, plan: Plan = "nothing"
) -> dict[str, int]:
    """Temporary bytes of the loss's gradient: reversible, beside `jax.checkpoint` per layer, beside stored.

    Parameters and gradients are inputs and outputs, and not counted, nor is dropout. Compiles three programs (seconds
    each). Of images, `sequence_length` says nothing.

    Returns:
      Bytes by "reversible", "checkpoint" and "stored".
    """
    config = dataclasses.replace(config, dropout=0.0, attention_dropout=0.0, stochastic_depth=0.0)
    key = jax.random.key(0) if parse_coupling(config.coupling).random else None
    model = nnx.eval_shape(lambda: make_model(config, plan=plan, rngs=nnx.Rngs(0)))
    if isinstance(config, DecoderConfig):
        batch: Any = jax.ShapeDtypeStruct((batch_size, sequence_length), jnp.int32)
        loss = lambda model, tokens, key=None: jnp.divide(*model.loss(tokens, tokens, key=key))
    else:
        batch = example_batch(config, batch_size, sequence_length)
        loss = lambda model, batch, key=None: jnp.divide(*loss_of(config)(model, batch, key)[:2])

    def ours(model, batch):
        return value_and_grad(lambda model: loss(model, batch, key))(model)

    def theirs(rival):
        graphdef, params, rest = nnx.split(model, nnx.Param, ...)
        with_loss = lambda params, rest, batch: loss(as_residual(nnx.merge(graphdef, params, rest), rival), batch)
        return temp_bytes(jax.value_and_grad(with_loss), params, rest, batch)

    return {
        "reversible": temp_bytes(ours, model, batch),
        "checkpoint": theirs("checkpoint"),
        "stored": theirs("stored"),
    }
