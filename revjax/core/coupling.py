"""Couplings: how a layer's output joins the streams, and how that is undone.

    forward    x[l+1] = x[l] + b (x[l-1] - x[l]) + h f_l(x[l])
    inverse    x[l-1] = x[l] + (x[l+1] - x[l] - h f_l(x[l])) / b

    RevNet         b = 1,        h = 1        f alternates attention and MLP      arXiv:1707.04585, 2001.04451
    Midpoint       b = 1,        h = 2 s                                          arXiv:2512.02056
    Leapfrog       b = -1,       h = s**2                                         arXiv:2512.02056
    Momentum       b = -beta,    h = 1 - beta                                     arXiv:2102.07870
    NearResidual   b = 2**-m,    h = 1        near the ordinary residual network
    BDIA           b = +-2**-m,  h = 1 + b    sign random per sample and f        arXiv:2407.09093
    Residual       b = 0,        h = 1        the ordinary residual network: no inverse

Where |b| = 2**-m < 1, division drops m bits of each element: they are kept, m bits for each element
and f, packed into bytes. With b = 1 or -1 nothing is kept.

A coupling is a value: the scan asks it for a step and an inverse, and differentiates `forward`. A
coupling of your own subclasses `AbstractCoupling` in a short file; for exact streams it also gives
`forward_exact` and `inverse_exact`. f may return any pytree that your `forward` understands.
"""

import abc
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from ..config import import_function
from .streams import FixedPoint, pack_bits, unpack_bits

PyTree = Any
Scalar = float | jax.Array


class AbstractCoupling(abc.ABC):
    """What `reversible_scan` asks of a coupling.

    Numbers that may be traced (signs, steps) are handed out by `numbers` and come back as `n`, one
    slice for each f; the methods below use nothing traced from `self`.
    """

    reversible: bool = True  # False: no inverse, so the plan must keep something
    linear: bool = False  # forward is linear in (x[l-1], x[l], f): by_tokens needs that
    readout: str = "mean"  # what a stack returns: the "mean" of the last two streams, or the "last"
    kept_bits: int = 0  # for each element and f, of exact streams
    order: int = 2  # how many streams a step needs: 2, or 1 where x[l-1] is not used

    def numbers(self, num_fns: int, x: jax.Array) -> PyTree:
        """Arrays with a leading axis of `num_fns`, one slice for each f in order (None: there are none)."""
        return None

    @abc.abstractmethod
    def forward(self, x_prev, x, fx, n) -> Any:
        """Returns x[l+1], in floats. The scan differentiates this."""

    def inverse(self, x, x_next, fx, n):
        """Returns x[l-1], in floats."""
        raise NotImplementedError(f"{type(self).__name__} has no inverse: use plan 'inputs' or 'all'.")

    def forward_exact(self, grid: FixedPoint, q_prev, q, fx, n):
        """Returns x[l+1] as integers, and the bits that `inverse_exact` needs back (None: nothing)."""
        raise TypeError(
            f"{type(self).__name__} has no exact arithmetic: pass exact=False for float streams, or give it "
            "forward_exact and inverse_exact."
        )

    def inverse_exact(self, grid: FixedPoint, q, q_next, fx, kept, n):
        """Returns the very bits of x[l-1]."""
        raise NotImplementedError(f"{type(self).__name__} has no exact inverse: use plan 'inputs' or 'all'.")

    def unsafe(self, grid: FixedPoint, x_prev, x, fx, n):
        """True where x[l+1] is not finite or does not fit; asked of floats, since integers cannot tell.

        Every term that is encoded has to fit by itself: where that is more than x[l+1] and fx, say so here.
        """
        unsafe = grid.unsafe(self.forward(x_prev, x, fx, n))
        return unsafe | grid.unsafe(fx) if isinstance(fx, jax.Array) else unsafe

    @property
    def has_exact(self) -> bool:
        """Whether it has exact arithmetic."""
        return type(self).forward_exact is not AbstractCoupling.forward_exact

    def for_step(self, key: jax.Array | None) -> "AbstractCoupling":
        """The coupling of one step, given that step's key; None is evaluation. Itself, unless it is random."""
        return self

    @property
    def random(self) -> bool:
        """Whether a step needs a key, without which it is that of another coupling, which has no inverse."""
        return self.reversible and not self.for_step(None).reversible


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearCoupling(AbstractCoupling):
    """b = sign * 2**-shift, and h. Exact for shift 0, 1, 2, 4 and 8 (bits that fill a byte).

    `sign` and `h` are numbers, or arrays (traced ones too) with one entry for each f; they are not
    differentiated: a step size that is learned belongs into f's own parameters.
    """

    linear = True
    sign: int | jax.Array = 1
    shift: int = 0
    h: Scalar = 1.0

    def __post_init__(self):
        if isinstance(self.sign, int) and self.sign not in (1, -1):
            raise ValueError(f"sign must be 1 or -1, but got {self.sign}.")
        if self.shift not in (0, 1, 2, 4, 8):
            raise ValueError(f"shift must be 0, 1, 2, 4 or 8 (kept bits that fill a byte), but got {self.shift}.")

    @property
    def kept_bits(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.shift

    def numbers(self, num_fns, x):
        arrays = {k: v for k, v in (("sign", self.sign), ("h", self.h)) if not isinstance(v, (int, float))}
        return {k: _per_f(k, v, num_fns, x) for k, v in arrays.items()} or None

    def _sign(self, n):
        return n["sign"] if n and "sign" in n else self.sign

    def _h(self, n):
        return n["h"] if n and "h" in n else self.h

    def forward(self, x_prev, x, fx, n):
        sign, h = self._sign(n), self._h(n)
        if self.shift == 0 and isinstance(sign, int) and sign == 1:
            return x_prev + _scale(h, fx, x.dtype)
        return x + sign * 2.0**-self.shift * (x_prev - x) + _scale(h, fx, x.dtype)

    def inverse(self, x, x_next, fx, n):
        sign, h = self._sign(n), self._h(n)
        if self.shift == 0 and isinstance(sign, int) and sign == 1:
            return x_next - _scale(h, fx, x.dtype)
        return x + sign * 2.0**self.shift * (x_next - x - _scale(h, fx, x.dtype))

    def forward_exact(self, grid, q_prev, q, fx, n):
        increment = grid.encode(_scale(self._h(n), fx, jnp.float32))
        if self.shift == 0:
            return q + self._sign(n) * (q_prev - q) + increment, None
        gap = q_prev - q + 2 ** (self.shift - 1)  # so that the shift rounds to nearest
        kept = pack_bits(gap & (2**self.shift - 1), self.shift)
        return q + self._sign(n) * (gap >> self.shift) + increment, kept

    def inverse_exact(self, grid, q, q_next, fx, kept, n):
        gap = self._sign(n) * (q_next - q - grid.encode(_scale(self._h(n), fx, jnp.float32)))
        if self.shift == 0:
            return q + gap
        return q + (gap << self.shift | unpack_bits(kept, self.shift)) - 2 ** (self.shift - 1)

    def unsafe(self, grid, x_prev, x, fx, n):
        # Each term has to fit: a sum that fits says nothing of an increment or a gap that did not.
        unsafe = grid.unsafe(self.forward(x_prev, x, fx, n)) | grid.unsafe(_scale(self._h(n), fx, jnp.float32))
        return unsafe | grid.unsafe(x_prev - x) if self.shift else unsafe


def RevNet() -> LinearCoupling:
    """Two streams, b = 1, h = 1; keeps nothing. f alternates attention and MLP (arXiv:1707.04585, 2001.04451)."""
    return LinearCoupling()


def Midpoint(step: Scalar = 0.5) -> LinearCoupling:
    """The explicit midpoint rule, b = 1, h = 2 step; keeps nothing. f is a whole block (arXiv:2512.02056, eq. 2.4)."""
    return LinearCoupling(h=2 * step)


def Leapfrog(step: float = 0.5) -> LinearCoupling:
    """Leapfrog, b = -1, h = step**2; keeps nothing (arXiv:2512.02056, eq. 2.6)."""
    return LinearCoupling(sign=-1, h=step**2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FloatMomentum(AbstractCoupling):
    """Momentum with any beta, for float streams only."""

    linear = True
    beta: float

    def forward(self, x_prev, x, fx, n):
        return x + self.beta * (x - x_prev) + _scale(1 - self.beta, fx, x.dtype)

    def inverse(self, x, x_next, fx, n):
        return x - (x_next - x - _scale(1 - self.beta, fx, x.dtype)) / self.beta


def Momentum(beta: float = 0.5) -> AbstractCoupling:
    """Momentum residual network, b = -beta, h = 1 - beta (arXiv:2102.07870).

    Exact for beta = 1/2, 1/4, 1/16 and 1/256, keeping 1, 2, 4 and 8 bits for each element and f; any
    other beta between 0 and 1 works with float streams (exact=False).
    """
    if not 0 < beta < 1:
        raise ValueError(f"beta must lie between 0 and 1, but got {beta}.")
    for shift in (1, 2, 4, 8):
        if beta == 2.0**-shift:
            return LinearCoupling(sign=-1, shift=shift, h=1 - beta)
    return FloatMomentum(beta=beta)


def NearResidual(shift: int = 1) -> LinearCoupling:
    """Near the ordinary residual network: b = 2**-shift, h = 1. Keeps `shift` bits (1, 2, 4, 8) an element and f."""
    if shift == 0:
        raise ValueError("shift must be 1, 2, 4 or 8, but got 0. With b = 1 this is RevNet().")
    return LinearCoupling(shift=shift)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BDIA(AbstractCoupling):
    """b = +-2**-shift with a random sign for each sample and f, and h = 1 + b (arXiv:2407.09093).

    The average over signs is the ordinary residual network, which is what evaluation uses: `for_step(None)`.

    Attributes:
      key: a PRNG key, a new one for every step. None: a stack that is called with a key draws one from it.
      sample: the global index of each sample of the batch, shape (B,); None: 0 .. B-1. A shard of a
        batch passes its own indices, so that the same sample has the same signs on any number of devices.
      shift: kept bits for each element and f (1, 2, 4 or 8).
    """

    linear = True
    readout = "last"
    key: jax.Array | None = None
    sample: jax.Array | None = None
    shift: int = 1

    def __post_init__(self):
        if self.shift not in (1, 2, 4, 8):
            raise ValueError(f"shift must be 1, 2, 4 or 8 (kept bits that fill a byte), but got {self.shift}.")

    @property
    def kept_bits(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.shift

    def numbers(self, num_fns, x):
        if self.key is None:
            raise ValueError("BDIA draws its signs from a key, a new one for every step: BDIA(key=key).")
        sample = jnp.arange(x.shape[0]) if self.sample is None else self.sample
        keys = jax.vmap(jax.random.fold_in, (None, 0))(self.key, sample)
        positive = jax.vmap(lambda key: jax.random.bernoulli(key, shape=(num_fns,)), out_axes=1)(keys)
        sign = jnp.where(positive, 1, -1).astype(jnp.int32)
        return {"sign": sign.reshape(num_fns, -1, *[1] * (x.ndim - 1))}

    def _linear(self, n):
        return LinearCoupling(sign=n["sign"], shift=self.shift, h=1 + n["sign"] * 2.0**-self.shift), None

    def forward(self, x_prev, x, fx, n):
        linear, n = self._linear(n)
        return linear.forward(x_prev, x, fx, n)

    def inverse(self, x, x_next, fx, n):
        linear, n = self._linear(n)
        return linear.inverse(x, x_next, fx, n)

    def forward_exact(self, grid, q_prev, q, fx, n):
        linear, n = self._linear(n)
        return linear.forward_exact(grid, q_prev, q, fx, n)

    def inverse_exact(self, grid, q, q_next, fx, kept, n):
        linear, n = self._linear(n)
        return linear.inverse_exact(grid, q, q_next, fx, kept, n)

    def unsafe(self, grid, x_prev, x, fx, n):
        linear, n = self._linear(n)
        return linear.unsafe(grid, x_prev, x, fx, n)

    def for_step(self, key):
        if self.key is not None:
            return self
        return Residual() if key is None else dataclasses.replace(self, key=key)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Residual(AbstractCoupling):
    """The ordinary residual network, b = 0, h = 1. It has no inverse: plan 'inputs' (remat) or 'all' (store)."""

    reversible = False
    linear = True
    readout = "last"
    order = 1

    def forward(self, x_prev, x, fx, n):
        return x + fx.astype(x.dtype)

    def forward_exact(self, grid, q_prev, q, fx, n):
        return q + grid.encode(fx), None


COUPLINGS = {
    "revnet": RevNet,
    "midpoint": Midpoint,
    "leapfrog": Leapfrog,
    "momentum": Momentum,
    "near-residual": NearResidual,
    "bdia": lambda shift=1: BDIA(shift=shift),
    "residual": Residual,
}


def parse_coupling(text: str) -> AbstractCoupling:
    """Reads "revnet", "midpoint:0.5", "leapfrog:0.5", "momentum:0.25", "near-residual:4", "bdia:1" or "residual".

    The number after the colon is the coupling's one argument; without it, the default. "package.module:function" is
    one of your own: what the function returns, called without arguments.
    """
    name, _, number = text.partition(":")
    if "." in name:
        coupling = import_function(text, what="coupling", known=COUPLINGS)()
        if not isinstance(coupling, AbstractCoupling):
            raise ValueError(f"{text} must return a coupling, but it returned a {type(coupling).__name__}.")
        return coupling
    if name not in COUPLINGS:
        own = "or package.module:function for one of your own"
        raise ValueError(f"A coupling is one of {', '.join(COUPLINGS)}, {own}, but got {text!r}.")
    if not number:
        return COUPLINGS[name]()
    if name in ("revnet", "residual"):
        raise ValueError(f"The coupling {name!r} takes no number, but got {text!r}.")
    try:
        value = int(number) if name in ("near-residual", "bdia") else float(number)
    except ValueError:
        kind = "a whole number" if name in ("near-residual", "bdia") else "a number"
        raise ValueError(f"The coupling {name!r} takes {kind} after the colon, but got {text!r}.") from None
    return COUPLINGS[name](value)


def _scale(h, fx, dtype):
    fx = fx.astype(dtype)
    return fx if isinstance(h, (int, float)) and h == 1 else (h * fx).astype(dtype)


def _per_f(name, value, num_fns, x):
    """(num_fns,) or () -> (num_fns, 1, ...), so that a slice broadcasts against x."""
    if value.shape not in ((), (num_fns,)):
        raise ValueError(f"{name} must have shape () or ({num_fns},), one entry for each f, but got {value.shape}.")
    return jnp.broadcast_to(value, (num_fns,)).reshape(num_fns, *[1] * x.ndim)
