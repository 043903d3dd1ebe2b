"""Makes a program give the same bits wherever it is compiled into a larger one.

XLA may leave out a rounding to bf16 between two operations that it fuses ("excess precision"), and
it fuses differently where the result is also differentiated. A `reduce_precision` says that a rounding
is meant, and XLA keeps it. Unlike the compiler option `xla_allow_excess_precision=False`, which only the
outermost `jax.jit` may set, this holds however the caller compiles. So arithmetic in low precision becomes

    y = convert(reduce_precision(op(wide(a), wide(b))))        wide: the same numbers in fp32

which rounds once for each operation, as a bf16 processor would, and leaves nothing to round inside an
operation that XLA takes apart (a logistic function). What only moves numbers needs no rounding.

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
from jax.core import Tracer
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

_ROUNDING = {jnp.dtype("bfloat16"): (8, 7), jnp.dtype("float16"): (5, 10)}  # exponent and mantissa bits
_HOLDERS = {"pjit", "jit", "closed_call", "core_call", "custom_jvp_call", "custom_vjp_call", "checkpoint", "remat2"}
_BODIES = {"scan": ("jaxpr",), "while": ("cond_jaxpr", "body_jaxpr"), "cond": ("branches",)}

# Computed in fp32 and rounded once.
_ARITHMETIC = set(
    "add add_any sub mul div rem pow integer_pow square sqrt rsqrt cbrt exp exp2 expm1 log log1p logistic tanh sin cos "
    "tan asin acos atan atan2 sinh cosh asinh acosh atanh erf erfc erf_inv lgamma digamma".split()
)
# Exact, on numbers that are rounded already; cheap in fp32, so that neighbouring arithmetic needs no conversion.
_EXACT = set(
    "neg abs sign max min clamp round floor ceil select_n reshape squeeze expand_dims broadcast_in_dim slice".split()
)
# Exact, and left in low precision: their results are likely to be stored, or multiplied.
_MOVES = set(
    "transpose concatenate pad rev gather dynamic_slice dynamic_update_slice split copy sort reduce_max reduce_min "
    "cummax cummin optimization_barrier".split()
)


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
    return _run(closed.jaxpr, closed.consts, args, lambda eqn, args: _bind(eqn, args, eqn.params))


def evaluate_pinned(closed: ClosedJaxpr, args: Sequence[Any]) -> list[Any]:
    """Runs a jaxpr with every low-precision result rounded; custom derivatives do not survive."""
    return _run(closed.jaxpr, closed.consts, args, _Pinned())


def _run(jaxpr: Jaxpr, consts, args, apply: Callable[[Any, list], list]) -> list[Any]:
    values: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
    values |= dict(zip(jaxpr.invars, args, strict=True))
    read = lambda v: v.val if isinstance(v, Literal) else values[v]
    for eqn in jaxpr.eqns:
        values.update(zip(eqn.outvars, apply(eqn, [read(v) for v in eqn.invars]), strict=True))
    return [read(v) for v in jaxpr.outvars]


class _Pinned:
    """Applies operations one by one, and remembers which arrays are rounded.

    Arrays are known by their id; they are held as well, so that no id is used again.
    """

    def __init__(self):
        self.wide: dict[int, tuple[Any, Any]] = {}  # a rounded low-precision array, and the same numbers in fp32
        self.reduced: dict[int, tuple[Any, tuple]] = {}  # an fp32 array, and the bits that it was reduced to

    def __call__(self, eqn, args: list) -> list[Any]:
        name, params = eqn.primitive.name, eqn.params
        if name in _HOLDERS:
            inner, consts = _open(params.get("jaxpr") or params.get("call_jaxpr"))
            return _run(inner, consts, args, self)
        if name == "reduce_sum" and _is_float(args[0]):
            return [self._round(_sum(args[0], params["axes"]))]
        if name == "dot_general" and _is_row_by_row(*args, **params):
            return [self._round(_row_by_row(*args, **params))]
        if name == "convert_element_type" and {args[0].dtype, params["new_dtype"]} & _ROUNDING.keys():
            return [self._convert(args[0], params["new_dtype"])]
        if _bits(eqn.outvars[0].aval) and name in _ARITHMETIC | _EXACT:
            (y,) = _bind(eqn, [self._widen(a) for a in args], params)
            rounded = name in _EXACT and self._are_rounded(args)
            return [self._narrow(y, eqn.outvars[0].aval.dtype, rounded=rounded)]
        outs = _bind(eqn, args, _pin_bodies(eqn))
        if name == "reduce_precision":
            self.reduced[id(outs[0])] = outs[0], (params["exponent_bits"], params["mantissa_bits"])
        rounded = name in _MOVES and self._are_rounded(args)
        return [self._round(y, rounded=rounded) for y in outs]

    def _convert(self, x, dtype):
        if dtype == jnp.float32:
            return self._widen(x)
        if x.dtype == jnp.float32:
            rounded = id(x) in self.reduced and self.reduced[id(x)][1] == _ROUNDING[dtype]
            return self._narrow(x, dtype, rounded=rounded)
        return self._round(jax.lax.convert_element_type(x, dtype))

    def _are_rounded(self, args) -> bool:
        return all(id(a) in self.wide or not isinstance(a, Tracer) for a in args if _bits(a))

    def _widen(self, x):
        """Low precision -> fp32."""
        if not _bits(x):
            return x
        return self.wide[id(x)][1] if id(x) in self.wide else jnp.asarray(x).astype(jnp.float32)

    def _narrow(self, wide, dtype, *, rounded: bool = False):
        """fp32 -> low precision; `rounded` says that nothing is lost by it."""
        wide = wide if rounded else jax.lax.reduce_precision(wide, *_ROUNDING[dtype])
        x = wide.astype(dtype)
        self.wide[id(x)] = x, wide
        return x

    def _round(self, x, *, rounded: bool = False):
        return self._narrow(jnp.asarray(x).astype(jnp.float32), x.dtype, rounded=rounded) if _bits(x) else x


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


def _bits(x) -> tuple[int, int] | None:
    """Exponent and mantissa bits, if `x` is of low precision."""
    return _ROUNDING.get(getattr(x, "dtype", None))


def _is_float(x) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)
