"""Are the gradients right? Those of a whole decoder, beside the same rounded network with stored activations.

The floor is what the same arithmetic, compiled twice, differs by: the stored run beside its `jax.checkpoint` form.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ..models import Decoder, DecoderConfig, value_and_grad


@dataclasses.dataclass(frozen=True, kw_only=True)
class GradientsConfig:
    """One decoder, with dropout."""

    coupling: str
    dtype: str
    num_layers: int
    d_model: int
    sequence_length: int
    batch_size: int


def gradients(config: GradientsConfig) -> dict[str, float | str]:
    """Relative distances between gradients, and how many of their elements are not bit-equal.

    Returns `to_stored` (reversible beside stored) and `floor` (stored beside its `jax.checkpoint` form), each with
    the share of elements that differ, whether the losses are equal to the bit, and the canary.
    """
    decoder = DecoderConfig(
        num_layers=config.num_layers,
        d_model=config.d_model,
        num_heads=config.d_model // 32,
        dropout=0.1,
        coupling=config.coupling,
        dtype=config.dtype,  # pyright: ignore[reportArgumentType]
    )
    shape = (config.batch_size, config.sequence_length + 1)
    tokens = jax.random.randint(jax.random.key(1), shape, 0, decoder.vocab_size)

    def of(plan: str, *, checkpoint: bool = False):
        model = Decoder(decoder, plan=plan, rngs=nnx.Rngs(0))
        loss = lambda model: jnp.divide(*model.loss(tokens[:, :-1], tokens[:, 1:], key=jax.random.key(2)))
        step = value_and_grad(_checkpointed(loss) if checkpoint else loss)
        return jax.jit(step)(model)

    (loss, report), ours = of("nothing")
    (stored_loss, _), stored = of("all")
    _, again = of("all", checkpoint=True)
    return dataclasses.asdict(config) | {
        "to_stored": distance(ours, stored),
        "to_stored_unequal": unequal(ours, stored),
        "floor": distance(again, stored),
        "floor_unequal": unequal(again, stored),
        "losses_equal": float(loss == stored_loss),
        "canary": float(report.canary),
    }


def _checkpointed(loss):
    """`jax.checkpoint` of a function of a module."""

    def recomputed(model):
        graphdef, state = nnx.split(model)
        return jax.checkpoint(lambda state: loss(nnx.merge(graphdef, state)))(state)

    return recomputed


def distance(a, b) -> float:
    """|a - b| / |b| over all leaves."""
    a, b = _flat(a), _flat(b)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def unequal(a, b) -> float:
    """The share of elements that are not equal to the bit."""
    return float(np.mean(_flat(a) != _flat(b)))


def _flat(tree) -> np.ndarray:
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)]).astype(np.float64)
