"""`ReversibleStack`: NNX blocks in a reversible stack. The one place where modules become pure functions.

A block is any `nnx.Module` that maps x to the increment f(x) (not x + f(x)), or a list of such branches
(attention, MLP), each an f of its own. Blocks are made once for each layer, with their parameters stacked;
`reversible_scan` does the rest.

Blocks hold no randomness and change no state: the stack hands each branch a PRNG key of its own, folded
from one key by its place, and the backward pass replays it.
"""

import dataclasses
import inspect
import numbers
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ..core import (
    AbstractCoupling,
    FixedPoint,
    Reverse,
    RevNet,
    Run,
    ScanResult,
    by_tokens,
    parse_coupling,
    reconstruction_error,
    reversible_scan,
)
from ..core.plan import Plan, keeps

PyTree = Any
MakeBlock = Callable[[nnx.Rngs], nnx.Module | Sequence[nnx.Module]]


class MutatedVariableError(ValueError):
    """A branch of a reversible stack wrote to one of its variables."""


class Canary(nnx.Variable):
    """Zeros whose gradient tells how the backward pass went; `revjax.value_and_grad` reads it. Not a parameter."""


class CalledAgainError(Exception):
    """A stack that was told where its gradients go is called more than once."""


class ReversibleStack(nnx.Module):
    """A stack of NNX blocks that stores no activations.

    Called as `stack(x, key=key, context=..., **side)`, it returns the mean of the last two streams (the last
    one for BDIA and Residual), in float32 (the dtype of x where `exact` is False).

    A branch gets those keywords that its `__call__` names: `key` (its own for each layer), `context`
    (differentiated), and any others, which are not. A branch that treats each token alone and has an attribute
    `chunk_tokens` is run in chunks of that many.

    Args:
      make_block: `make_block(rngs)` returns a block, or a list of residual branches. A list of such
        functions is a period (local, local, global attention, say): layers go through it in turn.
      num_layers: how many blocks.
      coupling: how increments join the streams, or its name ("near-residual:1"); RevNet() if None; a call may pass
        another.
      plan: what the backward pass finds kept: "nothing", "attention", "inputs:K", "host:K", "all", different for parts
        of a run ("40 nothing, 8 all"), or one for each run.
      exact, fraction_bits, constrain: see `revjax.reversible_scan`.
      gather: what one layer's parameters go through before they are used, such as `revjax.sharding.gather_layer(mesh)`.
      rngs: for the parameters. Each layer gets its own.

    Example:
      >>> class Block(nnx.Module):
      ...     def __init__(self, rngs):
      ...         self.conv = nnx.Conv(64, 64, kernel_size=(5,), rngs=rngs)
      ...     def __call__(self, x):
      ...         return nnx.gelu(self.conv(x))
      >>> stack = ReversibleStack(Block, num_layers=48, rngs=nnx.Rngs(0))
      >>> stack(jnp.ones((2, 16, 64))).shape
      (2, 16, 64)
    """

    grad_sums: Any = None  # what the next call adds its parameters' gradients to: see `value_and_add_grad`
    layer_update: Any = None  # what the next call's backward pass does with parameters: see `value_and_update`
    layers_updated: Any = None  # those parameters, for each run, and a state beside them

    def __init__(
        self,
        make_block: MakeBlock | Sequence[MakeBlock],
        *,
        num_layers: int,
        coupling: AbstractCoupling | str | None = None,
        plan: Plan = "nothing",
        exact: bool = True,
        fraction_bits: int = 16,
        constrain: Callable[[jax.Array], jax.Array] | None = None,
        gather: Callable[[PyTree], PyTree] | None = None,
        rngs: nnx.Rngs,
    ):
        makers = tuple(make_block) if isinstance(make_block, Sequence) else (make_block,)
        if not isinstance(num_layers, numbers.Integral) or num_layers < 1 or not makers:
            raise ValueError(
                "A stack needs num_layers of at least 1, a whole number, and one make_block or a list of them, but got "
                f"num_layers={num_layers} and {len(makers)} make_block."
            )
        for make in makers:
            if isinstance(make, nnx.Module):
                raise TypeError(
                    f"make_block must be a function of rngs that makes a block, but got a {type(make).__name__} that "
                    f"is made: each layer needs its own. Pass {type(make).__name__}, or lambda rngs: "
                    f"{type(make).__name__}(..., rngs=rngs)."
                )
        self.num_layers = num_layers
        coupling = parse_coupling(coupling) if isinstance(coupling, str) else coupling
        if not (coupling is None or isinstance(coupling, AbstractCoupling)):
            raise TypeError(
                f"coupling must be a coupling, such as revjax.NearResidual(4), or its name, but got {coupling!r}."
            )
        self.coupling = nnx.static(RevNet() if coupling is None else coupling)
        self.plan, self.exact, self.fraction_bits = plan, exact, fraction_bits
        self.constrain, self.gather = nnx.static(constrain), nnx.static(gather)
        # One run of whole periods, and one for what remains; branches have a leading axis of repeats.
        keys = jax.random.split(rngs.params(), num_layers)
        repeats, rest = divmod(num_layers, len(makers))
        whole = repeats * len(makers)
        runs = [_make_run(makers, keys[:whole])] if repeats else []
        runs += [_make_run(makers[:rest], keys[whole:])] if rest else []
        self.branches_per_layer = tuple(n for _, sizes in runs for n in sizes)
        self.runs = nnx.List([nnx.List(branches) for branches, _ in runs])
        self.canary = Canary(jnp.zeros((len(self.names), 3), jnp.float32))
        self._check()

    def _check(self) -> None:
        """Finds what does not fit together before anything is run."""
        kept = keeps(self.plan, self.lengths)
        FixedPoint(self.fraction_bits)
        if self.exact and not self.coupling.has_exact:
            raise ValueError(
                f"{type(self.coupling).__name__} has no exact arithmetic: pass exact=False for float streams. "
                "(Momentum has it for beta = 1/2, 1/4, 1/16 and 1/256.)"
            )
        if not self.coupling.reversible and any(isinstance(keep, Reverse) for keep in kept):
            raise ValueError(
                f"{type(self.coupling).__name__} has no inverse, so plans 'nothing' and 'attention' cannot rebuild its "
                "streams. "
                "Pass plan='inputs' (recompute) or plan='all' (store), or a reversible coupling."
            )

    @property
    def lengths(self) -> tuple[int, ...]:
        """The repeats of each run."""
        return tuple(_length(branches[0]) for branches in self.runs)

    @property
    def reverses(self) -> bool:
        """Whether streams of a run are rebuilt by the inverse."""
        return any(isinstance(keep, Reverse) for keep in keeps(self.plan, self.lengths))

    @property
    def names(self) -> list[str]:
        """What to call each f, in the order in which they are applied: "layer 3 Attention"."""
        names, layer, sizes = [], 0, iter(self.branches_per_layer)
        for branches, length in zip(self.runs, self.lengths, strict=True):
            period = []  # (layer within the period, name)
            while len(period) < len(branches):
                inner = period[-1][0] + 1 if period else 0
                period += [(inner, type(branches[len(period) + j]).__name__) for j in range(next(sizes))]
            for _ in range(length):
                names += [f"layer {layer + inner} {name}" for inner, name in period]
                layer += period[-1][0] + 1
        return names

    def __call__(self, x: jax.Array, *, key: jax.Array | None = None, **inputs: PyTree) -> jax.Array:
        return self.scan(x, key=key, **inputs).out

    def scan(
        self,
        x: jax.Array | tuple[jax.Array, jax.Array],
        *,
        key: jax.Array | None = None,
        context: PyTree = None,
        cache: PyTree = None,
        coupling: AbstractCoupling | None = None,
        plan: Plan | None = None,
        **side: PyTree,
    ) -> ScanResult:
        """As calling it, with all that comes out: both streams, auxiliary outputs, caches, unsafe counts.

        Args:
          x: (B, ..., D) floats; or the two streams to start from.
          key: for the randomness of this step; None where nothing is random.
          context: what every branch gets as `context=`, with gradients.
          cache: for each run, for each branch of its period, a cache with a leading axis of repeats, or None.
          coupling, plan: instead of the stack's own, for this call.
          side: what branches get by name; not differentiated. Booleans and strings stay what they are.
        """
        given = self._arguments(x, key, context, cache, coupling, side)
        evaluated = self.coupling.reversible and not given["coupling"].reversible
        if plan is None:  # an ensemble that is evaluated is an ordinary network, without an inverse
            plan = "inputs" if evaluated and self.reverses else self.plan
        given |= self._take_sums_or_update(given["runs"])
        return reversible_scan(**given, plan=plan, canary=self.canary[...], constrain=self.constrain)

    def _take_sums_or_update(self, runs: Sequence[Run]) -> dict[str, Any]:
        """They are for one call only, and for one where they were given: in a loop nnx refuses the assignment."""
        if self.layer_update is not None:
            updated, self.layers_updated = self.layers_updated, nnx.data(())
            if not updated:
                raise CalledAgainError
            params, states = updated
            runs = [dataclasses.replace(run, params_L=p) for run, p in zip(runs, _like(runs, params), strict=True)]
            return {"runs": runs, "update": self.layer_update, "update_state": states}
        if self.grad_sums is None:
            return {}
        sums, self.grad_sums = self.grad_sums, nnx.data(())
        if not sums:
            raise CalledAgainError
        return {"grad_sums": _like(runs, sums)}

    def reconstruction_error(self, x, *, key=None, context=None, coupling=None, **side) -> jax.Array:
        """Runs the stack forward and back: the largest error of the stream before each f, (N,). 0 where exact."""
        return reconstruction_error(**self._arguments(x, key, context, None, coupling, side))

    def _arguments(self, x, key, context, cache, coupling, side) -> dict[str, Any]:
        """What the core takes: pure functions, their stacked parameters, a key for each f."""
        _refuse_no_key(key)
        self._refuse_unknown(dict(context=context, **side))
        self._refuse_missing(dict(key=key, context=context, **side))
        static = {name: value for name, value in side.items() if isinstance(value, bool | str)}
        side = {name: value for name, value in side.items() if name not in static}
        context = jax.tree.map(jnp.asarray, context)
        sign_key, key = (None, None) if key is None else jax.random.split(key)
        keys_N = None if key is None else jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(len(self.names)))
        runs, start = [], 0
        for i, (branches, length) in enumerate(zip(self.runs, self.lengths, strict=True)):
            stop, period = start + len(branches) * length, len(branches)
            fns, params_L, states_L = zip(
                *(branch_function(branch, self.gather, **static) for branch in branches), strict=True
            )
            keys_L = [None if keys_N is None else keys_N[start + j : stop : period] for j in range(period)]
            side_L = tuple(zip(states_L, keys_L, strict=True))
            runs.append(Run(fns, params_L, side_L, None if cache is None else tuple(cache[i]), length=length))
            start = stop
        coupling = (self.coupling if coupling is None else coupling).for_step(sign_key)
        arithmetic = {"exact": self.exact, "fraction_bits": self.fraction_bits}
        return {"runs": runs, "x": x, "coupling": coupling, "shared": side, "context": context} | arithmetic

    def _refuse_unknown(self, inputs: dict[str, PyTree]) -> None:
        known = {name for branches in self.runs for branch in branches for name in keywords_of(branch)}
        unknown = sorted(
            name for name, value in inputs.items() if value is not None and name not in known and ... not in known
        )
        if unknown:
            raise TypeError(
                f"No branch of this stack takes {', '.join(unknown)}: name it in the __call__ of the block. "
                f"Branches take: {', '.join(sorted(known - {...})) or 'x only'}."
            )

    def _refuse_missing(self, inputs: dict[str, PyTree]) -> None:
        given = {name for name, value in inputs.items() if value is not None} | {"tape", "cache"}
        for branch in (branch for branches in self.runs for branch in branches):
            missing = [name for name in keywords_of(branch, required=True) if name not in given]
            if missing:
                raise TypeError(
                    f"{type(branch).__name__} needs {', '.join(missing)}, which this call of its stack does not give: "
                    f"stack(x, {', '.join(f'{name}=...' for name in missing)}). What may be left out has a default in "
                    "its __call__."
                )


def _like(runs: Sequence[Run], leaves: Sequence[Sequence[jax.Array]]) -> list[PyTree]:
    """For each run, its leaves as its parameters have them."""
    return [jax.tree.unflatten(jax.tree.structure(r.params_L), a) for r, a in zip(runs, leaves, strict=True)]


def _refuse_no_key(key: Any) -> None:
    is_key = isinstance(key, jax.Array | np.ndarray) and (
        jnp.issubdtype(key.dtype, jax.dtypes.prng_key) or key.dtype == jnp.uint32
    )
    if key is not None and not is_key:
        raise TypeError(f"key must be a PRNG key, such as jax.random.key(0), but got {key!r}.")


def _make_run(makers: Sequence[MakeBlock], keys: jax.Array) -> tuple[list[nnx.Module], tuple[int, ...]]:
    """The branches of one period, each with stacked parameters, and how many of them each layer has."""
    branches, sizes = [], []
    for j, make in enumerate(makers):
        made = jax.vmap(lambda key, make=make: _as_branches(make(nnx.Rngs(key))))(keys[j :: len(makers)])
        branches += made
        sizes.append(len(made))
    return branches, tuple(sizes)


def _as_branches(block) -> list[nnx.Module]:
    branches = list(block) if isinstance(block, (Sequence, nnx.List)) else [block]
    if not branches:
        raise TypeError("make_block(rngs) must return an nnx.Module, or a list of them, but its list is empty.")
    for branch in branches:
        if not isinstance(branch, nnx.Module) or not callable(branch):
            raise TypeError(
                "make_block(rngs) must return an nnx.Module that maps x to the increment f(x), or a list of them, "
                f"but it returned {type(branch).__name__}."
            )
        _refuse_made_before(branch)
    return branches


def _refuse_made_before(branch: nnx.Module) -> None:
    """What make_block only hands on would be copied for every layer. (Called in the `vmap` that makes all layers.)"""
    from_before = [
        ".".join(map(str, path))
        for path, node in nnx.iter_graph(branch)
        if isinstance(node, nnx.Param) and not node._can_update  # made outside of the vmap
    ]
    if from_before:
        raise ValueError(
            f"{type(branch).__name__} holds parameters that were made before make_block was called "
            f"({', '.join(from_before)}): each layer would get a copy of its own. Make them in make_block; or, if all "
            "layers share them, hand them to the stack, stack(x, context=...), and name `context` in the block's "
            "__call__: a module or parameters, with gradients."
        )


def branch_function(
    branch: nnx.Module, gather: Callable[[PyTree], PyTree] | None = None, /, **static: bool | str
) -> tuple[Callable, PyTree, PyTree]:
    """A pure f, its stacked parameters, and its other variables (constants: f may read them, not write them).

    `static` are keywords that are no arrays (`deterministic=True`).
    """
    graphdef, params_L, state_L = nnx.split(branch, nnx.Param, ...)
    keywords = keywords_of(branch)

    def f(params, x, side=None, shared=None, context=None, tape=None, cache=None):
        state, key = (state_L, None) if side is None else side  # no leaves: nothing was passed
        if gather is not None:
            params, state = gather(params), gather(state)
        module = nnx.merge(graphdef, params, state, copy=True)
        given = dict(shared or {}, **static, key=key, context=context, tape=tape, cache=cache)
        given = {k: v for k, v in given.items() if v is not None and (k in keywords or ... in keywords)}
        before = variables(module)
        try:
            increment = module(x, **given)
        except Exception as e:
            name, shape = type(module).__name__, list(x.shape)
            e.add_note(f"This was in {name}, a block of a ReversibleStack, called with x of {x.dtype}{shape}.")
            raise
        _refuse_mutation(module, before)
        _refuse_unnamed(type(module).__name__, increment, keywords)
        return increment

    f.__name__ = type(branch).__name__
    chunk = getattr(branch, "chunk_tokens", None)
    return by_tokens(f, chunk, _side_of_chunk) if chunk else f, params_L, state_L


def _side_of_chunk(side, i):
    state, key = side
    return state, None if key is None else jax.random.fold_in(key, i)


def keywords_of(branch: nnx.Module, *, required: bool = False) -> list[Any]:
    """The keywords that the branch's `__call__` names, `...` where it takes any; or those without a default."""
    parameters = list(inspect.signature(type(branch).__call__).parameters.values())[2:]
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    if required:
        return [p.name for p in named if p.default is p.empty]
    return [p.name for p in named] + [... for p in parameters if p.kind is p.VAR_KEYWORD]


def _refuse_unnamed(name: str, increment: PyTree, keywords: list[Any]) -> None:
    extras = increment[1] if isinstance(increment, tuple) and isinstance(increment[-1], dict) else {}
    lost = [k for k in ("tape", "cache") if extras.get(k) is not None and k not in keywords and ... not in keywords]
    if lost:
        raise TypeError(
            f"{name} returns a {lost[0]}, but its __call__ does not take one back: add `{lost[0]}=None` to its "
            "keywords."
        )


def _refuse_mutation(module: nnx.Module, before: dict[Any, Any]) -> None:
    """A branch that writes to a variable would do so twice, or be replayed differently: both silently."""
    after = variables(module)
    changed = [path for path in after if after[path] is not before.get(path)]
    if not changed:
        return
    names = ", ".join(".".join(map(str, path)) for path in changed)
    if any("count" in map(str, path) or "rngs" in map(str, path) for path in changed):
        raise MutatedVariableError(
            f"{type(module).__name__} draws random numbers from a stream that it holds ({names}), which the backward "
            "pass cannot replay. Take the key as an argument instead: `def __call__(self, x, *, key=None)`, and "
            "revjax.nn.dropout(x, rate, key); the stack hands each branch its own key from stack(x, key=key). (nnx.RNN "
            "draws its first carry so: give it initial_carry=.)"
        )
    raise MutatedVariableError(
        f"{type(module).__name__} changes its variables when it is called ({names}), but it is called twice for each "
        "step, and what it writes is lost. A residual branch must not change state: return statistics as "
        "(increment, {'aux': ...}), or use a layer without them (LayerNorm instead of BatchNorm). (nnx.jit, nnx.remat "
        "and their like write all variables back: leave them out, since the stack is jitted and rebuilt as a whole, or "
        "transform a function of arrays with jax's own.)"
    )


def variables(module: nnx.Module) -> dict[Any, Any]:
    """What a module's variables hold, by path: arrays, or what `sow` puts there."""
    value = lambda leaf: leaf.get_value() if isinstance(leaf, nnx.Variable) else leaf
    return {path: value(leaf) for path, leaf in nnx.to_flat_state(nnx.state(module))}


def _length(branch: nnx.Module) -> int:
    leaves = jax.tree.leaves(nnx.state(branch))
    if not leaves:
        raise ValueError(
            f"{type(branch).__name__} has no variable, so a stack cannot tell its layers; give it a parameter."
        )
    return leaves[0].shape[0]
