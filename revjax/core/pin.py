"""Makes a program give the same bits wherever it is compiled into a larger one.

XLA may leave out a rounding to bf16 between two operations that it fuses ("excess precision"), and
it fuses differently where the result is also differentiated. A `reduce_precision` after each
low-precision result says that the rounding is meant, and XLA keeps it. Unlike the compiler option
`xla_allow_excess_precision=False`, which only the outermost `jax.jit` may set, this holds however
the caller compiles.

A sum over an axis is the other operation whose bits depend on its company: fused with its producers,
it is vectorised differently beside different neighbours, and adds in another order (seen on CPU in fp32,
in 22 of 24 rows of a stack with RMSNorm at width 32). Sums of floats are therefore products with a
vector of ones, which XLA does not fuse away.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

_ROUNDING = {jnp.dtype("bfloat16"): (8, 7), jnp.dtype("float16"): (5, 10)}  # exponent and mantissa bits
_HOLDERS = {"pjit", "jit", "closed_call", "core_call", "custom_jvp_call", "custom_vjp_call", "checkpoint", "remat2"}
_BODIES = {"scan": ("jaxpr",), "while": ("cond_jaxpr", "body_jaxpr"), "cond": ("branches",)}


def pin(f: Callable) -> Callable:
    """Returns `f` with every low-precision intermediate result rounded exactly once.

    The bodies of scans, loops and conditions are pinned as well. Custom derivatives do not survive:
    pin a function that is already differentiated, `pin(lambda *xs: jax.vjp(f, *xs))`.
    """

    def pinned(*args):
        leaves, treedef = jax.tree.flatten(args)
        closed, shape = jax.make_jaxpr(lambda *xs: f(*jax.tree.unflatten(treedef, xs)), return_shape=True)(*leaves)
        return jax.tree.unflatten(jax.tree.structure(shape), evaluate_pinned(closed, leaves))

    return pinned


def evaluate(closed: ClosedJaxpr, args: Sequence[Any]) -> list[Any]:
    """Runs a jaxpr as it is; custom derivatives survive."""
    return _evaluate(closed.jaxpr, closed.consts, args, pinned=False)


def evaluate_pinned(closed: ClosedJaxpr, args: Sequence[Any]) -> list[Any]:
    """Runs a jaxpr with every low-precision result rounded; custom derivatives do not survive."""
    return _evaluate(closed.jaxpr, closed.consts, args, pinned=True)


def _evaluate(jaxpr: Jaxpr, consts, args, *, pinned: bool):
    values: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
    values |= dict(zip(jaxpr.invars, args, strict=True))
    read = lambda v: v.val if isinstance(v, Literal) else values[v]
    for eqn in jaxpr.eqns:
        args = [read(v) for v in eqn.invars]
        if pinned and eqn.primitive.name in _HOLDERS:
            inner, consts = _open(eqn.params.get("jaxpr") or eqn.params.get("call_jaxpr"))
            outs = _evaluate(inner, consts, args, pinned=True)
        elif pinned and eqn.primitive.name == "reduce_sum" and jnp.issubdtype(args[0].dtype, jnp.floating):
            outs = [_round(_sum(args[0], eqn.params["axes"]))]
        elif pinned and eqn.primitive.name == "dot_general" and _is_row_by_row(*args, **eqn.params):
            outs = [_round(_row_by_row(*args, **eqn.params))]
        elif pinned:
            outs = [_round(x) for x in _bind(eqn, args, _pin_bodies(eqn))]
        else:
            outs = _bind(eqn, args, eqn.params)
        values.update(zip(eqn.outvars, outs, strict=True))
    return [read(v) for v in jaxpr.outvars]


def _open(jaxpr) -> tuple[Jaxpr, Sequence[Any]]:
    return (jaxpr.jaxpr, jaxpr.consts) if isinstance(jaxpr, ClosedJaxpr) else (jaxpr, ())


def _bind(eqn, args, params: Any) -> list[Any]:
    bound: Any = eqn.primitive.get_bind_params(params)  # (functions, params), or only params in newer jax
    functions, params = bound if isinstance(bound, tuple) and len(bound) == 2 else ((), bound)
    outs = eqn.primitive.bind(*functions, *args, **params)
    return outs if eqn.primitive.multiple_results else [outs]


def _pin_bodies(eqn) -> dict[str, Any]:
    """The parameters of an operation that runs other programs, with those programs pinned."""
    pinned = {
        name: jax.tree.map(_pin_jaxpr, eqn.params[name], is_leaf=_is_jaxpr)
        for name in _BODIES.get(eqn.primitive.name, ())
    }
    return eqn.params | pinned


def _is_jaxpr(x) -> bool:
    return isinstance(x, ClosedJaxpr)


def _pin_jaxpr(closed: ClosedJaxpr) -> ClosedJaxpr:
    return jax.make_jaxpr(lambda *args: evaluate_pinned(closed, args))(*closed.in_avals)


def _sum(x, axes: Sequence[int]):
    """Sums over `axes` in an order that does not depend on what stands around it."""
    axes = tuple(axes)
    if not axes or x.size == 0:
        return jnp.sum(x, axes)
    x = jnp.moveaxis(x, axes, range(-len(axes), 0))
    kept = x.shape[: x.ndim - len(axes)]
    rows = x.reshape(math.prod(kept), -1)
    ones = jnp.ones((rows.shape[1], 1), x.dtype)
    wide = jnp.promote_types(x.dtype, jnp.float32)
    total = jnp.matmul(rows, ones, precision=jax.lax.Precision.HIGHEST, preferred_element_type=wide)
    return total.astype(x.dtype).reshape(kept)


def _is_row_by_row(a, b, *, dimension_numbers, **_) -> bool:
    """A dot product for each batch entry, which XLA would turn into a sum."""
    (contract, _), (batch, _) = dimension_numbers
    return jnp.issubdtype(a.dtype, jnp.floating) and a.ndim == b.ndim == len(contract) + len(batch)


def _row_by_row(a, b, *, dimension_numbers, preferred_element_type=None, **_):
    (a_contract, b_contract), (a_batch, b_batch) = dimension_numbers
    dtype = preferred_element_type or jnp.result_type(a, b)
    wide = jnp.promote_types(dtype, jnp.float32)
    product = a.transpose(*a_batch, *a_contract).astype(wide) * b.transpose(*b_batch, *b_contract).astype(wide)
    return _sum(product, range(len(a_batch), product.ndim)).astype(dtype)


def _round(x):
    bits = _ROUNDING.get(getattr(x, "dtype", None))
    return jax.lax.reduce_precision(x, *bits) if bits else x
