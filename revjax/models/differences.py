"""The gradient of a model beside finite differences, in float64: the part of `check` that knows no autodiff."""

from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from .stack import ReversibleStack

PyTree = Any
DIFFERENCES_TOLERANCE, FLOAT32_DIFFERENCES_TOLERANCE = 1e-6, 1e-2  # in float64, or where a branch casts to less
LEAST_SHARE = 1e-2  # of the whole derivative, that the error of one array's is relative to where it is smaller


def check_against_differences(
    run: Callable,
    model: nnx.Module,
    example: PyTree,
    key: jax.Array | None,
    inputs: dict[str, PyTree],
    faults: list[str],
    notes: list[str],
    *,
    casting: Callable[[Callable], list[str]],
) -> float | None:
    """d(e) = (loss(p + e v) - loss(p - e v)) / 2e against <gradient, v>, in float64, for one direction v.

    d is off by a multiple of e^2, which (4 d(e / 2) - d(e)) / 3 is not (Richardson), by kinks (those of relu) that lie
    within e of p, and by rounding / e: so it is taken at many e, and the nearest counts. v is as large as the
    parameters, each in its place. Then the same for each array of p by itself, so that none hides behind others. Where
    a stack is checked by itself, p has x and the context in it.

    Args:
      run: `run(model, example, key, inputs)` is the loss.
      faults, notes: what is found is added to them.
      casting: says what, in a loss, gives less precise floats than it takes.

    Returns the largest relative error, or None where it could not be compared.
    """
    with jax.enable_x64(True):
        model64 = _in_float64(model)
        example, inputs = jax.tree.map(_to_float64, (example, inputs))
        graphdef, params, rest = nnx.split(model64, nnx.Param, ...)
        others = {"x": example, "context": inputs.get("context")} if isinstance(model, ReversibleStack) else {}
        paths, structure = jax.tree.flatten_with_path((params, others))
        names = [name_of(path[1:]) for path, _ in paths]
        start = [jnp.asarray(leaf) for _, leaf in paths]
        moving = [i for i, leaf in enumerate(start) if jnp.issubdtype(leaf.dtype, jnp.floating)]

        def loss(moved):
            leaves = list(start)
            for i, leaf in zip(moving, moved, strict=True):
                leaves[i] = leaf
            params, others = jax.tree.unflatten(structure, leaves)
            context = {"context": others["context"]} if others.get("context") is not None else {}
            return run(nnx.merge(graphdef, params, rest, copy=True), others.get("x", example), key, inputs | context)

        here = [start[i] for i in moving]
        try:
            if low_precision(loss, here):
                notes.append(
                    "Not checked against finite differences: a branch computes in low precision whatever its dtype."
                )
                return None
        except (TypeError, ValueError) as error:
            notes.append(f"Not checked against finite differences: it does not run in float64 ({_first_line(error)}).")
            return None
        rng = np.random.default_rng(0)
        direction = [_direction(p, rng) for p in here]
        grads = jax.jit(jax.grad(loss))(here)
        slopes = np.array([float(jnp.vdot(g, v)) for g, v in zip(grads, direction, strict=True)])
        at = jax.jit(lambda e: loss([p + e_i * v for p, e_i, v in zip(here, e, direction, strict=True)]))

        def error_along(which: np.ndarray, good_enough: float = 0.0, least: float = 1e-12) -> float:
            """Of the derivative where the arrays of `which` (1 or 0 for each) move, relative to it or to `least`."""
            difference = lambda e: float(at(e * which) - at(-e * which)) / (2 * e)
            nearest = np.inf
            for e in 10.0 ** -np.arange(2, 9):
                numeric = (4 * difference(e / 2) - difference(e)) / 3
                nearest = np.fmin(nearest, abs(numeric - slopes @ which) / max(abs(numeric), least))  # not a NaN's
                if nearest <= good_enough:
                    break
            return float(nearest)

        error = error_along(np.ones(len(here)))
        least = LEAST_SHARE * float(np.linalg.norm(slopes))
        each = lambda j: error_along(np.eye(len(here))[j], DIFFERENCES_TOLERANCE, least)
        alone = {names[i]: each(j) for j, i in enumerate(moving)}
        strictly = max([error, *alone.values()]) <= DIFFERENCES_TOLERANCE
        casts = [] if strictly else casting(lambda: loss(here))
        tolerance = FLOAT32_DIFFERENCES_TOLERANCE if casts else DIFFERENCES_TOLERANCE
        wrong = {name: error for name, error in alone.items() if not error <= tolerance}
        error = max([error, *(alone if casts else wrong).values()])  # near float32's roundings one may be near by luck
        stops = not error <= tolerance and "stop_gradient" in str(jax.make_jaxpr(loss)(here))
    if casts:
        notes.append(
            f"Differences are no more precise than float32 ({', '.join(casts)}: cast to it, whatever comes in). "
            "With x.astype(jnp.promote_types(x.dtype, jnp.float32)) instead of x.astype(jnp.float32) they are."
        )
    if not error <= tolerance:
        faults.append(
            f"The gradient of {listed(list(wrong)) or 'all together'} differs from finite differences by {error:.1e} "
            f"(float64; at most {tolerance:.0e}). Is a derivative of its own (jax.custom_vjp) wrong, or rounded? (Of "
            "many millions of activations with kinks, as relu's, some are always met: ask with a smaller example.)"
            + (" (Where stop_gradient is meant to give another derivative, check cannot tell.)" if stops else "")
        )
    return error


def _direction(p: jax.Array, rng: np.random.Generator) -> jax.Array:
    """As large as p; of zeros, a tenth."""
    size = jnp.sqrt(jnp.mean(p**2))
    return jnp.asarray(rng.standard_normal(p.shape)) * jnp.where(size > 0, size + 1e-3, 0.1)


def name_of(path) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")


def listed(names: list[str], most: int = 4) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def low_precision(run: Callable, *args) -> bool:
    text = str(jax.make_jaxpr(run)(*args))
    return "bf16[" in text or "f16[" in text


def _in_float64(model: nnx.Module) -> nnx.Module:
    """A copy on float streams, with parameters and, where a module says its dtype, computation in float64."""
    graphdef, state = nnx.split(model)
    copy = nnx.merge(graphdef, jax.tree.map(_to_float64, state), copy=True)
    for _, node in nnx.iter_graph(copy):
        if isinstance(node, ReversibleStack):
            # The inverse of float streams drifts, and what is asked here is the gradient.
            node.exact, node.plan = False, "all"
        if isinstance(node, nnx.Module) and getattr(node, "dtype", None) is not None:
            cast(Any, node).dtype = jnp.dtype("float64")
    return copy


def _to_float64(a):
    is_float = isinstance(a, (jax.Array, np.ndarray)) and jnp.issubdtype(a.dtype, jnp.floating)
    return a.astype(jnp.float64) if is_float else a


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:120]
