"""Functions that treat each token alone (an MLP), run in chunks of tokens so that one chunk's hidden layer exists.

    f(x)[:, t] depends on x[:, t] only        x (B, T, ..., D), cut along T

The backward pass knows df before it runs f (the recurrence is linear in f), so one loop evaluates a chunk
and transposes it at once: memory of one chunk, and no product done twice. Under plans that store, or
recompute several layers, every chunk's activations are kept until they are needed.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from .pin import pinned
from .trace import Function, Result, split
from .varying import vary_alike

PyTree = Any


def by_tokens(f: Callable, chunk_tokens: int, side_of_chunk: Callable | None = None) -> Callable:
    """Marks a residual function for being run in chunks of at most `chunk_tokens` along axis 1 of x.

    Args:
      f: treats each token alone; it may return no extras (aux, tape, cache).
      chunk_tokens: the most tokens of a row in one chunk. Chunks are even; the last is filled up with zeros,
        whose results are dropped.
      side_of_chunk: `(side, i) -> side` of chunk i: for PRNG keys, which must differ between chunks.
    """
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be at least 1, but got {chunk_tokens}.")

    def marked(*args, **kwargs):
        return f(*args, **kwargs)

    marked.__name__ = getattr(f, "__name__", type(f).__name__)
    marked.chunking = Chunking(chunk_tokens, side_of_chunk or (lambda side, i: side))
    return marked


@dataclasses.dataclass(frozen=True)
class Chunking:
    """How `by_tokens` asked for a function to be run."""

    chunk_tokens: int
    side_of_chunk: Callable

    def num_chunks(self, num_tokens: int) -> int:
        return max(1, -(-num_tokens // self.chunk_tokens))


@dataclasses.dataclass(frozen=True, eq=False)
class ChunkedFunction:
    """A `Function` of one chunk, applied to all of them."""

    fn: Function
    chunking: Chunking
    num: int

    @property
    def closure(self):
        return self.fn.closure

    @property
    def tape_shape(self):
        return None

    @property
    def named(self) -> list[Any]:
        return []

    def __call__(self, args: PyTree, zero: jax.Array, *, vjp: bool, named: Sequence[jax.Array] = ()) -> Result:
        def one(_, xs):
            f = self.fn(self._chunk(args, *xs), zero, vjp=vjp)
            return None, (f.fx, f.leaves)

        _, (fx, leaves) = jax.lax.scan(one, None, self._chunks(args))
        return Result(self._join(fx, args[1].shape[1]), None, None, None, leaves, ())

    def transpose(self, args: PyTree, leaves: list[jax.Array], cotangents: PyTree) -> PyTree:
        def one(total, xs):
            i, dfx, leaves = xs
            chunk = self._chunk(args, args[1], i)  # x is among the leaves
            return self._add(total, self.fn.transpose(chunk, leaves, (dfx, None))[0])

        xs = (jnp.arange(self.num), self._split(cotangents[0]), leaves)
        return self._gradients(*jax.lax.scan(one, self._zeros(args), xs), cotangents[0].shape[1])

    def evaluate_and_transpose(self, args: PyTree, dfx: jax.Array, zero: jax.Array) -> tuple[jax.Array, PyTree]:
        """Returns f(x) and the gradients, holding the activations of one chunk at a time."""

        def one(total, xs):
            x, i, dfx = xs
            chunk = self._chunk(args, x, i)
            f = self.fn(chunk, zero, vjp=True)
            add = lambda total, dfx: self._add(total, self.fn.transpose(chunk, f.leaves, (dfx, None))[0])
            total, dx = pinned(add, zero)(total, dfx)
            return total, (f.fx, dx)

        total, (fx, dx) = jax.lax.scan(one, self._zeros(args), (*self._chunks(args), self._split(dfx)))
        return self._join(fx, dfx.shape[1]), self._gradients(total, dx, dfx.shape[1])

    def _gradients(self, total, dx, num_tokens: int):
        dparams, dinputs, dclosure = total
        return ((dparams, self._join(dx, num_tokens), dinputs, dclosure),)

    def _add(self, total, gradients):
        dparams, dx, dinputs, dclosure = gradients
        return jax.tree.map(lambda t, d: t + d.astype(t.dtype), total, (dparams, dinputs, dclosure)), dx

    def _zeros(self, args):
        """Where the sums over chunks begin: at least float32."""
        (params, _, inputs, closure), _ = split(args)
        zeros = lambda a: jnp.zeros(a.shape, jnp.promote_types(a.dtype, jnp.float32))
        return vary_alike(jax.tree.map(zeros, (params, inputs, closure)), like=args)

    def _chunks(self, args):
        return self._split(args[1]), jnp.arange(self.num)

    def _chunk(self, args, x, i):
        params, _, inputs, closure = args
        if "side" in inputs:
            inputs = inputs | {"side": self.chunking.side_of_chunk(inputs["side"], i)}
        return params, x, inputs, closure

    def _split(self, x):
        """(B, T, ...) -> (chunks, B, T / chunks, ...), filled up with zeros."""
        missing = -x.shape[1] % self.num
        x = jnp.pad(x, ((0, 0), (0, missing), *((0, 0),) * (x.ndim - 2)))
        return jnp.moveaxis(x.reshape(x.shape[0], self.num, -1, *x.shape[2:]), 1, 0)

    def _join(self, x, num_tokens: int):
        return jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:])[:, :num_tokens]
