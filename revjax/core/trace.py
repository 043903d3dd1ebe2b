"""A residual function as a program: traced once, its closures made visible, differentiated and pinned.

`reversible_scan` runs f twice, in the forward and in the backward pass, and needs the same bits. So f
is traced once, differentiated once, and both passes run that one program (see `pin`); whatever f closes
over that is itself traced becomes an input of the program, with a gradient.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.extend.core import ClosedJaxpr, Literal

from .pin import evaluate, evaluate_pinned, rewired

PyTree = Any


class Result(NamedTuple):
    """What came of running an f.

    Attributes:
      leaves: the new leaves of its vjp, where they were asked for.
      named: the values that are kept by name.
    """

    fx: PyTree
    aux: PyTree
    tape: PyTree
    cache: PyTree
    leaves: list[jax.Array]
    named: Sequence[jax.Array]


@dataclasses.dataclass(frozen=True, eq=False)
class Function:
    """f(params, x, **inputs), ready to be run and differentiated inside the scans.

    Differentiated are `params`, `x`, `context` and `closure`, as far as they are floats.

    Attributes:
      program: inputs -> (fx, aux), (tape, cache), and the leaves of the vjp; pinned when it is run.
      closure: what f closed over that is traced, shared by all layers.
      num_out: how many of the program's results are not leaves of the vjp.
      forwarded: for each leaf of the vjp, which input of the program it is, or None.
      tape_shape: what f asks to be called with again (shapes), or None.
      fx: the increment (shapes): an array, or what else a coupling takes.
      has_extras: f returned something beside the increment.
      replay: the program with what is kept by name as further inputs; the program has it as further results.
    """

    program: ClosedJaxpr
    closure: list[Any]
    num_out: int
    out_tree: Any
    vjp_tree: Any
    forwarded: tuple[int | None, ...]
    tape_shape: PyTree
    fx: PyTree
    has_extras: bool
    replay: ClosedJaxpr

    def __call__(self, args: PyTree, zero: jax.Array, *, vjp: bool, named: Sequence[jax.Array] = ()) -> Result:
        """Runs f. `zero`: see `evaluate_pinned`; `named`: what was kept by name, which is not computed again."""
        program = self.replay if named else self.program
        outs = evaluate_pinned(program, [*jax.tree.leaves(args), *named], zero)
        n, m = self.num_out, self.num_out + len(self.forwarded)
        new = [leaf for leaf, i in zip(outs[n:m], self.forwarded, strict=True) if i is None]
        (fx, aux), (tape, cache) = jax.tree.unflatten(self.out_tree, outs[:n])
        return Result(fx, aux, tape, cache, new if vjp else [], outs[m:])

    @property
    def named(self) -> list[Any]:
        """Shapes of the values that are kept by name."""
        return list(self.program.out_avals[self.num_out + len(self.forwarded) :])

    def transpose(self, args: PyTree, new: list[jax.Array], cotangents: PyTree) -> PyTree:
        """The gradients with respect to the differentiated arguments, given the leaves of a `Result`."""
        inputs, new_leaves = jax.tree.leaves(args), iter(new)
        leaves = [next(new_leaves) if i is None else inputs[i] for i in self.forwarded]
        return jax.tree.unflatten(self.vjp_tree, leaves)(cotangents)


def trace(
    f: Callable, params: PyTree, x: jax.ShapeDtypeStruct, inputs: dict[str, PyTree], names: Sequence[str] = ()
) -> Function:
    """Traces f once, for the shapes of one layer.

    Args:
      params, x, inputs: shapes (or arrays). `inputs` holds the keywords that f is called with: any of
        side, shared, context, tape, cache.
      names: of the values that are kept for the backward pass (`jax.ad_checkpoint.checkpoint_name`).

    Raises:
      TypeError, ValueError: f returned something that cannot be added to x.
    """
    leaves, tree = jax.tree.flatten((params, x, inputs))

    def flat(*leaves):
        params, x, inputs = jax.tree.unflatten(tree, leaves)
        return read_result(f(params, x, **inputs))

    closed, shape = jax.make_jaxpr(flat, return_shape=True)(*leaves)
    _check_increment(f, shape[0][0], x)
    if any(is_float(a) for a in jax.tree.leaves(shape[1][0])):
        raise TypeError(
            f"The tape of {_name(f)} holds floats, whose gradients would be lost where f is run again. A tape is for "
            "decisions (integers, booleans); return floats as 'aux'."
        )
    closure = [c for c in closed.consts if isinstance(c, Tracer)]
    slots = {i: n for n, i in enumerate(i for i, c in enumerate(closed.consts) if isinstance(c, Tracer))}

    def run(params, x, inputs, closure):
        consts = [closure[slots[i]] if i in slots else c for i, c in enumerate(closed.consts)]
        outs = evaluate(ClosedJaxpr(closed.jaxpr, consts), jax.tree.leaves((params, x, inputs)))
        return jax.tree.unflatten(jax.tree.structure(shape), outs)

    trees: dict[str, Any] = {}

    def with_vjp(*args):
        diff, rest = split(arguments(*args))
        out, f_vjp, kept = jax.vjp(lambda diff: run(*join(diff, rest)), diff, has_aux=True)
        (outs, trees["out"]), (leaves, trees["vjp"]) = jax.tree.flatten((out, kept)), jax.tree.flatten(f_vjp)
        trees["num_out"] = len(outs)
        return outs + leaves

    def arguments(*args):
        return jax.tree.unflatten(args_tree, args)

    args = (params, x, inputs, [jax.typeof(c) for c in closure])
    flat_args, args_tree = jax.tree.flatten(args)
    program = jax.make_jaxpr(with_vjp)(*flat_args)
    # Leaves that are inputs of the program need not be stored with it; x must, since it is not kept elsewhere.
    place = {v: i for i, v in enumerate(program.jaxpr.invars) if i != len(jax.tree.leaves(params))}
    n = trees["num_out"]
    forwarded = tuple(None if isinstance(v, Literal) else place.get(v) for v in program.jaxpr.outvars[n:])
    program, replay = _keeping(program, names) if names else (program, program)
    extras = bool(jax.tree.leaves((shape[0][1], shape[1])))
    fx, tape = shape[0][0], shape[1][0]
    return Function(program, closure, n, trees["out"], trees["vjp"], forwarded, tape, fx, extras, replay)


def _keeping(program: ClosedJaxpr, names: Sequence[str]) -> tuple[ClosedJaxpr, ClosedJaxpr]:
    """The program with what has one of the names as further results, and with the same as further inputs.

    Kept is what was given the name, which derivatives of what computed it read as well.
    """
    program = rewired(program)
    is_kept = lambda eqn: eqn.primitive.name == "name" and eqn.params["name"] in names
    values = (eqn.invars[0] for eqn in program.eqns if is_kept(eqn))
    named = list(dict.fromkeys(v for v in values if not isinstance(v, Literal)))
    return rewired(program, also=named), rewired(program, given=named)


def split(args: PyTree) -> tuple[PyTree, PyTree]:
    """(params, x, inputs, closure) -> the parts that are differentiated, and the others (None in the gaps)."""
    params, x, inputs, closure = args
    diff_inputs = {k: v for k, v in inputs.items() if k == "context"}
    other_inputs = {k: v for k, v in inputs.items() if k != "context"}
    diff, rest = partition((params, x, diff_inputs, closure))
    return diff, (rest, other_inputs)


def join(diff: PyTree, rest: PyTree) -> PyTree:
    """The inverse of `split`."""
    gaps, other_inputs = rest
    params, x, diff_inputs, closure = combine(diff, gaps)
    return params, x, diff_inputs | other_inputs, closure


def partition(tree: PyTree) -> tuple[PyTree, PyTree]:
    """Two trees: the floats, and the rest; None where the leaf is in the other."""
    floats = jax.tree.map(lambda a: a if is_float(a) else None, tree)
    others = jax.tree.map(lambda a: None if is_float(a) else a, tree)
    return floats, others


def combine(floats: PyTree, others: PyTree) -> PyTree:
    """The inverse of `partition`."""
    return jax.tree.map(lambda a, b: b if a is None else a, floats, others, is_leaf=lambda a: a is None)


def is_float(a) -> bool:
    return jnp.issubdtype(a.dtype, jnp.inexact)


def read_result(result: PyTree) -> tuple[tuple[PyTree, PyTree], tuple[PyTree, PyTree]]:
    """What f returned, `fx` or `(fx, {"aux": ..., "tape": ..., "cache": ...})` -> ((fx, aux), (tape, cache))."""
    extras: dict[str, PyTree] = {}
    if isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], dict):
        result, extras = result
        unknown = set(extras) - {"aux", "tape", "cache"}
        if unknown:
            raise ValueError(
                "A residual function returns fx, or (fx, extras) with extras of 'aux', 'tape', 'cache'; got "
                f"{sorted(unknown)}."
            )
    return (result, extras.get("aux")), (extras.get("tape"), extras.get("cache"))


def _check_increment(f, fx, x):
    if isinstance(fx, jax.ShapeDtypeStruct) and (fx.shape != x.shape or not jnp.issubdtype(fx.dtype, jnp.floating)):
        raise ValueError(
            f"A residual function returns an increment of the shape of x, in floats, but {_name(f)} took "
            f"{x.dtype}{list(x.shape)} and returned {fx.dtype}{list(fx.shape)}."
        )


def _name(f) -> str:
    return getattr(f, "__name__", type(f).__name__)
