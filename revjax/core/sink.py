"""Where the gradients of parameters go, as the backward pass comes to them layer by layer.

    Gradients    into an array like the parameters
    Sums         added to arrays of the caller's, so that the gradients of a micro-batch never exist as a whole
    Updates      into the parameters, by a function of the caller's, so that gradients never exist as a whole

A sink has `totals` for each run, which the loop over its layers carries along.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from .trace import combine, partition

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Gradients:
    """An array of zeros for each parameter's, which does not exist before the backward pass does."""

    def start(self, run: int, params: PyTree, x: jax.Array, before: PyTree) -> PyTree:
        """The totals of a run before its last layer.

        `x` is a float that only the backward pass knows; `before`, the totals of the run after it, if there is one.
        """
        return zeros_once_known(partition(params)[0], x)

    def put(self, totals: PyTree, j: int, layer: jax.Array, params: PyTree, grads: PyTree) -> PyTree:
        """The totals with the gradients of f number j of one layer, which has these parameters."""
        return _with(totals, j, jax.tree.map(functools.partial(_put, layer), totals[j], grads))

    def saw(self, totals: PyTree, wrong: jax.Array) -> PyTree:
        """Told how many rows of a stream were rebuilt wrong, before anything that was computed from it is put."""
        return totals

    def params(self, totals: PyTree, params: PyTree) -> PyTree:
        """The parameters that the layers which are still to come read."""
        return params

    def results(self, totals: Sequence[PyTree], floats: Sequence[PyTree]) -> tuple[PyTree, PyTree]:
        """What is told as gradients of the parameters (their `floats`), and of what the caller gave, of all runs."""
        return totals, None


@dataclasses.dataclass(frozen=True)
class Sums(Gradients):
    """Arrays like the parameters, for each run."""

    sums: Sequence[PyTree]

    def start(self, run, params, x, before):
        return self.sums[run]

    def put(self, totals, j, layer, params, grads):
        return _with(totals, j, jax.tree.map(functools.partial(_add_at, layer), totals[j], grads))

    def results(self, totals, floats):
        return jax.tree.map(jnp.zeros_like, floats), totals


@dataclasses.dataclass(frozen=True)
class Updates(Gradients):
    """The parameters of each run and a state beside them, changed in place.

    Totals: (whether updates are allowed, for each f (parameters, state)). Where `update` returns None for parameters,
    these stay as they are, and None stands in the totals. Nothing is changed where the forward pass was `unsafe`, nor
    from the first stream on that was not rebuilt to the bit.
    """

    update: Callable[[PyTree, PyTree, PyTree], tuple[PyTree, PyTree]]
    states: Sequence[Sequence[PyTree]]
    unsafe: jax.Array

    def start(self, run, params, x, before):
        allowed = self.unsafe == 0 if before is None else before[0]
        of_fns = zip(partition(params)[0], self.states[run], strict=True)
        return allowed, tuple((p if self._moves(p, state) else None, state) for p, state in of_fns)

    def _moves(self, params, state) -> bool:
        one = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), (params, state))
        return jax.eval_shape(self.update, *one, one[0])[0] is not None

    def put(self, totals, j, layer, params, grads):
        allowed, of_fns = totals
        params, _ = partition(params)
        state = jax.tree.map(functools.partial(_at, layer), of_fns[j][1])
        old = (None if of_fns[j][0] is None else params, state)
        grads = jax.tree.map(lambda g, p: g.astype(p.dtype), grads, params)  # as they are in an array of their own
        new = self.update(params, state, grads)
        new = jax.tree.map(lambda n, o: jnp.where(allowed, n.astype(o.dtype), o), new, old)
        return allowed, _with(of_fns, j, jax.tree.map(functools.partial(_put, layer), of_fns[j], new))

    def saw(self, totals, wrong):
        return totals[0] & (jnp.sum(wrong) == 0), totals[1]

    def params(self, totals, params):
        floats, others = partition(params)
        return combine(tuple(f if new is None else new for f, (new, _) in zip(floats, totals[1], strict=True)), others)

    def results(self, totals, floats):
        zeros = jax.tree.map(jnp.zeros_like, floats)
        dparams = tuple(
            tuple(z if p is None else p for (p, _), z in zip(of_fns, of_run, strict=True))
            for (_, of_fns), of_run in zip(totals, zeros, strict=True)
        )
        return dparams, tuple(tuple(state for _, state in of_fns) for _, of_fns in totals)


def zeros_once_known(tree: PyTree, x: jax.Array) -> PyTree:
    """Zeros like the arrays of a tree, which XLA cannot make before x, a float, is there.

    Zeros of nothing it would make before the forward pass, and have them all the while.
    """
    bits = jax.lax.bitcast_convert_type(x[(0,) * x.ndim].astype(jnp.float32), jnp.int32)
    zero = jnp.minimum(bits & 1, 0)
    return jax.tree.map(lambda a: jnp.broadcast_to(zero.astype(a.dtype), a.shape), tree)


def _with(items: Sequence, j: int, item: Any) -> tuple:
    return (*items[:j], item, *items[j + 1 :])


def _at(i: jax.Array, whole: jax.Array) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(whole, i, 0, keepdims=False)


def _put(i: jax.Array, whole: jax.Array, part: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(whole, part.astype(whole.dtype), i, 0)


def _add_at(i: jax.Array, whole: jax.Array, part: jax.Array) -> jax.Array:
    return _put(i, whole, _at(i, whole) + part.astype(whole.dtype))
