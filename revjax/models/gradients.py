"""`value_and_grad`: as `jax.value_and_grad`, over a module's parameters, with a report of the backward pass."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from .stack import Canary, ReversibleStack

PyTree = Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Report:
    """How a backward pass went: for each stack of the model, by its path, an array (N, 3) over its f's.

    The columns: rows of the batch whose stream was not rebuilt to the bit (the canary); elements that were not
    finite or did not fit; the largest |x|. The gradients are right where the first two are 0 everywhere.
    """

    stacks: dict[str, jax.Array]

    def _column(self, i: int) -> list[jax.Array]:
        return [stack[:, i] for stack in self.stacks.values()]

    @property
    def canary(self) -> jax.Array:
        """How many rows of a stream were not rebuilt to the bit, over all f's. 0, or the gradients are wrong."""
        return sum((jnp.sum(c) for c in self._column(0)), jnp.zeros(()))

    @property
    def unsafe(self) -> jax.Array:
        """How many elements of the streams were not finite or overflowed, over all f's."""
        return sum((jnp.sum(c) for c in self._column(1)), jnp.zeros(()))

    @property
    def max_abs(self) -> jax.Array:
        """The largest |x| of any stream."""
        return jnp.max(jnp.stack([jnp.zeros(()), *(jnp.max(c) for c in self._column(2))]))

    def describe(self, model: nnx.Module) -> str:
        """Says in words which layers of `model` went wrong; "" if none did. Reads the arrays: not under jit."""
        lines = []
        for path, stack in stacks_of(model).items():
            wrong, unsafe, max_abs = jax.device_get(self.stacks[path]).T
            for counts, what, unit, advice in (
                (wrong, "was not rebuilt to the bit", "rows", "The gradients of this step are wrong."),
                (unsafe, "was not finite or overflowed", "elements", _overflow_advice(stack)),
            ):
                bad = [i for i in range(len(counts)) if counts[i]]
                if bad:
                    first = bad[-1] if counts is wrong else bad[0]  # an error spreads in the direction of its pass
                    lines.append(
                        f"{path or 'stack'}: the stream {what} in {len(bad)} of {len(counts)} branches, first in "
                        f"{stack.names[first]} ({counts[first]:.0f} {unit}; largest |x| {max_abs.max():.4g}). {advice}"
                    )
        return "\n".join(lines)


def _overflow_advice(stack: ReversibleStack) -> str:
    limit = 2.0 ** (31 - stack.fraction_bits)
    return (
        f"Streams hold |x| < {limit:.0f} with fraction_bits={stack.fraction_bits}. If |x| is meant to be that large, "
        f"set fraction_bits={max(stack.fraction_bits - 3, 1)}; if it is NaN or grows without bound, lower the learning "
        "rate."
    )


def stacks_of(model: nnx.Module) -> dict[str, ReversibleStack]:
    """The reversible stacks inside `model`, by path ("" is the model itself)."""
    nodes = nnx.iter_graph(model)
    return {".".join(map(str, path)): node for path, node in nodes if isinstance(node, ReversibleStack)}


def value_and_grad(loss_fn: Callable, *, has_aux: bool = False, wrt: Any = nnx.Param) -> Callable:
    """Like `jax.value_and_grad(loss_fn, has_aux=has_aux)` for a function of a module, and checks itself.

    Returns a function of `(model, *args, **kwargs)` that returns `((value, report), grads)`: `value` is
    what `jax.value_and_grad` would return, `grads` an `nnx.State` of the parameters (as `nnx.Optimizer` and
    optax take it), `report` a `Report` of every reversible stack in the model. It never jits: do that
    around it.

    Args:
      loss_fn: `loss_fn(model, *args, **kwargs)` returns a scalar, or (scalar, aux).
      wrt: which variables to differentiate, an nnx filter.

    Example:
      >>> @jax.jit
      ... def train_step(model, x, y):
      ...     loss_fn = lambda model: jnp.mean((model(x) - y) ** 2)
      ...     (loss, report), grads = revjax.value_and_grad(loss_fn)(model)
      ...     return loss, report.canary, grads
    """

    def with_report(model: nnx.Module, *args, **kwargs):
        if not isinstance(model, nnx.Module):
            raise TypeError(
                f"The first argument must be an nnx.Module, but got {type(model).__name__}. For pure functions, use "
                "jax.value_and_grad, and pass `canary` to reversible_scan."
            )
        graphdef, params, canaries, rest = nnx.split(model, wrt, Canary, ...)

        def pure(params, canaries):
            return loss_fn(nnx.merge(graphdef, params, canaries, rest, copy=True), *args, **kwargs)

        value, (grads, dcanaries) = jax.value_and_grad(pure, argnums=(0, 1), has_aux=has_aux)(params, canaries)
        flat = {".".join(map(str, path[:-1])): variable[...] for path, variable in nnx.to_flat_state(dcanaries)}
        return (value, Report(flat)), grads

    return with_report
