"""Makes a program give the same bits wherever it is compiled into a larger one.

f is compiled twice, alone and beside its gradient, and XLA compiles by the neighbourhood. What it may do to
numbers then, and what stops it, however the caller compiles (causes seen on CPU; on an H200, too, nearly all layers
were rebuilt wrong without. A compiler option could stop the first, but only the outermost `jax.jit` may set options):

  It leaves out a rounding to bf16 between two operations that it fuses. `reduce_precision` says that the
  rounding is meant. So arithmetic in low precision becomes fp32 arithmetic that is rounded once,

      y = convert(reduce_precision(op(wide(a), wide(b))))        wide: the same numbers in fp32

  which leaves nothing to round inside an operation that XLA takes apart, such as a logistic function. On a GPU,
  where `reduce_precision` costs more than reading a number (a dozen operations), the conversion itself rounds, and
  its bits are sealed, as below; what a matrix product stores in low precision is read as it is.

  It merges a product with the sum that reads it (fused multiply-add: one rounding for two), or a root or
  quotient with the product that reads it, if nothing else does; and a quotient by one number becomes a product
  with its reciprocal. Such a result, or such a number, is sealed: its bits go through an `or` with an integer 0
  that the compiler cannot know to be 0.

  It adds along an axis in another order, as it vectorises the loop. Sums of floats are products with a
  vector of ones instead, which XLA does not fuse away.

  It computes exp, log, ... by other approximations in a loop of another shape: see `transcendental`.

  It compiles a small loop as one function. `opaque_zero` keeps it from that.
"""

import functools
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.extend import source_info_util
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from . import transcendental

_ROUNDING = {jnp.dtype("bfloat16"): (8, 7), jnp.dtype("float16"): (5, 10)}  # exponent and mantissa bits
_HOLDERS = {"pjit", "jit", "closed_call", "core_call", "custom_jvp_call", "custom_vjp_call", "checkpoint", "remat2"}
_LOOPS = {"scan", "while", "cond"}

# Computed in fp32 and rounded once.
_ARITHMETIC = set(
    "add add_any sub mul div rem pow integer_pow square sqrt rsqrt cbrt exp exp2 expm1 log log1p logistic tanh sin cos "
    "tan asin acos atan atan2 sinh cosh asinh acosh atanh erf erfc erf_inv lgamma digamma".split()
)
_SUMS = {"add", "add_any", "sub"}
_ROOTS = {"sqrt", "rsqrt", "cbrt", "exp", "exp2", "log", "pow", "div", "logistic"}  # XLA merges them into products
_SHAPES = set("reshape squeeze expand_dims broadcast_in_dim slice".split())
# Exact, on numbers that are rounded already; cheap in fp32, so that neighbouring arithmetic needs no conversion.
_EXACT = _SHAPES | set("neg abs sign max min clamp round floor ceil select_n".split())
# Exact, and left in low precision: their results are likely to be stored, or multiplied.
_MOVES = set(
    "transpose concatenate pad rev gather dynamic_slice dynamic_update_slice split copy sort reduce_max reduce_min "
    "cummax cummin optimization_barrier".split()
)


def pin(f: Callable) -> Callable:
    """Returns `f` with every intermediate result rounded exactly once, and in an order of its own.

    The bodies of scans, loops and conditions are pinned as well. Custom derivatives do not survive:
    pin a function that is already differentiated, `pin(lambda *xs: jax.vjp(f, *xs))`.
    """
    return lambda *args: pinned(f, jax.lax.optimization_barrier(jnp.zeros((), jnp.int32)))(*args)


def pinned(f: Callable, zero: jax.Array) -> Callable:
    """As `pin`, with a 0 that the compiler cannot know to be 0 (`opaque_zero`), which `pin` can only hope for."""

    def run(*args):
        leaves, treedef = jax.tree.flatten(args)
        closed, shape = jax.make_jaxpr(lambda *xs: f(*jax.tree.unflatten(treedef, xs)), return_shape=True)(*leaves)
        return jax.tree.unflatten(jax.tree.structure(shape), evaluate_pinned(closed, leaves, zero))

    return run


def opaque_zero(layer: jax.Array) -> jax.Array:
    """An int32 0 that the compiler cannot know to be 0, from the index of a loop over layers.

    On CPU it comes out of a sort. XLA may compile a loop that only does arithmetic as one function, with other
    roundings than where each operation is one; a loop that sorts it leaves alone (SmallWhileLoopHoistingPass).
    """
    zero = layer & 2**30
    sort = lambda zero, layer: jnp.sort(jnp.stack([zero, layer]))[0]
    return jax.lax.platform_dependent(zero, layer, cpu=sort, default=lambda zero, layer: zero)


def evaluate(closed: ClosedJaxpr, args: Sequence[Any]) -> list[Any]:
    """Runs a jaxpr as it is; custom derivatives survive."""
    return _run(closed.jaxpr, closed.consts, args, lambda eqn, args: _bind(eqn, args, eqn.params))


def evaluate_pinned(closed: ClosedJaxpr, args: Sequence[Any], zero: jax.Array) -> list[Any]:
    """Runs a jaxpr with every result rounded; custom derivatives do not survive.

    `zero` is an int32 0 that the compiler cannot know to be 0.
    """
    return _run(closed.jaxpr, closed.consts, args, _Pinned(closed.jaxpr, zero))


def rewired(closed: ClosedJaxpr, *, given: Sequence[Any] = (), also: Sequence[Any] = ()) -> ClosedJaxpr:
    """A program without functions in it, so that each of its variables, but those of loops, has one value.

    Args:
      given: variables of `closed` that become inputs, after the others; what computed them is left out.
      also: variables of `closed` that become results, after the others.
    """

    def apply(eqn, args):
        if eqn.primitive.name in _HOLDERS:
            return _run(*_inner(eqn), args, apply)
        return _bind(eqn, args, eqn.params)

    def run(*args):
        known = dict(zip(given, args[len(closed.in_avals) :], strict=True))
        outs = [*closed.jaxpr.outvars, *also]
        return _run(closed.jaxpr, closed.consts, args[: len(closed.in_avals)], apply, known, outs)

    return jax.make_jaxpr(run)(*closed.in_avals, *(v.aval for v in given))


def _run(jaxpr: Jaxpr, consts, args, apply: Callable[[Any, list], list], known=None, outvars=None) -> list[Any]:
    values: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
    values |= dict(zip(jaxpr.invars, args, strict=True)) | (known or {})
    read = lambda v: v.val if isinstance(v, Literal) else values[v]
    for eqn in jaxpr.eqns:
        info = eqn.source_info  # profilers and error messages name the line of f that an operation comes from
        with source_info_util.user_context(
            info.traceback, name_stack=source_info_util.current_name_stack() + info.name_stack
        ):
            values.update(zip(eqn.outvars, apply(eqn, [read(v) for v in eqn.invars]), strict=True))
            values |= known or {}
    return [read(v) for v in outvars or jaxpr.outvars]


def _inner(eqn) -> tuple[Jaxpr, Sequence[Any]]:
    jaxpr = eqn.params.get("jaxpr") or eqn.params.get("call_jaxpr")
    return (jaxpr.jaxpr, jaxpr.consts) if isinstance(jaxpr, ClosedJaxpr) else (jaxpr, ())


def _read_by(jaxpr: Jaxpr, readers: Collection[str], found: set) -> set:
    """Adds to `found` the variables that operations named in `readers` read, directly or moved."""
    for eqn in reversed(jaxpr.eqns):
        name = eqn.primitive.name
        if name in _HOLDERS:
            inner, _ = _inner(eqn)
            found |= _variables(v for v, out in zip(inner.outvars, eqn.outvars, strict=True) if out in found)
            _read_by(inner, readers, found)
            found |= _variables(v for v, arg in zip(eqn.invars, inner.invars, strict=True) if arg in found)
        elif name in readers or (name in _EXACT | _MOVES and any(v in found for v in eqn.outvars)):
            found |= _variables(eqn.invars)
    return found


def _variables(atoms) -> set:
    return {v for v in atoms if not isinstance(v, Literal)}


class _Pinned:
    """Applies operations one by one, and remembers which arrays are rounded.

    Arrays are known by their id; they are held as well, so that no id is used again.
    """

    def __init__(self, jaxpr: Jaxpr, zero):
        self.zero = zero
        self.constant: dict[int, Any] = {}  # what depends on no argument
        self.added = _read_by(jaxpr, _SUMS, set())
        self.multiplied = _read_by(jaxpr, _ARITHMETIC - _SUMS, set())
        self.in_short_loops = transcendental.in_short_loops(jaxpr)
        self.wide: dict[int, tuple[Any, Any]] = {}  # a rounded low-precision array, and the same numbers in fp32
        self.reduced: dict[int, tuple[Any, tuple]] = {}  # an fp32 array, and the bits that it was reduced to

    def __call__(self, eqn, args: list) -> list[Any]:
        outs = self._apply(eqn, args)
        if self._are_constant(args):
            self.constant |= {id(y): y for y in outs}
        return outs

    def _apply(self, eqn, args: list) -> list[Any]:
        name, params = eqn.primitive.name, eqn.params
        if name in _HOLDERS:
            inner, consts = _inner(eqn)
            return _run(inner, consts, args, self)
        if name == "reduce_sum" and _is_float(args[0]):
            return [self._round(_sum(args[0], params["axes"]))]
        if name == "reduce_window_sum" and _is_of_whole_axes(args[0], **params):
            axes = [i for i, size in enumerate(params["window_dimensions"]) if size > 1]
            return [self._round(jnp.expand_dims(_sum(args[0], axes), axes))]
        if name == "dot_general" and _is_row_by_row(*args, **params):
            return [self._round(_row_by_row(*args, **params))]
        if name == "convert_element_type" and {args[0].dtype, params["new_dtype"]} & _ROUNDING.keys():
            return [self._convert(args[0], params["new_dtype"])]
        if name in _ARITHMETIC | _EXACT and _bits(eqn.outvars[0].aval):
            (y,) = self._bind(eqn, [self._widen(a) for a in args])
            rounded = name in _EXACT and self._are_rounded(args)
            low = self._bind(eqn, args)[0] if name in _SHAPES and rounded else None
            return [self._narrow(y, eqn.outvars[0].aval.dtype, rounded=rounded, low=low)]
        outs = self._loop(name, params, args) if name in _LOOPS else self._bind(eqn, args)
        if self._is_sealed(eqn, args):
            return [self._seal(outs[0])]
        if name == "reduce_precision":
            self.reduced[id(outs[0])] = outs[0], (params["exponent_bits"], params["mantissa_bits"])
        rounded = name in _MOVES and self._are_rounded(args)
        return [self._round(y, rounded=rounded) for y in outs]

    def _bind(self, eqn, args: list) -> list[Any]:
        name = eqn.primitive.name
        if self._are_constant(args):
            return _bind(eqn, args, eqn.params)
        if name == "div":  # of what is divided by, XLA would take the reciprocal where it is one number for all
            args = [args[0], args[1] if self._are_constant(args[1:]) else self._seal(args[1])]
        if name == "rsqrt":
            return [transcendental.rsqrt(args[0], self._seal)]
        is_function = name in transcendental.FUNCTIONS
        if is_function and (name in transcendental.ALWAYS_APART or eqn.outvars[0] in self.in_short_loops):
            return [transcendental.apart(lambda *xs: _bind(eqn, xs, eqn.params)[0], args, self.zero)]
        return _bind(eqn, args, eqn.params)

    def _is_sealed(self, eqn, args) -> bool:
        name = eqn.primitive.name
        if name not in _ARITHMETIC - _SUMS or self._are_constant(args):
            return False  # constants (rotary angles) are the same in all layers, and XLA computes them once
        (out,) = eqn.outvars
        return out in self.added or (name in _ROOTS and out in self.multiplied)

    def _seal(self, x):
        """fp32 (or fp64), rounded: not to be merged with what follows."""
        return _sealed(x, self.zero) if _is_float(x) and x.dtype.itemsize in (4, 8) else x

    def _loop(self, name: str, params: dict[str, Any], args: list) -> list:
        """An operation that runs other programs, with those programs pinned."""
        run = lambda closed, *groups: evaluate_pinned(closed, [x for group in groups for x in group], self.zero)
        if name == "cond":
            index, *operands = args
            branches = [lambda *xs, branch=branch: run(branch, xs) for branch in params["branches"]]
            return jax.lax.switch(index, branches, *operands)
        if name == "while":
            n, m = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
            goes_on = lambda carry: run(params["cond_jaxpr"], args[:n], carry)[0]
            return jax.lax.while_loop(goes_on, lambda carry: run(params["body_jaxpr"], args[n:m], carry), args[m:])
        n, m = _scan_sizes(params)

        def body(carry, xs):
            outs = run(params["jaxpr"], args[:n], carry, xs)
            return outs[: len(carry)], outs[len(carry) :]

        how = {name: params[name] for name in ("length", "reverse", "unroll")}
        carry, ys = jax.lax.scan(body, args[n : n + m], args[n + m :], **how)
        return [*carry, *ys]

    def _convert(self, x, dtype):
        if dtype == jnp.float32:
            return self._widen(x)
        if x.dtype == jnp.float32:
            rounded = id(x) in self.reduced and self.reduced[id(x)][1] == _ROUNDING[dtype]
            return self._narrow(x, dtype, rounded=rounded)
        return self._round(jax.lax.convert_element_type(x, dtype))

    def _are_constant(self, args) -> bool:
        return all(id(a) in self.constant or not isinstance(a, Tracer) for a in args)

    def _are_rounded(self, args) -> bool:
        return all(id(a) in self.wide or not isinstance(a, Tracer) for a in args if _bits(a))

    def _widen(self, x):
        """Low precision -> fp32."""
        if not _bits(x):
            return x
        return self.wide[id(x)][1] if id(x) in self.wide else jnp.asarray(x).astype(jnp.float32)

    def _narrow(self, wide, dtype, *, rounded: bool = False, low=None):
        """fp32 -> low precision; `rounded` says that nothing is lost by it, and `low` is the same, if it is there."""

        def reduced(wide, low, zero):
            wide = wide if rounded else jax.lax.reduce_precision(wide, *_ROUNDING[dtype])
            return wide.astype(dtype), wide

        def sealed(wide, low, zero):
            """Cheaper where arithmetic is not free beside memory, and what an operation stores in `low` stays there."""
            if low is not None:
                return low, _sealed(low, zero).astype(jnp.float32)
            if rounded:
                return wide.astype(dtype), wide
            low = _sealed(wide.astype(dtype), zero)
            return low, low.astype(jnp.float32)

        x, wide = jax.lax.platform_dependent(wide, low, self.zero, cuda=sealed, default=reduced)
        self.wide[id(x)] = x, wide
        return x

    def _round(self, x, *, rounded: bool = False):
        if not _bits(x):
            return x
        return self._narrow(jnp.asarray(x).astype(jnp.float32), x.dtype, rounded=rounded, low=jnp.asarray(x))


def _sealed(x, zero):
    """The same float, of bits that the compiler cannot know."""
    ints = {2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint64}[x.dtype.itemsize]
    zeros = jnp.broadcast_to(zero.astype(ints), x.shape)
    return jax.lax.bitcast_convert_type(jax.lax.bitcast_convert_type(x, ints) | zeros, x.dtype)


def _bind(eqn, args, params: Any) -> list[Any]:
    bound: Any = eqn.primitive.get_bind_params(params)  # (functions, params), or only params in newer jax
    functions, params = bound if isinstance(bound, tuple) and len(bound) == 2 else ((), bound)
    outs = eqn.primitive.bind(*functions, *args, **params)
    return outs if eqn.primitive.multiple_results else [outs]


def _scan_sizes(params: dict[str, Any]) -> tuple[int, int]:
    """How many constants and how many carried values a scan has."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    consts, carry, _ = params["ft_in"].unpack()  # jax 0.12
    return len(consts.vals), len(carry.vals)


def _sum(x, axes: Sequence[int]):
    """Sums over `axes` in an order that does not depend on what stands around it."""
    axes = tuple(axes)
    if not axes or x.size == 0:
        return jnp.sum(x, axes)
    ones, of_ones = jnp.ones([x.shape[i] for i in axes], x.dtype), tuple(range(len(axes)))
    wide, highest = jnp.promote_types(x.dtype, jnp.float32), jax.lax.Precision.HIGHEST
    dot = functools.partial(jax.lax.dot_general, precision=highest, preferred_element_type=wide)
    if x.ndim - 1 in axes:  # sums of rows
        total = dot(x, ones[..., None], ((axes, of_ones), ((), ())))[..., 0]
    else:  # of columns: 3 to 5 times faster on CPU from this side, and a fifth of a whole step at T = 512
        total = dot(ones[None], x, (((*(i + 1 for i in of_ones),), axes), ((), ())))[0]
    return total.astype(x.dtype)


def _is_of_whole_axes(x, *, window_dimensions, window_strides, padding, base_dilation, window_dilation) -> bool:
    """A sum over windows that is a sum over axes."""
    windows = zip(window_dimensions, window_strides, x.shape, strict=True)
    whole = all(w == size or w == stride == 1 for w, stride, size in windows)
    dense = not any(map(any, padding)) and {*base_dilation, *window_dilation} == {1}
    return whole and dense and max(window_dimensions) > 1 and _is_float(x)


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
