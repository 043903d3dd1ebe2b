"""The backward pass: the same runs in reverse, rebuilding or reading what each f's gradient needs.

    dx[l-1], dx[l], df   from dx[l+1], by the transpose of one step
    dparams, dx[l]       from df, by the transpose of f at x[l]

How x[l] is come by is the plan's answer: inverted, computed again from a keyframe, or stored.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from . import forward
from .chunks import ChunkedFunction
from .host import to_device
from .layers import Layers, by_f
from .pin import opaque_zero, pinned
from .plan import All, Inputs, Reverse
from .sink import Gradients
from .trace import Function, is_float
from .varying import vary_alike

PyTree = Any


def run(layers: Layers, diff: PyTree, rest: PyTree, kept: list[dict], cotangents: dict, sink: Gradients):
    """Returns the totals of the parameters' gradients (see `sink`), the gradients of (context, closures) and of the
    streams, and (N,) rows rebuilt wrong."""
    params, context, closures = diff
    dstreams, streams = cotangents["streams"], None
    dcontext, dclosures = _zeros(context, like=dstreams), _zeros(closures, like=dstreams)
    totals_of: list[Any] = [None] * len(params)
    totals: Any = None
    dclosures, wrong = list(dclosures), []
    for i in reversed(range(len(layers.pieces))):
        piece = layers.pieces[i]
        plan, replay = piece.keep, not isinstance(piece.keep, All)
        shared = layers.shared_inputs(i, diff, rest, replay=replay)
        inputs_L = layers.layer_inputs(i, rest)
        inputs_L = tuple(x | out for x, out in zip(inputs_L, kept[i]["outs"], strict=True))
        daux_L = cotangents["aux"][i]
        streams = kept[i].get("end", streams)
        dcarry = (dstreams, dcontext, dclosures[i][replay])
        if totals_of[piece.run] is None:
            totals = sink.start(piece.run, params[piece.run], dstreams[1], totals)
        if isinstance(plan, Reverse):
            ((streams, dcarry), totals), wrong_of_fns = _invert_run(
                layers, i, shared, ((streams, dcarry), totals), inputs_L, daux_L, sink
            )
        elif isinstance(plan, Inputs):
            start = kept[i]["start"]
            (dcarry, totals), wrong_of_fns = _recompute_run(
                layers, i, shared, start, (dcarry, totals), inputs_L, daux_L, sink, plan
            )
        else:
            (dcarry, totals), wrong_of_fns = _read_run(layers, i, shared, (dcarry, totals), inputs_L, daux_L, sink)
        dstreams, dcontext, dclosure = dcarry
        dclosures[i] = (dclosures[i][0], dclosure) if replay else (dclosure, dclosures[i][1])
        totals_of[piece.run] = totals
        wrong.append(jnp.sum(by_f(wrong_of_fns).reshape(layers.num_fns(i), -1), axis=1))
    return tuple(totals_of), (dcontext, tuple(dclosures)), dstreams, jnp.concatenate(wrong[::-1])


def _invert_run(layers: Layers, i: int, shared, carry, inputs_L, daux_L, sink: Gradients):
    """Rebuilds x[l-1] from x[l] and x[l+1]; one evaluation of f serves the inverse and the gradient."""

    def invert(carry, inputs, daux, fn, closure):
        (q, q_next), dcarry = carry
        unstep = lambda fx: layers.constrain(
            layers.arithmetic.unstep(layers.coupling, q, q_next, fx, inputs["kept"], inputs["number"])
        )
        if isinstance(fn, ChunkedFunction):
            q_prev, dcarry, dparams = _invert_in_chunks(layers, fn, shared, closure, q, unstep, dcarry, inputs)
        else:
            args, f = forward.evaluate(layers, fn, shared, closure, q, inputs, vjp=True)
            q_prev = unstep(f.fx)
            x_prev = layers.arithmetic.decode(q_prev)
            step_vjp = forward.step_vjp(layers, x_prev, args[1], f.fx, inputs["number"])
            zero = opaque_zero(inputs["layer"])
            dcarry, dparams = _pull(layers, fn, args, f.leaves, step_vjp, dcarry, daux, zero)
        return ((q_prev, q), dcarry), (dparams, _wrong(layers, q_prev, inputs["sum"]))

    xs_L, length = (inputs_L, daux_L), layers.pieces[i].length
    return _reverse_scan(layers, layers.replays[i], shared, invert, carry, xs_L, length, sink)


def _invert_in_chunks(layers: Layers, fn: ChunkedFunction, shared, closure, q, unstep, dcarry, inputs):
    """f's cotangent does not depend on f's value, so each chunk is evaluated and transposed at once."""
    x = forward.decoded(layers, q)
    step_vjp = forward.step_vjp(layers, x, x, jnp.zeros(x.shape, fn.fn.fx.dtype), inputs["number"])
    dx_prev, dx_step, dfx = step_vjp(dcarry[0][1])
    zero = opaque_zero(inputs["layer"])
    fx, gradients = fn.evaluate_and_transpose(forward.arguments(shared, closure, x, inputs), dfx, zero)
    dcarry, dparams = _collect(layers, fn, dcarry, dx_prev, dx_step, gradients)
    return unstep(jax.lax.optimization_barrier(fx)), dcarry, dparams


def _read_run(layers: Layers, i: int, shared, carry, inputs_L, daux_L, sink: Gradients):
    """Every activation was stored."""
    read = lambda dcarry, inputs, daux, fn, closure: _read(layers, shared, dcarry, inputs, daux, fn, closure)
    return _reverse_scan(layers, layers.fns[i], shared, read, carry, (inputs_L, daux_L), layers.pieces[i].length, sink)


def _recompute_run(layers: Layers, i: int, shared, start, carry, inputs_L, daux_L, sink: Gradients, plan: Inputs):
    """From each keyframe: `every` layers forward, storing their activations, and back."""
    fns, every = layers.replays[i], plan.every

    def segment(carry, segment_inputs):
        streams, inputs_L, daux_L = segment_inputs
        streams = jax.tree.map(to_device, streams) if plan.host else streams
        current = _current(shared, sink, carry[1])
        again = lambda streams, inputs: forward.period(layers, fns, current, streams, inputs, vjps=True)
        _, outs = jax.lax.scan(again, streams, inputs_L, length=every)
        inputs_L = tuple(x | {"vjp": o["vjp"], "again": o["end_sum"]} for x, o in zip(inputs_L, outs, strict=True))
        wrong = sum((jnp.sum(_differ(x["again"], x["end_sum"])) for x in inputs_L), jnp.zeros(()))
        carry = (carry[0], sink.saw(carry[1], wrong))

        def read(dcarry, inputs, daux, fn, closure):
            dcarry, (dparams, _) = _read(layers, shared, dcarry, inputs, daux, fn, closure)
            return dcarry, (dparams, _differ(inputs["again"], inputs["end_sum"]))

        return _reverse_scan(layers, fns, shared, read, carry, (inputs_L, daux_L), every, sink)

    xs = (start, *forward.in_segments((inputs_L, daux_L), every))
    carry, wrong = jax.lax.scan(segment, carry, xs, reverse=True, length=layers.pieces[i].length // every)
    return carry, jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), wrong)


def _read(layers: Layers, shared, dcarry, inputs, daux, fn: Function, closure):
    kept, step_leaves = inputs["vjp"]
    leaves = [k.value for k in kept]
    step_vjp = jax.tree.unflatten(layers.trees[fn], step_leaves)
    args = forward.arguments(shared, closure, np.zeros(()), inputs)  # x is among the leaves
    dcarry, dparams = _pull(layers, fn, args, leaves, step_vjp, dcarry, daux, opaque_zero(inputs["layer"]))
    return dcarry, (dparams, jnp.zeros(()))


def _reverse_scan(layers: Layers, fns, shared, undo, carry, xs_L, length: int, sink: Gradients):
    """Undoes each period, last f first.

    The carry is that of `undo`, and the totals of the run, into which each layer puts its gradients.
    Returns the carry, and for each f of a period how many rows were rebuilt wrong (L, ...).
    """

    def unlayer(carry, xs):
        (carry, totals), (inputs, daux), wrong = carry, xs, []
        inputs = forward.with_params(_current(shared, sink, totals), inputs)
        steps = zip(fns, shared["closures"], inputs, daux, strict=True)
        for j, (fn, closure, inputs, daux) in reversed(list(enumerate(steps))):
            carry, (dparams, wrong_rows) = undo(carry, inputs, daux, fn, closure)
            totals = sink.put(sink.saw(totals, wrong_rows), j, inputs["layer"], inputs["params"], dparams)
            wrong.append(wrong_rows)
        return (carry, totals), tuple(wrong[::-1])

    return jax.lax.scan(unlayer, carry, xs_L, reverse=True, length=length)


def _current(shared: dict, sink: Gradients, totals) -> dict:
    """What every layer gets, with the parameters of the layers that are still to come."""
    return shared | {"params": sink.params(totals, shared["params"])}


def _pull(layers: Layers, fn: Function, args, leaves, step_vjp, dcarry, daux, zero):
    """Cotangents through one step and one f. Returns those of the streams and of what is shared, and dparams.

    Pinned, so that gradients have the same bits whatever else a backward pass does: rebuild, recompute or read.
    """

    def pull(dcarry, daux):
        dx_prev, dx_step, dfx = step_vjp(dcarry[0][1])
        return _collect(layers, fn, dcarry, dx_prev, dx_step, fn.transpose(args, leaves, (dfx, daux)))

    return pinned(pull, zero)(dcarry, daux)


def _collect(layers: Layers, fn: Function | ChunkedFunction, dcarry, dx_prev, dx_step, gradients):
    """Adds the cotangents of one step and of its f to the carry."""
    (dx, _), dcontext, dclosures = dcarry
    ((dparams, dx_f, dinputs, dclosure),) = gradients
    dx = dx_step + dx_f if dx is None else dx + dx_step + dx_f
    if layers.coupling.order == 2:
        dstreams = (layers.constrain(dx_prev), layers.constrain(dx))
    else:
        dstreams = (None, layers.constrain(dx))
    place = layers.place[fn]
    dclosures = tuple(_add(d, dclosure) if j == place else d for j, d in enumerate(dclosures))
    return (dstreams, _add(dcontext, dinputs.get("context")), dclosures), dparams


def _wrong(layers: Layers, q, forward_sum) -> jax.Array:
    """How many rows of q are not what they were in the forward pass; float streams cannot tell, and say 0."""
    return jnp.zeros(()) if forward_sum is None else _differ(layers.arithmetic.checksum(q), forward_sum)


def _differ(sums, forward_sums) -> jax.Array:
    return jnp.zeros(()) if forward_sums is None else (sums != forward_sums).astype(jnp.float32)


def _zeros(tree: PyTree, like: PyTree) -> PyTree:
    """Where gradients that every layer adds to begin: at least float32."""
    zeros = lambda a: jnp.zeros(a.shape, jnp.promote_types(a.dtype, jnp.float32)) if is_float(a) else None
    return vary_alike(jax.tree.map(zeros, tree), like=like)


def _add(total: PyTree, more: PyTree) -> PyTree:
    return total if more is None else jax.tree.map(lambda t, d: t + d.astype(t.dtype), total, more)
