"""Updates of a stack's layers inside the backward pass, each as soon as its gradient is known (arXiv:2306.09782).

    one sweep     each branch of each layer is clipped by its own norm, at clip_norm / sqrt(number of them + 1), as is
                  what stands in no layer; so the norm of what is left of all stays below clip_norm
    two sweeps    a first backward pass only adds up squares, and the second updates, clipped by the norm of all: so
                  nothing is updated by a step that is not to be trusted, and parameters go where they go otherwise

Gradients of layers never exist together. For optimizers that treat each element by itself, but for
`norms.clip_by_global_norm`; of what they decide by name, they see names from the layer on.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ..models import stacks_of, value_and_update
from .norms import KnownNorm
from .optimizer import is_decayed
from .state import Nested, Skeleton, filled, to_nested, united

PyTree = Any
Place = tuple[str, ...]  # where the parameters of a branch stand in nested dicts


class Sweep(NamedTuple):
    """What a backward pass brought.

    The norm is of all gradients, before anything is divided (where the canary is not 0, of those until then).
    """

    summed: tuple  # of losses, of weights, and further ones
    report: Any
    norm: jax.Array
    grads: Nested  # of what stands in no layer
    layers: Nested  # parameters
    moments: list[Nested]  # of the optimizer, of layers


class LayerUpdates:
    """Sweeps over one module."""

    def __init__(self, skeleton: Skeleton, loss: Callable, optimizer: optax.GradientTransformationExtraArgs):
        self.skeleton, self.loss, self.optimizer = skeleton, loss, optimizer
        stacks = stacks_of(skeleton.abstract)
        inside = lambda name: any(name != other and name.startswith(f"{other}." if other else "") for other in stacks)
        stacks = {name: stack for name, stack in stacks.items() if not inside(name)}
        if not stacks:
            raise ValueError("The model has no reversible stack, so no layers to update in the backward pass.")
        self.lengths = {name: stack.lengths for name, stack in stacks.items()}
        self.places: dict[str, list[list[Place]]] = {
            name: [
                [(*_path(name), "runs", str(i), str(j)) for j in range(len(run))] for i, run in enumerate(stack.runs)
            ]
            for name, stack in stacks.items()
        }
        params = to_nested(skeleton.params)
        in_layers = [(p, n) for name, ns in self.lengths.items() for run, n in zip(self.places[name], ns) for p in run]
        self.groups = 1 + sum(length for place, length in in_layers if _at(params, place))
        for place, _ in in_layers:
            if is_decayed(_at(params, place)) != _at(is_decayed(params), place):
                raise ValueError(
                    f"Whether parameters in {'.'.join(place)} decay depends on the name of their stack, which an "
                    "update in the backward pass does not know. Name it without norm, bias, scale, table or embedding."
                )

    def weight(self, values: Nested, batch: PyTree, key: jax.Array) -> jax.Array:
        """The sum of weights. XLA leaves out what the loss computes beside."""
        return jnp.asarray(self.loss(self.skeleton.merge(values), batch, key)[1], jnp.float32)

    def squares(self, values: Nested, batch: PyTree, key: jax.Array, scale) -> Sweep:
        """A sweep that changes nothing, for the norm."""
        return self._sweep(values, [], batch, key, scale, lambda params, moments, grads: (None, moments))

    def update(
        self, values: Nested, opt_state: PyTree, batch: PyTree, key: jax.Array, scale, factor, norm=None, refuse=False
    ) -> Sweep:
        """A sweep that updates the layers with gradients times `factor`.

        Args:
          values: all parameters.
          opt_state: of those that are trained.
          norm: of all gradients times `factor`; None clips each branch by its own.
          refuse: leave everything as it was.
        """
        state = _Cut.of_params(opt_state, self._trained(values))

        def change(params, moments, grads):
            grads = jax.tree.map(lambda g: (g * factor).astype(g.dtype), grads)
            own = jnp.sqrt(_sum_of_squares(grads))
            # The optimizer knows layers as stacked: here there is one.
            old, moved = _stacked(to_nested(params)), _stacked(to_nested(grads))
            known = KnownNorm(moved, own * math.sqrt(self.groups) if norm is None else norm)
            updates, new = self.optimizer.update(moved, state.with_moments(_stacked(moments)), old, known_norm=known)
            params_and_moments = optax.apply_updates(old, updates), state.like(new).moments
            ok = jnp.isfinite(own) & ~jnp.asarray(refuse)
            keep = lambda new, old: jnp.where(ok, new[0].astype(old.dtype), old)
            new_params, new_moments = jax.tree.map(keep, params_and_moments, (to_nested(params), moments))
            return filled(params, new_params), new_moments

        return self._sweep(values, state.moments, batch, key, scale, change)

    def finish(self, sweep: Sweep, params: Nested, opt_state: PyTree, factor, norm, refuse) -> tuple[Nested, PyTree]:
        """All parameters and the optimizer's state after the sweep, with what stands in no layer updated as well.

        Arguments as of `update`, but `params` are those that are trained.
        """
        places = [place for runs in self.places.values() for run in runs for place in run]
        state = _Cut.of_params(opt_state, params)
        rest, moments = _without(params, places), [_without(m, places) for m in state.moments]
        grads = jax.tree.map(lambda g: (g * factor).astype(g.dtype), sweep.grads)
        if norm is None:
            norm = jnp.sqrt(_sum_of_squares(grads)) * math.sqrt(self.groups)
        known = KnownNorm(grads, norm)
        old = state.with_moments(moments)
        updates, new = self.optimizer.update(grads, old, rest, known_norm=known)
        keep = lambda new, old: jax.tree.map(lambda n, o: jnp.where(refuse, o, n), new, old)
        rest, after = keep(optax.apply_updates(rest, updates), rest), state.like(keep(new, old))
        moments = [united(m, of_layers) for m, of_layers in zip(after.moments, sweep.moments, strict=True)]
        return united(rest, sweep.layers), after.with_moments(moments)

    def _trained(self, values: Nested) -> Nested:
        return self.skeleton.divide(values)[0]

    def _sweep(self, values: Nested, moments: list[Nested], batch, key, scale, change: Callable) -> Sweep:
        def scaled(model):
            total, weight, *more = self.loss(model, batch, key)
            return total * scale, (total, jnp.asarray(weight, jnp.float32), *(more or [{}]))

        def update(params, state, grads):
            of_branch, squares = state
            new_params, of_branch = change(params, of_branch, grads)
            return new_params, (of_branch, squares + _sum_of_squares(grads))

        states = {
            name: tuple(
                tuple(([_at(m, place) for m in moments], jnp.zeros(length)) for place in run)
                for run, length in zip(runs, self.lengths[name], strict=True)
            )
            for name, runs in self.places.items()
        }
        model = self.skeleton.merge(values)
        ((_, summed), report), grads, layers, states = value_and_update(scaled, update, has_aux=True)(model, states)
        grads, new_moments = to_nested(grads), [{} for _ in moments]
        squares = _sum_of_squares(grads)
        for name, runs in self.places.items():
            for places, of_run in zip(runs, states[name], strict=True):
                for place, (of_branch, of_layers) in zip(places, of_run, strict=True):
                    squares += jnp.sum(of_layers)
                    if of_branch and of_branch[0]:  # a branch may have nothing to train
                        new_moments = [united(m, _put(place, x)) for m, x in zip(new_moments, of_branch, strict=True)]
        return Sweep(summed, report, jnp.sqrt(squares), grads, to_nested(layers), new_moments)


class _Cut(NamedTuple):
    """An optimizer's state as what it has like the parameters (`moments`), and the rest (counts of updates)."""

    treedef: Any
    leaves: list[Any]
    is_moment: list[bool]

    @staticmethod
    def of_params(opt_state: PyTree, params: Nested) -> "_Cut":
        shapes = jax.tree.map(lambda a: a.shape, params)
        like_params = lambda tree: isinstance(tree, dict) and jax.tree.map(lambda a: a.shape, tree) == shapes
        leaves, treedef = jax.tree.flatten(opt_state, is_leaf=like_params)
        return _Cut(treedef, leaves, [like_params(leaf) for leaf in leaves])

    @property
    def moments(self) -> list[Any]:
        return [leaf for leaf, is_moment in zip(self.leaves, self.is_moment, strict=True) if is_moment]

    def with_moments(self, moments: list[Any]) -> PyTree:
        """The state with others in their place, of a part of the parameters."""
        others = iter(moments)
        leaves = [next(others) if is_moment else x for x, is_moment in zip(self.leaves, self.is_moment, strict=True)]
        return jax.tree.unflatten(self.treedef, leaves)

    def like(self, opt_state: PyTree) -> "_Cut":
        """Another state of this structure, of whatever parameters."""
        return self._replace(leaves=self.treedef.flatten_up_to(opt_state))


def _path(name: str) -> list[str]:
    return name.split(".") if name else []


def _at(nested: Nested, place: Place) -> Nested:
    """What stands there; nothing where a branch has no parameters."""
    for name in place:
        nested = nested.get(name, {})
    return nested


def _put(place: Place, branch: Nested) -> Nested:
    for name in reversed(place):
        branch = {name: branch}
    return branch


def _without(nested: Nested, places: list[Place]) -> Nested:
    """The nested dicts without what stands at `places`, and without dicts that are empty then."""
    kept = {}
    for name, value in nested.items():
        below = [place[1:] for place in places if place[0] == name]
        if () in below:
            continue
        value = _without(value, below) if below and isinstance(value, dict) else value
        if not (isinstance(value, dict) and not value):
            kept[name] = value
    return kept


def _stacked(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda a: a[None], tree)


def _sum_of_squares(tree: PyTree) -> jax.Array:
    return sum((jnp.sum(jnp.square(x.astype(jnp.float32))) for x in jax.tree.leaves(tree)), jnp.zeros(()))
