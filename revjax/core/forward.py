"""The forward pass: through every run, leaving behind what the plan says is kept for the backward pass."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from .host import to_host
from .layers import Layers, by_f, given, of_layer
from .pin import opaque_zero
from .plan import All, Inputs, Reverse
from .trace import Function, combine, is_float, partition

PyTree = Any


def run(layers: Layers, diff: PyTree, streams: PyTree, rest: PyTree, *, keep: bool) -> tuple[dict, list[dict]]:
    """Applies every piece. Returns the outputs, and for each piece what the backward pass will find.

    What is kept of a piece (the rest is dropped, and costs nothing):
      nothing    kept   the bits of the coupling (L, ...)
                 named  what the plan names (L, ...)
                 sum    one checksum for each f and row (L, B)
                 end    the streams after it, unless the next piece's backward pass rebuilds them
      inputs     start  the streams before every k-th layer (L / k, ...)
                 end_sum  one checksum of the stream after each f
      all        vjp    every activation (L, ...)
    and for `nothing` and `inputs` the tape of each f that has one.
    """
    broken = sum(layers.arithmetic.unsafe(x) for x in jax.tree.leaves(streams))
    streams = jax.tree.map(lambda x: layers.constrain(layers.arithmetic.encode(x)), streams)
    outs_of_pieces, kept = [], []
    for i, plan in enumerate(piece.keep for piece in layers.pieces):
        shared = layers.shared_inputs(i, diff, rest, replay=False)
        inputs_L = layers.layer_inputs(i, rest)
        if keep and isinstance(plan, Inputs):
            streams, outs, start = _run_with_keyframes(layers, i, shared, streams, inputs_L, plan)
        else:
            layer = functools.partial(period, layers, layers.fns[i], shared, vjps=keep and isinstance(plan, All))
            streams, outs = jax.lax.scan(layer, streams, inputs_L, length=layers.pieces[i].length)
            start = None
        outs_of_pieces.append(outs)
        if keep:
            names = {Reverse: ("kept", "sum", "tape", "named"), Inputs: ("end_sum", "tape"), All: ("vjp",)}[type(plan)]
            kept.append({"outs": tuple({name: o[name] for name in names} for o in outs), "start": start})
            following = layers.pieces[i + 1 : i + 2]
            if isinstance(plan, Reverse) and not any(isinstance(piece.keep, Reverse) for piece in following):
                kept[-1]["end"] = streams

    pick = lambda name: jnp.concatenate([by_f([o[name] for o in outs]) for outs in outs_of_pieces])
    unsafe = pick("unsafe").at[0].add(broken)
    floats = jax.tree.map(lambda q: _poison(layers.arithmetic.decode(q), jnp.sum(unsafe, axis=0) > 0), streams)
    per_f = lambda name: tuple(tuple(o[name] for o in outs) for outs in outs_of_pieces)
    out = {"streams": floats, "aux": per_f("aux"), "unsafe": unsafe, "max_abs": pick("max_abs")}
    return out | {"cache": per_f("cache")}, kept


def _run_with_keyframes(layers: Layers, i: int, shared, streams, inputs_L, plan: Inputs):
    """One piece, as a scan over segments of `every` layers; returns the streams before each segment as well."""
    layer, every = functools.partial(period, layers, layers.fns[i], shared, vjps=False), plan.every

    def segment(streams, inputs):
        end, outs = jax.lax.scan(layer, streams, inputs, length=every)
        return end, (jax.tree.map(to_host, streams) if plan.host else streams, outs)

    num_segments = layers.pieces[i].length // every
    streams, (start, outs) = jax.lax.scan(segment, streams, in_segments(inputs_L, every), length=num_segments)
    return streams, jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), outs), start


def in_segments(tree_L: PyTree, every: int) -> PyTree:
    """(L, ...) -> (L / every, every, ...)."""
    return jax.tree.map(lambda a: a.reshape(-1, every, *a.shape[1:]), tree_L)


def period(layers: Layers, fns: tuple[Function, ...], shared: dict, streams: PyTree, inputs: tuple, *, vjps: bool):
    """Applies the f's of one period. Returns the streams after it, and for each f what it leaves behind."""
    outs = []
    for fn, closure, given_to_f in zip(fns, shared["closures"], with_params(shared, inputs), strict=True):
        streams, out = step(layers, fn, shared, closure, streams, given_to_f, vjps=vjps)
        outs.append(out)
    return streams, tuple(outs)


def step(layers: Layers, fn: Function, shared: dict, closure, streams: PyTree, inputs: dict, *, vjps: bool):
    """x[l+1] = x[l] + b (x[l-1] - x[l]) + h f(x[l])."""
    arithmetic, (q_prev, q), n = layers.arithmetic, streams, inputs["number"]
    args, f = evaluate(layers, fn, shared, closure, q, inputs, vjp=vjps)
    q_next, kept, unsafe = arithmetic.step(layers.coupling, q_prev, q, f.fx, n)
    q_next = layers.constrain(q_next)
    out = {
        "before": q_prev,
        "aux": f.aux,
        "tape": f.tape,
        "named": f.named,
        "cache": f.cache,
        "kept": kept,
        "sum": arithmetic.checksum(q_prev),
        "end_sum": arithmetic.checksum(q_next),
        "unsafe": unsafe,
        "max_abs": arithmetic.max_abs(q_next),
    }
    if vjps:
        step_leaves, layers.trees[fn] = jax.tree.flatten(step_vjp(layers, arithmetic.decode(q_prev), args[1], f.fx, n))
        out["vjp"] = [Kept.of(x) for x in f.leaves], step_leaves
    return (q if layers.coupling.order == 2 else None, q_next), out


def evaluate(layers: Layers, fn: Function, shared: dict, closure, q, inputs: dict, *, vjp: bool):
    """Runs f at a stream, the same way in both passes; the barriers keep its neighbours from being fused into it.

    Returns what f was called with, and what came of it.
    """
    x = decoded(layers, q)
    args = arguments(shared, closure, x, inputs)
    zero = opaque_zero(inputs["layer"])
    result = fn(args, zero, vjp=vjp, named=[kept.value for kept in inputs.get("named", ())])
    named = [Kept.of(x) for x in result.named]
    return args, result._replace(fx=jax.lax.optimization_barrier(result.fx), named=named)


def decoded(layers: Layers, q) -> Any:
    """The stream that f sees, behind a barrier. On a GPU, where bytes cost more than arithmetic, each read decodes."""
    once = lambda q: jax.lax.optimization_barrier(layers.arithmetic.decode(q))
    by_read = lambda q: layers.arithmetic.decode(jax.lax.optimization_barrier(q))
    return jax.lax.platform_dependent(q, cuda=by_read, default=once)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Kept:
    """A value on its way to the backward pass: its bits, where it is of low precision.

    XLA for CPU would keep bf16 as fp32, since it converts before it stores what is read as fp32.
    """

    bits: jax.Array
    dtype: Any = dataclasses.field(metadata={"static": True})

    @staticmethod
    def of(x: jax.Array) -> "Kept":
        is_low = is_float(x) and x.dtype.itemsize == 2
        return Kept(jax.lax.bitcast_convert_type(x, jnp.uint16) if is_low else x, x.dtype)

    @property
    def value(self) -> jax.Array:
        return self.bits if self.bits.dtype == self.dtype else jax.lax.bitcast_convert_type(self.bits, self.dtype)


def with_params(shared: dict, inputs: tuple) -> tuple:
    """What each f of a period gets, with the parameters of its layer."""
    return tuple(x | {"params": of_layer(p, x["layer"])} for p, x in zip(shared["params"], inputs, strict=True))


def arguments(shared: dict, closure, x, inputs: dict) -> PyTree:
    """What a `Function` takes."""
    layer = inputs["layer"]
    keywords = given(
        side=_of_this_layer(inputs["side"], layer),
        shared=shared["shared"],
        context=shared["context"],
        tape=inputs.get("tape"),
        cache=inputs.get("cache"),
    )
    return _of_this_layer(inputs["params"], layer), x, keywords, closure


def _of_this_layer(params: PyTree, layer: jax.Array) -> PyTree:
    """The same parameters, frozen ones too, as something that only the loop can compute.

    On TPU, XLA moves what is done to parameters alone out of the loop over layers (the cast to bf16, above all)
    and does it for all layers at once: a copy of the whole stack. A zero that depends on the layer keeps it in.
    """
    floats, others = partition(params)
    if not jax.tree.leaves(floats):
        return params
    add_zero = lambda a: a + jnp.where(layer < 0, 1, 0).astype(a.dtype)
    on_tpu = lambda floats: jax.tree.map(add_zero, floats)
    return combine(jax.lax.platform_dependent(floats, tpu=on_tpu, default=lambda floats: floats), others)


def step_vjp(layers: Layers, x_prev, x, fx, n):
    """The transpose of one step of the recurrence: dx[l+1] -> (dx[l-1], dx[l], df)."""
    forward = lambda x_prev, x, fx: layers.coupling.forward(x_prev, x, fx, n).astype(x.dtype)
    return jax.vjp(forward, x_prev, x, fx)[1]


def _poison(x: jax.Array, broken: jax.Array) -> jax.Array:
    """NaN in every row that held an unsafe element, so that a broken number is not taken for a good one."""
    return jnp.where(broken.reshape(-1, *[1] * (x.ndim - 1)), jnp.nan, x)
