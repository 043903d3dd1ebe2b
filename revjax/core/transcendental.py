"""The same bits from exp, log, tanh, ..., whatever loop they are computed in.

XLA for CPU computes such a function for as many elements at once as the loop allows that it stands in, with other
approximations for other numbers of them; and the loop is that of all operations that XLA fuses, which differ beside a
gradient. Seen where the innermost dimension is short or not a multiple of the width: erf and digamma in jax 0.10, and
in jax 0.12 exp, exp2, log, log1p, tanh, logistic, rsqrt and erf. On CPU, therefore:

  A function that may come into such a loop is computed apart, on flat arrays, in a program of its own. (lgamma always.)
  rsqrt(x) is 1 / sqrt(x), each of which is rounded correctly, as IEEE 754 has it.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

FUNCTIONS = set(
    "pow cbrt exp exp2 expm1 log log1p logistic tanh sin cos tan asin acos atan atan2 sinh cosh asinh acosh atanh erf "
    "erfc erf_inv lgamma digamma".split()
)
# To XLA these are many products and sums, which it merges otherwise beside others, in a long loop too.
ALWAYS_APART = {"lgamma"}
_WIDTH = 16  # elements at once, at most: fp32 in 512 bits
# No loop goes through these: XLA for CPU fuses nothing with them. (`pin` makes products of sums.)
_APART = set("dot_general reduce_sum reduce_window_sum conv_general_dilated scan while cond sort".split())


def in_short_loops(jaxpr: Jaxpr) -> set[Any]:
    """The variables that may be computed in a loop whose innermost dimension is not a multiple of the width.

    Those that have such a shape, and all that operations which XLA may fuse connect with them.
    """
    parent: dict[Any, Any] = {}  # union-find

    def root(v):
        while parent.setdefault(v, v) is not v:
            v = parent[v]
        return v

    def connect(jaxpr: Jaxpr) -> None:
        for eqn in jaxpr.eqns:
            variables = [v for v in (*eqn.invars, *eqn.outvars) if not isinstance(v, Literal)]
            inner = eqn.params.get("jaxpr") or eqn.params.get("call_jaxpr")
            if eqn.primitive.name in _APART:
                groups = []
            elif inner is not None:
                inner = inner.jaxpr if isinstance(inner, ClosedJaxpr) else inner
                connect(inner)
                groups = [*zip(eqn.invars, inner.invars), *zip(eqn.outvars, inner.outvars)]
            else:
                groups = [[v for v in variables if not _is_spread(v, eqn)]]
            for group in groups:
                group = [v for v in group if not isinstance(v, Literal)]
                for v in group[1:]:
                    parent[root(v)] = root(group[0])

    connect(jaxpr)
    short = {root(v) for v in list(parent) if _is_short(v.aval.shape)}
    return {v for v in list(parent) if root(v) in short}


def _is_spread(v: Any, eqn: Any) -> bool:
    """Whether each element of `v` is read for many of the result: then `v` does not make the loop short."""
    if eqn.primitive.name in ("concatenate", "pad", "dynamic_update_slice") or not eqn.outvars:
        return False
    shape, of = v.aval.shape, eqn.outvars[0].aval.shape
    fits = len(shape) == len(of) and all(a in (1, b) for a, b in zip(shape, of))
    return math.prod(shape) < math.prod(of) and (fits or eqn.primitive.name == "broadcast_in_dim")


def _is_short(shape: Sequence[int]) -> bool:
    long = [n for n in shape if n > 1]
    return bool(long) and long[-1] % _WIDTH != 0


def apart(f: Callable, args: Sequence[jax.Array], zero: jax.Array) -> jax.Array:
    """f(*args), elementwise, on CPU in a program of its own: the branch of a condition that always holds.

    `zero` is an int32 0 that the compiler cannot know to be 0.
    """
    shape = jnp.broadcast_shapes(*(jnp.shape(a) for a in args))

    def alone(zero, *args):
        flat = [jnp.broadcast_to(a, shape).reshape(-1) for a in args]
        return jax.lax.cond(zero == 0, f, lambda *xs: xs[0], *flat).reshape(shape)

    return jax.lax.platform_dependent(zero, *args, cpu=alone, default=lambda zero, *args: f(*args))


def rsqrt(x: jax.Array, seal: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """1 / sqrt(x) in two operations that are rounded correctly; `seal` keeps XLA from making one of them."""
    exact = lambda x: 1 / seal(jnp.sqrt(x))
    return jax.lax.platform_dependent(x, cpu=exact, default=jax.lax.rsqrt)
