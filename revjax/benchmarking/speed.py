"""How long a gradient takes, beside `jax.checkpoint` under `lax.scan` and beside stored activations.

Runs are paired: ours, theirs, ours, theirs ..., and what counts is the ratio within a pair, so that a
machine that slows down slows both. Reported are the median ratio and a 95 % bootstrap interval, beside
the ratio of FLOPs: reversing runs each layer's last product again, which `jax.checkpoint` leaves out.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ..memory import checkpoint_loss, in_turn, stored_loss
from ..models import Decoder, DecoderConfig, hardware_flops_per_token, value_and_grad


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpeedConfig:
    """One shape to time."""

    num_layers: int
    d_model: int
    sequence_length: int
    batch_size: int
    dtype: str
    coupling: str = "revnet"
    pairs: int = 15

    def decoder(self) -> DecoderConfig:
        return DecoderConfig(
            num_layers=self.num_layers,
            d_model=self.d_model,
            num_heads=max(1, self.d_model // 64),
            dtype=self.dtype,  # pyright: ignore[reportArgumentType]
            coupling=self.coupling,
            loss_tile=1024,
        )


def speed(shape: SpeedConfig, *, seed: int = 0) -> dict[str, float | str]:
    """Times one shape: median ratios of step time with their 95 % intervals, beside the ratio of FLOPs."""
    config = shape.decoder()
    model = Decoder(config, rngs=nnx.Rngs(seed))
    tokens = jax.random.randint(
        jax.random.key(seed), (shape.batch_size, shape.sequence_length + 1), 0, config.vocab_size
    )
    steps = {name: jax.jit(step) for name, step in _steps().items()}
    run = {name: functools.partial(_finish, step, model, tokens) for name, step in steps.items()}
    canary = float(run["reversible"]()[0][1].canary)
    row = dataclasses.asdict(shape) | {"canary": canary, "flop_ratio": flop_ratio(config, shape.sequence_length)}
    for rival in ("checkpoint", "stored"):
        seconds, ratios = paired(run["reversible"], run[rival], shape.pairs)
        low, high = interval(ratios, seed)
        row |= {f"{rival}_s": seconds[1], "reversible_s": seconds[0]}
        row |= {f"to_{rival}": float(np.median(ratios)), f"to_{rival}_low": low, f"to_{rival}_high": high}
    return row


def _finish(step, *args):
    return jax.block_until_ready(step(*args))


def _steps() -> dict[str, Callable]:
    def ours(model, tokens):
        return value_and_grad(lambda m: jnp.divide(*m.loss(tokens[:, :-1], tokens[:, 1:])))(model)

    def theirs(loss):
        def step(model, tokens):
            graphdef, params, rest = nnx.split(model, nnx.Param, ...)
            of_params = lambda params: loss(nnx.merge(graphdef, params, rest), tokens[:, :-1], tokens[:, 1:])
            return jax.value_and_grad(of_params)(params)

        return step

    return {"reversible": ours, "checkpoint": theirs(checkpoint_loss), "stored": theirs(stored_loss)}


def paired(a: Callable, b: Callable, pairs: int) -> tuple[tuple[float, float], np.ndarray]:
    """Median seconds of `a` and of `b`, and the ratio a / b of each pair; both are run once before."""
    seconds = in_turn([a, b], pairs)
    return (float(np.median(seconds[:, 0])), float(np.median(seconds[:, 1]))), seconds[:, 0] / seconds[:, 1]


def interval(ratios: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """A 95 % bootstrap interval of the median."""
    draws = np.random.default_rng(seed).choice(ratios, (2000, len(ratios)))
    low, high = np.quantile(np.median(draws, axis=1), (0.025, 0.975))
    return float(low), float(high)


def flop_ratio(config: DecoderConfig, sequence_length: int) -> float:
    """FLOPs of a reversible step over those of `jax.checkpoint` per layer, per token, counted by hand.

    Remat does what reversing does, less each layer's last product, whose result its backward pass does not need.
    """
    reversible = hardware_flops_per_token(config, sequence_length, "nothing")
    last_product = 2 * config.d_model * config.mlp_width
    return reversible / (reversible - config.num_layers * last_product)
