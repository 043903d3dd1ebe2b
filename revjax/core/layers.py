"""Runs of layers, as the user gives them and as the two passes run them."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from .chunks import ChunkedFunction
from .coupling import AbstractCoupling
from .plan import Inputs, Keep, Reverse
from .streams import Exact, Float
from .trace import Function, trace

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Run:
    """A period of functions, repeated with its own parameters each time.

    Each `f(params, x)` returns the increment f(x), not x + f(x). It may return `(fx, extras)` instead, with
    `extras` a dict of any of
      aux    a pytree of outputs with gradients (a router's loss), stacked over repeats;
      tape   decisions (integers, booleans) that the backward pass must not take again: it calls f with
             them as `tape=`;
      cache  where a cache came in as `cache=`: what it became (forward only).

    Attributes:
      fns: one function, or a tuple of functions (a period: attention, then MLP).
      params_L: a pytree whose leaves have a leading axis of repeats; a tuple of them if `fns` is a tuple.
      side_L: likewise, what each f gets as `side=` (PRNG keys, say); not differentiated. None: nothing.
      cache_L: likewise, what each f gets as `cache=`.
      length: the number of repeats; needed only where no array tells.
    """

    fns: Any
    params_L: PyTree
    side_L: PyTree = None
    cache_L: PyTree = None
    length: Any = None

    def __post_init__(self):
        if not isinstance(self.fns, tuple | list):
            for name in ("fns", "params_L", "side_L", "cache_L"):
                object.__setattr__(self, name, (getattr(self, name),))
        object.__setattr__(self, "fns", tuple(self.fns))
        for name in ("params_L", "side_L", "cache_L"):
            value = getattr(self, name)
            value = (None,) * len(self.fns) if value is None else value
            if not isinstance(value, (tuple, list)) or len(value) != len(self.fns):
                raise ValueError(
                    f"Run.{name} must be a tuple with one entry for each of the {len(self.fns)} functions, but got "
                    f"{type(value).__name__}{f' of {len(value)}' if isinstance(value, (tuple, list)) else ''}."
                )
            object.__setattr__(self, name, tuple(value))
        lengths = {
            a.shape[0] if getattr(a, "ndim", 0) else None
            for a in jax.tree.leaves((self.params_L, self.side_L, self.cache_L))
        }
        lengths |= {self.length} if self.length is not None else set()
        if len(lengths) != 1 or None in lengths:
            raise ValueError(
                "Every array of a run must have the same leading axis, its number of repeats, but got "
                f"{sorted(map(str, lengths)) or 'no array (pass length=)'}. Stack the parameters of its layers, for "
                "example with jax.vmap of the initialiser over keys."
            )
        object.__setattr__(self, "length", lengths.pop())

    @property
    def num_fns(self) -> int:
        """How many f's the run applies, repeats counted."""
        return len(self.fns) * self.length


def as_runs(runs: Run | Sequence[Run]) -> list[Run]:
    runs = [runs] if isinstance(runs, Run) else list(runs)
    wrong = [type(run).__name__ for run in runs if not isinstance(run, Run)]
    if wrong or not runs:
        wrong = wrong or ["an empty list"]
        raise TypeError(f"runs must be a Run(fns, params_L) or a list of them, but got {', '.join(wrong)}.")
    return runs


@dataclasses.dataclass(frozen=True)
class Piece:
    """`length` repeats of the run `run`, from `start` on, of which the backward pass finds the same kept."""

    run: int
    start: int
    length: int
    keep: Keep

    def cut(self, tree_L: PyTree) -> PyTree:
        """What these repeats have of arrays of the whole run."""
        return jax.tree.map(lambda a: a[self.start : self.start + self.length], tree_L)


def pieces_of(keeps: Sequence[Sequence[tuple[int, Keep]]]) -> tuple[Piece, ...]:
    """The pieces of all runs, in the order in which they are applied; of keyframes, what remains is one of its own."""
    found: list[Piece] = []
    for i, parts in enumerate(keeps):
        start = 0
        for length, keep in parts:
            cuts = [(length, keep)]
            if isinstance(keep, Inputs) and (rest := length % keep.every):
                cuts = [(length - rest, keep), (rest, dataclasses.replace(keep, every=rest))]
            for n, kept in cuts:
                if n:
                    found.append(Piece(i, start, n, kept))
                start += n
    return tuple(found)


@dataclasses.dataclass(frozen=True, eq=False)
class Layers:
    """All that the two passes share and that is not an array: programs, coupling, arithmetic, plan.

    Attributes:
      pieces: parts of runs, in the order in which they are applied.
      fns: for each piece, its period of programs.
      replays: as `fns`, the programs that are run again from a tape (the same where f has no tape).
    """

    pieces: tuple[Piece, ...]
    fns: tuple[tuple[Function, ...], ...]
    replays: tuple[tuple[Function, ...], ...]
    coupling: AbstractCoupling
    arithmetic: Exact | Float
    constrain: Callable[[jax.Array], jax.Array]
    trees: dict[Function, Any] = dataclasses.field(default_factory=dict)  # of stored steps: forward to backward pass

    @staticmethod
    def trace(runs: Sequence[Run], x, shared, context, coupling, arithmetic, constrain, pieces) -> "Layers":
        stream = jax.eval_shape(lambda x: arithmetic.decode(arithmetic.encode(x)), x)
        fns, replays = [], []
        for piece in pieces:
            run, keep = runs[piece.run], piece.keep
            period, replay = [], []
            names = keep.names if isinstance(keep, Reverse) else ()
            for f, params_L, side_L, cache_L in zip(run.fns, run.params_L, run.side_L, run.cache_L, strict=True):
                params, side, cache = jax.eval_shape(
                    lambda t: jax.tree.map(lambda a: a[0], t), (params_L, side_L, cache_L)
                )
                inputs = given(side=side, shared=shared, context=context, cache=cache)
                inputs = jax.tree.map(jax.typeof, inputs)
                if hasattr(f, "chunking"):
                    period.append(_trace_chunk(f, params, stream, inputs, coupling))
                    replay.append(period[-1])
                    continue
                period.append(trace(f, params, stream, inputs, names))
                if coupling.linear and not isinstance(fx := period[-1].fx, jax.ShapeDtypeStruct):
                    came = jax.tree.map(lambda a: f"{a.dtype}{list(a.shape)}", fx)
                    came = "None (is a `return` missing?)" if fx is None else f"{came}".replace("'", "")
                    raise TypeError(
                        f"The coupling adds an array to x, but {getattr(f, '__name__', f)} returned {came}. Return fx, "
                        "or (fx, extras) with extras a dict of 'aux', 'tape', 'cache'."
                    )
                tape = period[-1].tape_shape
                replay.append(
                    trace(f, params, stream, inputs | {"tape": tape}, names) if tape is not None else period[-1]
                )
            if names and not any(fn.named for fn in period):
                raise ValueError(
                    f"The plan keeps what is named {' or '.join(map(repr, names))}, but no function of this run names "
                    f"anything so: y = jax.ad_checkpoint.checkpoint_name(y, {names[0]!r}), not inside a loop, a "
                    "condition or a chunk of tokens. (revjax.nn.Attention does.) Or use "
                    "plan='nothing', for this run alone where there are several."
                )
            if any(fn.named != again.named for fn, again in zip(period, replay, strict=True)):
                raise ValueError("A function with a tape must name the same values with and without `tape=`.")
            fns.append(tuple(period))
            replays.append(tuple(replay))
        return Layers(tuple(pieces), tuple(fns), tuple(replays), coupling, arithmetic, constrain)

    @functools.cached_property
    def place(self) -> dict[Any, int]:
        """Where in its period a program stands."""
        return {fn: j for periods in (self.fns, self.replays) for period in periods for j, fn in enumerate(period)}

    def num_fns(self, i: int) -> int:
        """How many f's piece i applies."""
        return len(self.fns[i]) * self.pieces[i].length

    def shared_inputs(self, i: int, diff: PyTree, rest: PyTree, *, replay: bool) -> dict[str, PyTree]:
        """What every layer of piece i gets: of (params, context, closures) and (sides, shared, ...).

        The parameters are those of all repeats of the run, of which each layer takes its own (`of_layer`).
        """
        params = diff[0][self.pieces[i].run]
        return {"params": params, "context": diff[1], "shared": rest[1], "closures": diff[2][i][replay]}

    def layer_inputs(self, i: int, rest: PyTree) -> tuple[dict[str, PyTree], ...]:
        """What each layer of piece i gets, for each f of its period, with a leading axis of repeats."""
        sides, _, numbers, caches, indices = rest
        piece, period = self.pieces[i], len(self.fns[i])
        start, stop = sum(map(self.num_fns, range(i))), sum(map(self.num_fns, range(i + 1)))
        return tuple(
            {
                "layer": indices[i],
                "side": piece.cut(sides[piece.run][j]),
                "number": jax.tree.map(lambda a, j=j: a[start + j : stop : period], numbers),
                "cache": piece.cut(caches[piece.run][j]),
            }
            for j in range(period)
        )

    @property
    def closures(self) -> PyTree:
        """What the functions closed over: for each run, of each f as it is first run and as it is replayed."""
        of = lambda periods: tuple(tuple(fn.closure for fn in period) for period in periods)
        return tuple(zip(of(self.fns), of(self.replays), strict=True))


def _trace_chunk(f, params, x, inputs, coupling: AbstractCoupling) -> ChunkedFunction:
    if not coupling.linear:
        raise ValueError(f"by_tokens needs a coupling that is linear in f, but {type(coupling).__name__} is not.")
    if len(x.shape) < 3:
        raise ValueError(f"by_tokens cuts x (B, T, ..., D) along T, but x has the shape {x.shape}.")
    num = f.chunking.num_chunks(x.shape[1])
    chunk = jax.eval_shape(lambda x: x[:, : -(-x.shape[1] // num)], x)
    fn = trace(f, params, chunk, inputs)
    if fn.has_extras:
        raise ValueError("A function under by_tokens may return fx only, without extras (aux, tape, cache).")
    return ChunkedFunction(fn, f.chunking, num)


def of_layer(params_L: PyTree, layer: jax.Array) -> PyTree:
    """The parameters of one repeat. So a loop over some of a run's layers needs no copy of theirs."""
    take = lambda a: jax.lax.dynamic_index_in_dim(a, layer, keepdims=False, allow_negative_indices=False)
    return jax.tree.map(take, params_L)


def given(**inputs: PyTree) -> dict[str, PyTree]:
    """The keywords that f is called with: those that hold something."""
    return {name: value for name, value in inputs.items() if jax.tree.leaves(value)}


def by_f(per_fn_L: Sequence[jax.Array]) -> jax.Array:
    """For each f of a period (L, ...) -> (L * period, ...), in the order in which they are applied."""
    stacked = jnp.stack(per_fn_L, axis=1)
    return stacked.reshape(-1, *stacked.shape[2:])
