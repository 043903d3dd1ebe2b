"""Is this loss far above those before it?

    mean, square   running means of the loss and its square, over about MEMORY steps
    a spike        loss > mean + sigmas sqrt(square - mean^2)            once MEMORY losses were seen

A spike enters the running means as the threshold that it passed: a single one moves them little, and a loss that
stays high (other data) is accepted after a while, so that training cannot stand still for ever.
"""

import jax
import jax.numpy as jnp

MEMORY = 64  # steps


def init_spikes() -> dict[str, jax.Array]:
    """Nothing was seen yet."""
    return {"mean": jnp.float32(0), "square": jnp.float32(0), "seen": jnp.int32(0)}


def find_spike(state: dict[str, jax.Array], loss: jax.Array, sigmas: float) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns whether `loss` is a spike, and the state after it.

    A loss that is not finite is no spike, and is left out.
    """
    deviation = jnp.sqrt(jnp.maximum(state["square"] - state["mean"] ** 2, 0))
    # Not less than a thousandth of the loss: losses that barely move have no spikes.
    limit = state["mean"] + sigmas * jnp.maximum(deviation, 1e-3 * jnp.abs(state["mean"]))
    is_spike = (state["seen"] >= MEMORY) & (loss > limit) & jnp.isfinite(loss)
    x = jnp.where(is_spike, limit, loss)
    weight = jnp.maximum(1 / (state["seen"] + 1.0), 1 / MEMORY)  # of this loss: a plain mean at first
    after = {
        "mean": state["mean"] + weight * (x - state["mean"]),
        "square": state["square"] + weight * (x**2 - state["square"]),
        "seen": jnp.minimum(state["seen"] + 1, MEMORY),
    }
    return is_spike, jax.tree.map(lambda new, old: jnp.where(jnp.isfinite(loss), new, old), after, state)
