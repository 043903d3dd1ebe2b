"""One step of training, as a pure function of state and batch.

    loss  = (sum of losses) / (sum of weights)        divided once, after all rows
    state = update(state, d loss / d params)          unless the gradient cannot be trusted

A gradient is not trusted where the canary or the overflow count is not 0, or where the loss or the gradient's
norm is not finite. The host reads metrics one step late, so the step itself has to refuse the update: old and
new values are both there, and `jnp.where` takes one of them.
"""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from ..models.gradients import value_and_grad
from .state import Nested, Skeleton, TrainState, to_nested

PyTree = Any
Loss = Callable[[nnx.Module, PyTree, jax.Array | None], tuple[jax.Array, jax.Array]]
OnTrouble = Literal["warn", "skip", "rewind", "stop"]


def make_train_step(
    skeleton: Skeleton,
    loss: Loss,
    optimizer: optax.GradientTransformation,
    *,
    schedule: Callable[[jax.Array], jax.Array] | None = None,
    on_trouble: OnTrouble = "skip",
) -> Callable[[TrainState, PyTree], tuple[TrainState, dict[str, Any]]]:
    """Returns `(state, batch) -> (state, metrics)`, for `jax.jit(..., donate_argnums=0)`.

    Args:
      skeleton: the module without its parameters, from `split(model)`.
      loss: `loss(model, batch, key)` returns (sum of losses, sum of weights). The key is another one at every
        step, and the same one where that step is run again.
      schedule: the learning rate by number of updates, for the metric only.
      on_trouble: "warn" updates all the same. "skip" and "stop" keep parameters and optimizer as they were.

    Metrics are scalars, but for the last: loss (mean), grad_norm (before clipping), learning_rate, canary (rows
    not rebuilt to the bit), unsafe (elements that were not finite or overflowed), max_abs (of the streams),
    trouble (whether this gradient is not to be trusted), skipped (updates left out so far), and report
    (`revjax.models.Report`, layer by layer).
    """
    if on_trouble not in ("warn", "skip", "stop"):
        raise ValueError(f"on_trouble must be 'warn', 'skip' or 'stop', but got {on_trouble!r}.")

    def train_step(state: TrainState, batch: PyTree) -> tuple[TrainState, dict[str, Any]]:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        mean_loss = lambda model: _mean(*loss(model, batch, key))
        (value, report), grads = value_and_grad(mean_loss)(skeleton.merge(state.params))
        grads = to_nested(grads)
        grad_norm = optax.tree.norm(grads)
        trouble = (report.canary != 0) | (report.unsafe != 0) | ~jnp.isfinite(value) | ~jnp.isfinite(grad_norm)
        refuse = trouble & (on_trouble != "warn")

        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        keep_old = lambda new, old: jax.tree.map(lambda n, o: jnp.where(refuse, o, n), new, old)
        skipped = state.skipped + refuse
        new_state = TrainState(
            params=keep_old(params, state.params),
            opt_state=keep_old(opt_state, state.opt_state),
            step=state.step + 1,
            skipped=skipped,
            key=state.key,
        )
        metrics = {
            "loss": value,
            "grad_norm": grad_norm,
            "canary": report.canary,
            "unsafe": report.unsafe,
            "max_abs": report.max_abs,
            "trouble": trouble,
            "skipped": skipped,
            "report": report,
        }
        if schedule is not None:
            metrics["learning_rate"] = schedule(state.step - state.skipped)
        return new_state, metrics

    return train_step


def make_eval_step(skeleton: Skeleton, loss: Loss) -> Callable[[Nested, PyTree], tuple[jax.Array, jax.Array]]:
    """Returns `(params, batch) -> (sum of losses, sum of weights)`, without randomness, for `jax.jit`."""
    return lambda params, batch: loss(skeleton.merge(params), batch, None)


def _mean(total: jax.Array, weight: jax.Array) -> jax.Array:
    return total / jnp.where(weight == 0, 1, weight)
