"""Is every stream rebuilt to the bit? For each coupling, after training, beside float streams and unpinned ones.

Branches are scaled until |x| reaches a few tens, dropout is on, and the compiler has its default flags:
errors that float streams show only after training show at once.
"""

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from ..core import Linear, parse_coupling, reversible_scan
from ..models import Decoder, DecoderConfig, value_and_grad
from ..models.stack import ReversibleStack

EXACT_COUPLINGS = ("revnet", "midpoint:0.5", "leapfrog:0.5", "momentum:0.5", "momentum:0.25", "momentum:0.0625") + tuple(
    f"{name}:{shift}" for name in ("near-residual", "bdia") for shift in (1, 2, 4)
)


def exactness_table(
    couplings=EXACT_COUPLINGS,
    *,
    num_layers: int,
    d_model: int,
    sequence_length: int,
    batch_size: int,
    steps: int = 1,
    scale_to: float = 20.0,
    learning_rate: float = 1e-4,
) -> Iterator[dict[str, float | str]]:
    """Yields for each coupling: rows rebuilt wrong and unsafe elements, summed over `steps` updates, and the largest |x|."""
    for coupling in couplings:
        config = DecoderConfig(
            num_layers=num_layers,
            d_model=d_model,
            num_heads=d_model // 32,
            dropout=0.1,
            coupling=coupling,
        )
        model = Decoder(config, rngs=nnx.Rngs(0))
        tokens = jax.random.randint(jax.random.key(1), (batch_size, sequence_length + 1), 0, 256)
        model = scaled_until(model, tokens, scale_to)
        yield {"coupling": coupling, "steps": steps} | _train(model, tokens, steps, learning_rate)


def scaled_until(model: Decoder, tokens: jax.Array, target: float) -> Decoder:
    """The model with every branch's output projection multiplied until the largest |x| passes `target`."""
    step = jax.jit(lambda model: _gradient(model, tokens, jax.random.key(2))[0][1].max_abs)
    for _ in range(12):
        if float(step(model)) >= target:
            return model
        state = nnx.state(model.stack, nnx.Param)
        grown = jax.tree_util.tree_map_with_path(lambda path, a: a * 1.5 if _is_output(path) else a, state)
        nnx.update(model.stack, grown)
    raise ValueError(f"No scale of the branches brought |x| to {target}.")


def _is_output(path) -> bool:
    return any(f"'{name}'" in str(key) for key in path for name in ("out", "down"))


def _gradient(model, tokens, key):
    loss = lambda model: jnp.divide(*model.loss(tokens[:, :-1], tokens[:, 1:], key=key))
    return value_and_grad(loss)(model)


def _train(model: Decoder, tokens: jax.Array, steps: int, learning_rate: float) -> dict[str, float]:
    optimizer = optax.adamw(learning_rate)
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    @jax.jit
    def step(params, opt_state, rest, key):
        (loss, report), grads = _gradient(nnx.merge(graphdef, params, rest), tokens, key)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, (loss, report.canary, report.unsafe, report.max_abs)

    opt_state, seen = optimizer.init(params), []
    for i in range(steps):
        params, opt_state, metrics = step(params, opt_state, rest, jax.random.fold_in(jax.random.key(3), i))
        seen.append([float(m) for m in metrics])
    loss, canary, unsafe, max_abs = np.array(seen).T
    return {
        "rows_rebuilt_wrong": canary.sum(),
        "unsafe": unsafe.sum(),
        "max_abs": max_abs.max(),
        "first_loss": loss[0],
        "last_loss": loss[-1],
    }
