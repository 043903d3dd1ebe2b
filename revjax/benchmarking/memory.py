"""Memory of a gradient: reversible, beside `jax.checkpoint` per layer, beside stored.

Figures are XLA's temporary bytes of the compiled program; parameters and gradients are inputs and
outputs, and not among them. Nothing is run, so any depth can be asked for.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx

from ..core import parse_coupling
from ..memory import activation_memory, residual_stack, temp_bytes
from ..models import Decoder, DecoderConfig, value_and_grad
from ..nn import flash_attention
from ..training import (
    InBackward,
    OptimizerConfig,
    init_state,
    make_optimizer,
    make_schedule,
    make_train_step,
    split_abstract,
    step_compiler_options,
)


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

    key = jax.random.key(0) if parse_coupling(config.coupling).random else None

    def ours(model, x):
        return value_and_grad(lambda model: jnp.mean(model.stack(x, key=key) ** 2))(model)

    def theirs(model, x, *, rival):
        graphdef, params, rest = nnx.split(model, nnx.Param, ...)

        def loss(params):
            y = residual_stack(nnx.merge(graphdef, params, rest).stack, x.astype(jnp.dtype(config.dtype)), rival)
            return jnp.mean(y.astype(jnp.float32) ** 2)

        return jax.grad(loss)(params)

    return dataclasses.asdict(config) | {
        "reversible": temp_bytes(ours, model, x),
        "checkpoint": temp_bytes(functools.partial(theirs, rival="checkpoint"), model, x),
        "stored": temp_bytes(functools.partial(theirs, rival="stored"), model, x),
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class KeptConfig(MemoryConfig):
    """A coupling whose kept bytes are read from two depths: `num_layers`, and three times as many."""

    stack_only: bool = True


def kept(config: KeptConfig) -> dict[str, float | str]:
    """Bytes that stay of each token and layer until the backward pass: what memory grows by from one depth to another.

    By "reversible", "checkpoint" and "stored", from XLA's figures. What `jax.checkpoint` keeps in bf16, 2 bytes an
    element, XLA makes wide for the backward pass on a CPU, as a whole: 4 bytes there.
    """
    deep = dataclasses.replace(config, num_layers=3 * config.num_layers)
    first, last = memory(config), memory(deep)
    each = 2 * config.num_layers * config.batch_size * config.sequence_length
    slopes = {name: (float(last[name]) - float(first[name])) / each for name in ("reversible", "checkpoint", "stored")}
    return dataclasses.asdict(config) | slopes


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainStepConfig(MemoryConfig):
    """The whole training step of a decoder: gradient, clipping, AdamW, in place of the old state."""

    in_backward: InBackward | None = None  # update layers in the backward pass


def train_step(config: TrainStepConfig) -> dict[str, int | str]:
    """Temporary bytes of the step, beside those of the gradient alone and of one copy of the parameters.

    The state is donated: new parameters and moments take the place of the old ones. The gradient alone may use the
    room of its results, which in the step are temporary.
    """
    shape = (config.batch_size, config.sequence_length)
    temporary, num_params = step_temp_bytes(config.decoder(), *shape, in_backward=config.in_backward)
    return dataclasses.asdict(config) | {
        "temporary": temporary,
        "gradient": activation_memory(config.decoder(), *shape)["reversible"],
        "parameters": 4 * num_params,
    }


def step_temp_bytes(
    decoder: DecoderConfig,
    batch_size: int,
    sequence_length: int,
    plan: str = "nothing",
    in_backward: InBackward | None = None,
) -> tuple[int, int]:
    """Temporary bytes of a compiled training step with AdamW, and how many parameters it has."""
    skeleton, params = split_abstract(lambda: Decoder(decoder, plan=plan, rngs=nnx.Rngs(0)))
    optimizer = make_optimizer(OptimizerConfig(), make_schedule(OptimizerConfig(), 1000))
    state = jax.eval_shape(lambda params: init_state(params, optimizer, jax.random.key(0)), params)
    rows = jax.ShapeDtypeStruct((batch_size, sequence_length + 1), jnp.int32)

    def loss(model, rows, key):
        return model.loss(rows[:, :-1], rows[:, 1:], rows[:, 1:] > 0, key=key)  # weights are known when it runs

    step = make_train_step(skeleton, loss, optimizer, in_backward=in_backward)
    options = step_compiler_options(jax.default_backend())
    found = temp_bytes(step, state, rows, donate_argnums=0, compiler_options=options)
    return found, sum(p.size for p in jax.tree.leaves(params))


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Causal attention by itself, with its gradient."""

    sequence_length: int
    num_heads: int = 4
    head_dim: int = 64
    dtype: str = "bfloat16"


def attention(config: AttentionConfig) -> dict[str, int | str]:
    """Temporary bytes of the gradient of blockwise attention."""
    x = jax.ShapeDtypeStruct((1, config.sequence_length, config.num_heads, config.head_dim), jnp.dtype(config.dtype))
    loss = lambda q, k, v: jnp.mean(flash_attention(q, k, v, causal=True).astype(jnp.float32) ** 2)
    return dataclasses.asdict(config) | {"temporary": temp_bytes(jax.grad(loss, (0, 1, 2)), x, x, x)}
