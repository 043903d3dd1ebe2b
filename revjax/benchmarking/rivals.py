"""Plans of revjax and forms of `jax.checkpoint` in one table: memory and time of a decoder's gradient.

Each is timed in pairs with plan "nothing" (see `speed`), so that rows can be compared: what counts is the ratio.
Memory is temporary bytes and results together: a program may use the room of its results before it writes them.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ..memory import RIVALS, residual_loss
from ..models import Decoder, DecoderConfig, value_and_grad
from .speed import interval, paired

PLANS = ("nothing", "attention", "all")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RivalConfig:
    """One way to a gradient: "revjax nothing", ..., or one of the rivals of `revjax.memory.baseline`."""

    way: str
    num_layers: int
    d_model: int
    sequence_length: int
    batch_size: int
    vocab_size: int
    dtype: str
    pairs: int = 7

    def decoder(self) -> DecoderConfig:
        return DecoderConfig(
            num_layers=self.num_layers,
            d_model=self.d_model,
            num_heads=max(1, self.d_model // 64),
            vocab_size=self.vocab_size,
            dtype=self.dtype,  # pyright: ignore[reportArgumentType]
            loss_tile=256,
        )


def ways(**shape) -> list[RivalConfig]:
    """All plans and rivals for one shape."""
    names = [f"revjax {plan}" for plan in PLANS] + list(RIVALS)
    return [RivalConfig(way=name, **shape) for name in names]


def rival(config: RivalConfig, *, seed: int = 0) -> dict[str, float | str]:
    """Measures one way: bytes beside its parameters, seconds of a step, and its time over that of plan "nothing"."""
    size = (config.batch_size, config.sequence_length)
    tokens = jax.random.randint(jax.random.key(seed), size, 0, config.vocab_size)
    ours, theirs = (_compiled(config, way, tokens, seed) for way in ("revjax nothing", config.way))
    (seconds, theirs_s), ratios = paired(ours.run, theirs.run, config.pairs)
    low, high = interval(1 / ratios, seed)
    return {
        "bytes": theirs.bytes,
        "seconds": theirs_s,
        "nothing_s": seconds,
        "to_nothing": float(np.median(1 / ratios)),
        "to_nothing_low": low,
        "to_nothing_high": high,
    }


@dataclasses.dataclass(frozen=True)
class _Program:
    run: Callable
    bytes: int


def _compiled(config: RivalConfig, way: str, tokens: jax.Array, seed: int) -> _Program:
    ours = way.startswith("revjax ")
    model = Decoder(config.decoder(), plan=way.removeprefix("revjax ") if ours else "nothing", rngs=nnx.Rngs(seed))
    program = jax.jit(gradient_of(way)).lower(model, tokens).compile()
    analysis = program.memory_analysis()
    assert analysis is not None, "XLA tells no memory on this backend"
    return _Program(
        lambda: jax.block_until_ready(program(model, tokens)),
        analysis.temp_size_in_bytes + analysis.output_size_in_bytes,
    )


def gradient_of(way: str) -> Callable:
    """(model, tokens) -> ((loss, report), gradients) of revjax; (loss, gradients) of a rival."""
    return _ours if way.startswith("revjax ") else functools.partial(_theirs, way)


def _ours(model: Decoder, tokens: jax.Array):
    return value_and_grad(lambda m: jnp.divide(*m.loss(tokens, tokens)))(model)


def _theirs(way: str, model: Decoder, tokens: jax.Array):
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    loss = lambda params: residual_loss(nnx.merge(graphdef, params, rest), tokens, tokens, way)
    return jax.value_and_grad(loss)(params)
