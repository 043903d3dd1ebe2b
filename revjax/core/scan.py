"""`reversible_scan`: a stack of residual functions whose backward pass rebuilds what others store.

    forward    x[l+1] = x[l] + b (x[l-1] - x[l]) + h f_l(x[l])
    inverse    x[l-1] = x[l] + (x[l+1] - x[l] - h f_l(x[l])) / b

A stack is a list of runs; a run repeats a period of functions f. All runs stand under one `custom_vjp`,
so the streams stay integers from the first layer to the last. What the backward pass finds kept is the
`plan` (see `revjax.core.plan`); each f is evaluated once more there, and that one evaluation serves
the inverse and the gradient.

Exactness needs an f that gives the same bits twice: f is one pinned program (see `trace` and `pin`), a
checksum of every stream tells whether it did (the canary), and elements that integers cannot hold are
counted (unsafe).

Only jax is known here: f is a pure function `f(params, x) -> increment`.
Shape suffixes: L repeats of a run's period, N all f's of the stack, B batch rows.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from . import backward, forward
from .coupling import AbstractCoupling, RevNet
from .guard import (
    CACHE_IS_FORWARD_ONLY,
    FIRST_ORDER_ONLY,
    NUMBERS_NOT_DIFFERENTIATED,
    SIDE_NOT_DIFFERENTIATED,
    refuse_gradient,
)
from .layers import Layers, Run, as_runs, pieces_of
from .plan import Plan, Reverse, for_runs
from .sink import Gradients, Sums, Updates
from .streams import Exact, FixedPoint, Float
from .trace import combine, is_float, partition
from .varying import vary_alike

PyTree = Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ScanResult:
    """What `reversible_scan` returns.

    Attributes:
      streams: the last two, (x[l-1], x[l]), in floats. A row that held an unsafe element is NaN. The first
        is None for a coupling that needs one stream.
      aux: for each run, for each of its f's, the auxiliary outputs with a leading axis of repeats; or None.
      cache: as `aux`, the caches that f returned; or None.
      unsafe: (N,) how many elements after each f were not finite or did not fit. 0 everywhere, or see
        `FixedPoint.limit`.
      max_abs: (N,) the largest |x| after each f. Neither this nor `unsafe` has a gradient.
      readout: "mean" or "last", as the coupling says.
    """

    streams: tuple[jax.Array | None, jax.Array]
    aux: PyTree
    cache: PyTree
    unsafe: jax.Array
    max_abs: jax.Array
    readout: str = dataclasses.field(default="mean", metadata={"static": True})

    @property
    def out(self) -> jax.Array:
        """What the next layer reads: the mean of the streams, or the last one, as the coupling says."""
        return self.mean if self.readout == "mean" else self.last

    @property
    def last(self) -> jax.Array:
        """The last stream, x[l]."""
        return self.streams[1]

    @property
    def mean(self) -> jax.Array:
        """The mean of the two streams: the usual read-out of two-stream networks."""
        previous, last = self.streams
        return last if previous is None else 0.5 * (previous + last)


def reversible_scan(
    runs: Run | Sequence[Run],
    x: jax.Array | tuple[jax.Array, jax.Array],
    *,
    coupling: AbstractCoupling | None = None,
    plan: Plan = "nothing",
    shared: PyTree = None,
    context: PyTree = None,
    canary: jax.Array | None = None,
    grad_sums: Sequence[PyTree] | None = None,
    update: Callable[[PyTree, PyTree, PyTree], tuple[PyTree, PyTree]] | None = None,
    update_state: Sequence[Sequence[PyTree]] | None = None,
    exact: bool = True,
    fraction_bits: int = 16,
    constrain: Callable[[jax.Array], jax.Array] | None = None,
) -> ScanResult:
    """Applies every f of every run in turn, and differentiates them without storing their inputs.

    With a reversible coupling and plan "nothing", peak memory of the backward pass does not grow with the
    number of layers, but for the bits that the coupling keeps. Gradients are those of the same rounded
    network with stored activations. Works under `jit`, `vmap`, `grad`, `checkpoint` and `shard_map`;
    first-order reverse mode only.

    Args:
      runs: the functions and their stacked parameters.
      x: float array (B, ..., D), rows first; or the two streams to start from. One array starts both.
      coupling: how increments join the streams; RevNet() if None.
      plan: what the backward pass finds kept: "nothing", "attention", "inputs:K", "host:K", "all", different for parts
        of a run ("40 nothing, 8 all"), or one for each run.
      shared: a pytree that every f gets as `shared=`; not differentiated.
      context: a pytree that every f gets as `context=`, with gradients (cross-attention).
      canary: zeros (N, 3). Its gradient is, for each f, how many rows of the stream beside it were not
        rebuilt to the bit (0, or the other gradients are not to be trusted), how many elements were unsafe,
        and the largest |x| after it. Where gradients are summed (vmap, shard_map, a stack that is called
        twice), so are these.
      grad_sums: for each run, arrays like the floats of its `params_L`, to which the gradients of these are added
        where they are: its gradient is itself plus those, which are then told to be 0. For sums over micro-batches,
        without a second array for the gradients of one. Not where gradients are summed (see `canary`).
      update: `update(params, state, grads) -> (params, state)` for one f of one layer, which the backward pass calls as
        soon as it has the gradients, so that they never exist as a whole. Then the gradients of `params_L` and of
        `update_state` are their new values. Of parameters that stay as they are, it returns None. Nothing is updated
        where elements were unsafe, nor from the first stream on that was not rebuilt to the bit. Not where gradients
        are summed.
      update_state: for each run, for each f, floats with a leading axis of repeats (the optimizer's moments, say).
      exact: int32 fixed-point streams. False: float streams in the dtype of x, whose inverse drifts.
      fraction_bits: the grid of the exact streams, 2**-fraction_bits.
      constrain: applied to every stream, rebuilt ones and their cotangents too
        (`jax.lax.with_sharding_constraint`).

    Raises:
      TypeError, ValueError: what does not fit together, and what to do about it.

    Example:
      >>> f = lambda w, x: jnp.tanh(x @ w)
      >>> w_L = 0.1 * jax.random.normal(jax.random.key(0), (96, 64, 64))
      >>> loss = lambda w_L, x: jnp.mean(reversible_scan(Run(f, w_L), x).mean ** 2)
      >>> jax.jit(jax.grad(loss))(w_L, jnp.ones((8, 64))).shape
      (96, 64, 64)
    """
    options = dict(coupling=coupling, plan=plan, shared=shared, context=context, exact=exact)
    problem = prepare(runs, x, **options, fraction_bits=fraction_bits, constrain=constrain)
    layers, diff, streams, rest = problem.layers, problem.diff, problem.streams, problem.rest
    num_fns = sum(map(layers.num_fns, range(len(layers.fns))))
    if canary is None:
        canary = jnp.zeros((num_fns, 3), jnp.float32)
    elif canary.shape != (num_fns, 3):
        raise ValueError(f"canary must have shape ({num_fns}, 3), one row for each f, but got {canary.shape}.")
    canary = vary_alike(canary, like=streams)
    grad_sums = None if grad_sums is None else _like_params(tuple(grad_sums), diff[0])
    if update is not None or update_state is not None:
        if update is None or update_state is None or grad_sums is not None:
            raise ValueError("update and update_state go together, and without grad_sums.")
        update_state = _for_updates(update_state, runs)
    given: Any = grad_sums if update is None else update_state
    if problem.has_cache:
        diff, streams = refuse_gradient((diff, streams), CACHE_IS_FORWARD_ONLY)
        return _result(forward.run(layers, combine(diff, rest[0]), streams, rest[1], keep=False)[0], problem)

    @jax.custom_vjp
    def core(diff, streams, rest, canary, given):
        return forward.run(layers, combine(diff, rest[0]), streams, rest[1], keep=False)[0]

    def core_fwd(diff, streams, rest, canary, given):
        diff = jax.tree.map(jnp.asarray, diff)  # without jit, a number that f closes over may come as a Python float
        out, kept = forward.run(layers, combine(diff, rest[0]), streams, rest[1], keep=True)
        corner = jax.tree.map(lambda x: x[(0,) * x.ndim], streams)  # a float of x: what is kept of it are integers
        # what is kept: see forward.run
        return out, (diff, rest, kept, out["unsafe"], out["max_abs"], corner, given)

    def core_bwd(residuals, cotangents):
        diff, rest, kept, unsafe, max_abs, corner, given = residuals
        diff, cotangents, _ = refuse_gradient((diff, cotangents, corner), FIRST_ORDER_ONLY)
        if given is None:
            sink = Gradients()
        else:
            sink = Sums(given) if update is None else Updates(update, given, jnp.sum(unsafe))
        totals, dothers, dstreams, wrong = backward.run(layers, combine(diff, rest[0]), rest[1], kept, cotangents, sink)
        dparams, dgiven = sink.results(totals, diff[0])
        ddiff = (dparams, *dothers)
        ddiff = jax.tree.map(lambda d, a: d.astype(a.dtype), partition(ddiff)[0], diff)
        dstreams = jax.tree.map(lambda d, a: d.astype(a.dtype), dstreams, problem.streams)
        return ddiff, dstreams, None, jnp.stack([wrong, jnp.sum(unsafe, 1), jnp.max(max_abs, 1)], axis=1), dgiven

    core.defvjp(core_fwd, core_bwd)
    try:
        out = core(diff, streams, rest, canary, given)
    except TypeError as error:
        if "forward-mode" not in str(error):
            raise
        raise TypeError(
            "reversible_scan has no forward-mode derivative (jax.jvp, jax.jacfwd, jax.hessian). Use reverse mode "
            "(jax.grad, jax.vjp, jax.jacrev)."
        ) from error
    return _result(out, problem)


@dataclasses.dataclass(frozen=True)
class Problem:
    """The arguments of `reversible_scan`, checked and sorted.

    Attributes:
      diff: (parameters, context, closures), their floats; `rest` holds the others.
      streams: those to start from, floats.
      rest: the non-floats of `diff`, and (sides, shared, numbers, caches, indices).
    """

    layers: Layers
    diff: PyTree
    streams: PyTree
    rest: tuple[PyTree, tuple]
    has_cache: bool


def prepare(runs, x, *, coupling, plan, shared, context, exact, fraction_bits, constrain) -> Problem:
    """Checks the arguments of `reversible_scan` and traces every f once."""
    coupling = RevNet() if coupling is None else coupling
    runs = as_runs(runs)
    pieces = pieces_of(for_runs(plan, [run.length for run in runs]))
    if not coupling.reversible and any(isinstance(piece.keep, Reverse) for piece in pieces):
        raise ValueError(
            f"{type(coupling).__name__} has no inverse, so plans 'nothing' and 'attention' cannot rebuild its streams. "
            "Pass plan='inputs' (recompute) or plan='all' (store), or a reversible coupling."
        )
    streams = _start(x, coupling)
    arithmetic = Exact(FixedPoint(fraction_bits)) if exact else Float(streams[1].dtype)
    params, streams, context = vary_alike((tuple(run.params_L for run in runs), streams, context))
    runs = [dataclasses.replace(run, params_L=p) for run, p in zip(runs, params, strict=True)]
    given = {"side_L": tuple(run.side_L for run in runs), "shared": shared}
    sides = tuple(refuse_gradient(given, SIDE_NOT_DIFFERENTIATED)[name] for name in given)
    numbers = coupling.numbers(sum(run.num_fns for run in runs), streams[1])
    numbers = refuse_gradient(numbers, NUMBERS_NOT_DIFFERENTIATED)
    layers = Layers.trace(runs, streams[1], sides[1], context, coupling, arithmetic, constrain or (lambda x: x), pieces)
    diff, other = partition((params, context, vary_alike(layers.closures, like=streams)))
    caches = tuple(run.cache_L for run in runs)
    has_cache = bool(jax.tree.leaves(caches))
    indices = tuple(_indices(piece.start, piece.length) for piece in pieces)
    return Problem(layers, diff, streams, (other, (*sides, numbers, caches, indices)), has_cache)


def _indices(start: int, length: int) -> jax.Array:
    """Which repeat it is: int32, (length,); a number that is not known before the program runs.

    The counter of a loop is such a number, but a loop that runs once is none when it is compiled. Nothing is random
    about the 0 that is drawn then, but a compiler does not foresee it.
    """
    if length > 1:
        return jnp.arange(start, start + length, dtype=jnp.int32)
    return start + jax.lax.rng_uniform(np.float32(0), np.float32(1), (1,)).astype(jnp.int32)


def _like_params(grad_sums: tuple, params: tuple) -> tuple:
    shapes = lambda tree: [a.shape for a in jax.tree.leaves(tree)]
    if jax.tree.structure(grad_sums) != jax.tree.structure(params) or shapes(grad_sums) != shapes(params):
        raise ValueError(
            "grad_sums must have, for each run, one array for each float of its params_L, of the same shape, in the "
            f"same structure, but got {jax.tree.map(lambda a: a.shape, grad_sums)}."
        )
    return grad_sums


def _for_updates(states: Sequence[Sequence[PyTree]], runs: Run | Sequence[Run]) -> tuple[tuple[PyTree, ...], ...]:
    runs, states = as_runs(runs), tuple(tuple(of_run) for of_run in states)
    fits = [len(run.fns) for run in runs] == [len(of_run) for of_run in states] and all(
        is_float(a) and a.ndim and a.shape[0] == run.length
        for run, of_run in zip(runs, states, strict=True)
        for a in jax.tree.leaves(of_run)
    )
    if not fits:
        raise ValueError(
            "update_state must have, for each run, for each of its functions, a pytree of floats whose leading axis is "
            f"the number of repeats, {[(len(run.fns), run.length) for run in runs]}, but got "
            f"{jax.tree.map(lambda a: f'{a.dtype}{list(a.shape)}', states)}."
        )
    return states


def _start(x, coupling: AbstractCoupling) -> tuple[jax.Array | None, jax.Array]:
    x_prev, x = x if isinstance(x, tuple) else (x, x)
    x_prev, x = jnp.asarray(x_prev), jnp.asarray(x)
    if x_prev.shape != x.shape or x_prev.dtype != x.dtype:
        raise ValueError(
            "The two streams must have the same shape and dtype, but got "
            f"{x_prev.dtype}{list(x_prev.shape)} and {x.dtype}{list(x.shape)}. One array `x` starts both."
        )
    if not is_float(x) or x.ndim < 2:
        raise TypeError(f"x must be an array of floats, (batch, ..., d_model), but got {x.dtype}{list(x.shape)}.")
    return (x_prev if coupling.order == 2 else None), x


def _result(out: dict[str, PyTree], problem: Problem) -> ScanResult:
    run_of_piece = [piece.run for piece in problem.layers.pieces]

    def by_run(pieces):
        if not jax.tree.leaves(pieces):
            return None
        runs = [[p for p, i in zip(pieces, run_of_piece, strict=True) if i == run] for run in sorted(set(run_of_piece))]
        return tuple(same[0] if len(same) == 1 else jax.tree.map(lambda *a: jnp.concatenate(a), *same) for same in runs)

    unsafe, max_abs = jnp.sum(out["unsafe"], axis=1), jnp.max(out["max_abs"], axis=1)
    aux, cache = by_run(out["aux"]), by_run(out["cache"])
    return ScanResult(out["streams"], aux, cache, unsafe, max_abs, problem.layers.coupling.readout)
