"""Makes a program give the same bits wherever it is compiled into a larger one.

XLA may leave out a rounding to bf16 between two operations that it fuses ("excess precision"), and
it fuses differently where the result is also differentiated. A `reduce_precision` after each
low-precision result says that the rounding is meant, and XLA keeps it. Unlike the compiler option
`xla_allow_excess_precision=False`, which only the outermost `jax.jit` may set, this holds however
the caller compiles.
"""

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
        elif pinned:
            outs = [_round(x) for x in _bind(eqn, args, _pin_bodies(eqn))]
        else:
            outs = _bind(eqn, args, eqn.params)
        values.update(zip(eqn.outvars, outs, strict=True))
    return [read(v) for v in jaxpr.outvars]


def _open(jaxpr) -> tuple[Jaxpr, Sequence[Any]]:
    return (jaxpr.jaxpr, jaxpr.consts) if isinstance(jaxpr, ClosedJaxpr) else (jaxpr, ())


def _bind(eqn, args, params):
    bound = eqn.primitive.get_bind_params(params)  # (functions, params), or only params in newer jax
    functions, params = bound if isinstance(bound, tuple) and len(bound) == 2 else ((), bound)
    outs = eqn.primitive.bind(*functions, *args, **params)
    return outs if eqn.primitive.multiple_results else [outs]


def _pin_bodies(eqn) -> dict[str, Any]:
    """The parameters of an operation that runs other programs, with those programs pinned."""
    pinned = {
        name: jax.tree.map(_pin_jaxpr, eqn.params[name], is_leaf=_is_jaxpr)
        for name in _BODIES.get(eqn.primitive.name, ())
    }
    return {**eqn.params, **pinned}


def _is_jaxpr(x) -> bool:
    return isinstance(x, ClosedJaxpr)


def _pin_jaxpr(closed: ClosedJaxpr) -> ClosedJaxpr:
    return jax.make_jaxpr(lambda *args: evaluate_pinned(closed, args))(*closed.in_avals)


def _round(x):
    bits = _ROUNDING.get(getattr(x, "dtype", None))
    return jax.lax.reduce_precision(x, *bits) if bits else x
