"""`value_and_grad`: as `jax.value_and_grad`, over a module's parameters, with a report of the backward pass."""

import dataclasses
import functools
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import errors, nnx
from jax.core import Tracer

from .stack import CalledAgainError, Canary, MutatedVariableError, ReversibleStack, variables

PyTree = Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Report:
    """How a backward pass went: for each stack of the model, by its path, an array (N, 3) over its f's.

    The columns: rows of the batch whose stream was not rebuilt to the bit (the canary); elements that were not
    finite or did not fit; the largest |x|. The gradients are right where the first two are 0 everywhere.
    """

    stacks: dict[str, jax.Array]

    def __repr__(self) -> str:
        if any(isinstance(stack, Tracer) for stack in self.stacks.values()):
            return f"Report({self.stacks})"
        return f"Report(canary={self.canary:.0f}, unsafe={self.unsafe:.0f}, max_abs={self.max_abs:.4g})"

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
        """The largest |x| of any stream (for a stack that the loss calls more than once: the sum over its calls)."""
        return jnp.max(jnp.stack([jnp.zeros(()), *(jnp.max(c) for c in self._column(2))]))

    def merged(self, other: "Report") -> "Report":
        """Of two backward passes as one: counts are added, of the largest |x| the larger is taken. Works under jit."""
        both = lambda a, b: jnp.concatenate([a[:, :2] + b[:, :2], jnp.maximum(a[:, 2:], b[:, 2:])], axis=1)
        return Report(jax.tree.map(both, self.stacks, other.stacks))

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
                    # An error spreads in the direction of its pass: towards the first layer where streams are inverted.
                    first = bad[-1] if counts is wrong and stack.reverses else bad[0]
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
        "rate, and ask revjax.check whether a block returns x + f(x) instead of f(x)."
    )


def _refuse_other_than_module(model: Any) -> None:
    if not isinstance(model, nnx.Module):
        raise TypeError(
            f"The first argument must be an nnx.Module, but got {type(model).__name__}. For pure functions, use "
            "jax.value_and_grad, and pass `canary` to reversible_scan."
        )


def _call(loss_fn: Callable, model: nnx.Module, *args, **kwargs):
    before = variables(model)
    value = loss_fn(model, *args, **kwargs)
    _refuse_lost_state(model, before)
    return value


def _report(dcanaries: nnx.State) -> Report:
    return Report({".".join(map(str, path[:-1])): variable[...] for path, variable in nnx.to_flat_state(dcanaries)})


def _refuse_lost_state(model: nnx.Module, before: dict[Any, Any]) -> None:
    changed = [".".join(map(str, p)) for p, value in variables(model).items() if value is not before.get(p)]
    if changed:
        raise MutatedVariableError(
            f"The loss writes to variables of the model ({', '.join(changed)}), and what it writes would be lost: the "
            "next call would start from the old values (the same dropout mask, say). Pass keys as arguments "
            "(revjax.nn.dropout(x, rate, key)). For running statistics, let the loss call a copy, "
            "`copy = nnx.clone(model)`, and return `nnx.state(copy, nnx.BatchStat)` beside its value (has_aux=True), "
            "for nnx.update(model, ...) afterwards."
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
        _refuse_other_than_module(model)
        graphdef, canaries, params, rest = nnx.split(model, Canary, wrt, ...)

        def pure(params, canaries):
            merged = nnx.merge(graphdef, canaries, params, rest, copy=True)
            return _call(loss_fn, merged, *args, **kwargs)

        value, (grads, dcanaries) = jax.value_and_grad(pure, argnums=(0, 1), has_aux=has_aux)(params, canaries)
        return (value, _report(dcanaries)), grads

    return with_report


def value_and_add_grad(loss_fn: Callable, *, has_aux: bool = False) -> Callable:
    """As `value_and_grad`, for sums over micro-batches: of `(model, sums, *args, **kwargs)`.

    Returns `((value, report), sums + grads)`; `sums` is like `grads`, in float32 or wider. The gradients of a stack's
    layers are added one by one where the sums are, so that those of a micro-batch never exist as a whole. (Not where
    the loss calls a stack twice, or in a loop or under another transformation: there they are added afterwards.)
    """

    def with_report(model: nnx.Module, sums: nnx.State, *args, **kwargs):
        _refuse_other_than_module(model)
        try:
            return _added_in_place(loss_fn, has_aux, model, sums, *args, **kwargs)
        except (CalledAgainError, errors.TraceContextError):
            found, grads = value_and_grad(loss_fn, has_aux=has_aux)(model, *args, **kwargs)
            return found, jax.tree.map(_add, sums, grads)

    return with_report


def value_and_update(loss_fn: Callable, update: Callable, *, has_aux: bool = False) -> Callable:
    """As `value_and_grad`, and updates layers of stacks in the backward pass: their gradients never exist as a whole.

    Returns a function of `(model, states, *args, **kwargs)` that returns `((value, report), grads, layers, states)`:
    `grads` of the parameters that stand in no stack, and `layers`, the new values of those that do, each an
    `nnx.State`. XLA needs no second array for them where their old values are donated to the jitted function (on CPU
    with the compiler options of `revjax.training.step_compiler_options`).

    Args:
      update: `update(params, state, grads) -> (params, state)` for one branch of one layer. Of parameters that stay as
        they are, it returns None. No layer of a stack is updated where elements of its streams were unsafe, nor from
        the first one on that was not rebuilt to the bit; each stack is judged by itself.
      states: for each stack that stands in no other one, by its path (`stacks_of`), for each of its runs, for each
        branch of a period, a pytree of floats with a leading axis of repeats.

    Raises:
      ValueError: the loss calls a stack twice, or in a loop or under another transformation, or does not depend on it.
      TypeError: the loss reads parameters of layers otherwise than by calling the stack (a penalty on them, say).
    """

    def with_report(model: nnx.Module, states: dict[str, Any], *args, **kwargs):
        _refuse_other_than_module(model)
        of_layers = nnx.All(nnx.Param, _in_layers(model))
        graphdef, canaries, layers, params, rest = nnx.split(model, Canary, of_layers, nnx.Param, ...)

        reached = set()

        def of_stack(name: str, *args):
            reached.add(name)
            return update(*args)

        def pure(layers, params, canaries, states):
            elsewhere = jax.tree.map(_refuse_cotangent, layers)
            merged = nnx.merge(graphdef, canaries, elsewhere, params, rest, copy=True)
            for path, stack in _outermost_stacks(merged).items():
                name = ".".join(map(str, path))
                stack.layer_update = nnx.static(functools.partial(of_stack, name))
                stack.layers_updated = nnx.data((_leaves_of_runs(layers, path, stack), states[name]))
            return _call(loss_fn, merged, *args, **kwargs)

        gradient = jax.value_and_grad(pure, argnums=(0, 1, 2, 3), has_aux=has_aux)
        try:
            value, (layers, grads, dcanaries, states) = gradient(layers, params, canaries, states)
        except (CalledAgainError, errors.TraceContextError):
            raise ValueError(
                "The layers of a stack can be updated in the backward pass only where the loss calls the stack once, "
                "and not in a loop or under another transformation. Use value_and_grad."
            ) from None
        if missed := states.keys() - reached:
            raise ValueError(
                f"The loss does not depend on {', '.join(sorted(missed)) or 'the stack'} (it is not called, or under "
                "stop_gradient), so its layers cannot be updated in the backward pass. Use value_and_grad."
            )
        return (value, _report(dcanaries)), grads, layers, states

    return with_report


def _added_in_place(loss_fn, has_aux, model, sums, *args, **kwargs):
    of_layers = _in_layers(model)
    graphdef, canaries, layers, params, rest = nnx.split(model, Canary, nnx.All(nnx.Param, of_layers), nnx.Param, ...)
    sums_of_layers, sums_of_params = nnx.split_state(sums, of_layers, ...)

    def pure(layers, params, canaries, sums_of_layers):
        merged = nnx.merge(graphdef, canaries, layers, params, rest, copy=True)
        for path, stack in _outermost_stacks(merged).items():
            stack.grad_sums = nnx.data(_leaves_of_runs(sums_of_layers, path, stack))
        return _call(loss_fn, merged, *args, **kwargs)

    given = layers, params, canaries, sums_of_layers
    value, grads = jax.value_and_grad(pure, argnums=(0, 1, 2, 3), has_aux=has_aux)(*given)
    dlayers, dparams, dcanaries, new_sums = grads
    new_sums = jax.tree.map(_add, new_sums, dlayers)  # 0, but for what the loss does with them beside
    new_params = jax.tree.map(_add, sums_of_params, dparams)
    return (value, _report(dcanaries)), nnx.merge_state(new_sums, new_params)


def _in_layers(model: nnx.Module) -> Callable:
    """The filter of what stands in the layers of a stack."""
    paths = list(_outermost_stacks(model))
    return lambda path, x: any(path[: len(p) + 1] == (*p, "runs") for p in paths)


@jax.custom_vjp
def _refuse_cotangent(x: jax.Array) -> jax.Array:
    return x


def _refuse(_, dx):
    raise TypeError(
        "The loss differentiates parameters of a stack's layers otherwise than by calling the stack, but they are "
        "updated in the backward pass. Use value_and_grad."
    )


_refuse_cotangent.defvjp(lambda x: (x, None), _refuse)


def _leaves_of_runs(layers: nnx.State, path: tuple, stack: ReversibleStack) -> tuple[list[jax.Array], ...]:
    """For each run of the stack at `path`, its arrays."""
    runs = functools.reduce(operator.getitem, (*path, "runs"), layers)
    return tuple(jax.tree.leaves(runs[i]) for i in range(len(stack.runs)))


def _outermost_stacks(model: nnx.Module) -> dict[tuple, ReversibleStack]:
    """The stacks of `model` that stand in no other one, by path."""
    stacks = {tuple(path): node for path, node in nnx.iter_graph(model) if isinstance(node, ReversibleStack)}
    return {p: s for p, s in stacks.items() if not any(p != q and p[: len(q)] == q for q in stacks)}


def _add(total: jax.Array, more: jax.Array) -> jax.Array:
    return total + more.astype(total.dtype)
