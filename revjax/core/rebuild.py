"""How far the inverse is from what it should rebuild, layer by layer: 0 for exact streams, a drift for floats."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from . import forward
from .coupling import AbstractCoupling
from .layers import Layers, Run, by_f
from .scan import prepare
from .trace import combine

PyTree = Any


def reconstruction_error(
    runs: Run | list[Run],
    x: jax.Array | tuple[jax.Array, jax.Array],
    *,
    coupling: AbstractCoupling | None = None,
    shared: PyTree = None,
    context: PyTree = None,
    exact: bool = True,
    fraction_bits: int = 16,
) -> jax.Array:
    """Runs a stack forward and back, and returns (N,) the largest |rebuilt - true| of the stream before each f.

    The forward pass and the inverse are those of `reversible_scan`, in one program each (this function jits
    them). It keeps every stream to compare with, so its memory grows with depth: for looking, not for training.

    Example:
      >>> reconstruction_error(Run(f, w_L), x).max()
      0.0
    """
    options = dict(coupling=coupling, plan="nothing", shared=shared, context=context, constrain=None)
    problem = prepare(runs, x, **options, exact=exact, fraction_bits=fraction_bits)
    layers, diff, rest = problem.layers, combine(problem.diff, problem.rest[0]), problem.rest[1]
    streams, outs = jax.jit(functools.partial(_there, layers))(diff, problem.streams, rest)
    return jax.jit(functools.partial(_back, layers))(diff, streams, rest, outs)


def _there(layers: Layers, diff, streams, rest):
    streams, left = jax.tree.map(layers.arithmetic.encode, streams), []
    for i, fns in enumerate(layers.fns):
        shared, inputs_L = layers.shared_inputs(i, diff, rest, replay=False), layers.layer_inputs(i, rest)
        layer = functools.partial(forward.period, layers, fns, shared, vjps=False)
        streams, outs = jax.lax.scan(layer, streams, inputs_L, length=layers.pieces[i].length)
        left.append(tuple({name: o[name] for name in ("before", "kept", "tape")} for o in outs))
    return streams, left


def _back(layers: Layers, diff, streams, rest, left):
    errors: list[jax.Array] = []
    for i in reversed(range(len(layers.fns))):
        shared, inputs_L = layers.shared_inputs(i, diff, rest, replay=True), layers.layer_inputs(i, rest)
        inputs_L = tuple(x | out for x, out in zip(inputs_L, left[i], strict=True))

        def unlayer(streams, inputs, i=i, shared=shared):
            off, inputs = [], forward.with_params(shared, inputs)
            for fn, closure, given in reversed(list(zip(layers.replays[i], shared["closures"], inputs, strict=True))):
                q, q_next = streams
                # As in training, f is run with its gradient, so that it is compiled in the same company.
                _, f = forward.evaluate(layers, fn, shared, closure, q, given, vjp=True)
                fx, _ = jax.lax.optimization_barrier((f.fx, f.leaves))
                q_prev = layers.arithmetic.unstep(layers.coupling, q, q_next, fx, given["kept"], given["number"])
                decode = layers.arithmetic.decode
                off.append(jnp.max(jnp.abs(decode(q_prev) - decode(given["before"]))).astype(jnp.float32))
                streams = (q_prev, q)
            return streams, tuple(off[::-1])

        streams, off_L = jax.lax.scan(unlayer, streams, inputs_L, reverse=True, length=layers.pieces[i].length)
        errors.append(by_f(off_L))
    return jnp.concatenate(errors[::-1])
