"""How near costs that are counted by hand come to those of compiled training steps, drawn at random."""

import dataclasses
import random
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ..memory import step_cost, temp_bytes
from ..models import Decoder, DecoderConfig, num_params
from ..training import (
    OptimizerConfig,
    init_state,
    make_optimizer,
    make_schedule,
    make_train_step,
    split,
    step_compiler_options,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CostConfig:
    """A decoder, a batch and a plan."""

    num_layers: int
    d_model: int
    num_heads: int
    vocab_size: int
    dtype: str
    loss_tile: int
    sequence_length: int
    batch_size: int
    plan: str

    def decoder(self) -> DecoderConfig:
        fields = {f.name for f in dataclasses.fields(DecoderConfig)}
        return DecoderConfig(**{k: v for k, v in dataclasses.asdict(self).items() if k in fields})


def draw(seed: int, n: int) -> list[CostConfig]:
    """Returns `n` configurations, of which none has more than 2**27 elements in its streams over all layers."""
    rng, found = random.Random(seed), []
    while len(found) < n:
        head, heads = rng.choice([32, 64]), rng.choice([2, 4, 6, 8, 12])
        config = CostConfig(
            num_layers=rng.choice([6, 12, 24, 48]),
            d_model=head * heads,
            num_heads=heads,
            vocab_size=rng.choice([256, 1024, 8192, 32_000]),
            dtype=rng.choice(["bfloat16", "float32"]),
            loss_tile=rng.choice([256, 1024]),
            sequence_length=rng.choice([256, 512, 1000, 2048, 4096]),
            batch_size=rng.choice([1, 2, 4]),
            plan=rng.choice(["nothing", "attention", "all"]),
        )
        if config.num_layers * config.batch_size * config.sequence_length * config.d_model <= 2**27:
            found.append(config)
    return found


def cost(config: CostConfig) -> dict[str, float | str]:
    """Temporary bytes of a training step with AdamW: counted, compiled, and how far the count is off."""
    decoder = config.decoder()
    model = nnx.eval_shape(lambda: Decoder(decoder, plan=config.plan, rngs=nnx.Rngs(0)))
    size = num_params(model)
    skeleton, params = split(model)
    optimizer = make_optimizer(OptimizerConfig(), make_schedule(OptimizerConfig(), 1000))
    state = jax.eval_shape(lambda params: init_state(params, optimizer, jax.random.key(0)), params)
    rows = jax.ShapeDtypeStruct((config.batch_size, config.sequence_length + 1), jnp.int32)
    step = make_train_step(skeleton, _next_token_loss, optimizer)
    options = step_compiler_options(jax.default_backend())
    compiled = temp_bytes(step, state, rows, donate_argnums=0, compiler_options=options)
    shape = (config.batch_size, config.sequence_length)
    counted = step_cost(decoder, *shape, plan=config.plan, num_params=size, state_bytes=0)
    return {
        "highest": counted.highest,
        "counted": counted.bytes,
        "compiled": compiled,
        "gradients": 4 * size,
        "off": counted.bytes / compiled - 1,
    }


def _next_token_loss(model: Any, rows: jax.Array, key: jax.Array | None):
    return model.loss(rows[:, :-1], rows[:, 1:], key=key)
