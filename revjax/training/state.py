"""What a run carries from step to step, as plain arrays; and what is left of a module without them.

    model  <->  (skeleton, values)        values: nested dicts with string keys, the leaves of nnx.Param and Frozen
    values <->  (params, frozen)          what is trained, and what is not

The skeleton holds the rest. It is static for a whole run, so a jitted step closes over it.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from ..models import Frozen
from .loss_scale import init_loss_scale
from .spikes import init_spikes

PyTree = Any
Nested = dict[str, Any]  # nested; leaves are arrays


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that the next step depends on, but for its batch."""

    params: Nested
    frozen: Nested  # parameters that are not trained; {} where all are
    opt_state: PyTree
    ema: Nested  # float32: a running mean of params; {} where none is kept
    loss_scale: Nested  # see `loss_scale`; {} where losses are not scaled
    spikes: Nested  # see `spikes`; {} where they are not looked for
    step: jax.Array  # int32: batches seen
    skipped: jax.Array  # int32: batches of which no update was made
    key: jax.Array  # uint32, `jax.random.key_data` of the run's key, which never changes

    @property
    def eval_params(self) -> Nested:
        """All parameters, as evaluation and sampling take them: their running mean where there is one."""
        mean = jax.tree.map(lambda mean, p: mean.astype(p.dtype), self.ema, self.params) if self.ema else self.params
        return united(mean, self.frozen)

    def as_dict(self) -> Nested:
        """Nested dicts of arrays, as a checkpoint holds them."""
        fields = {f.name: to_nested(getattr(self, f.name)) for f in dataclasses.fields(self)}
        return {name: value for name, value in fields.items() if not isinstance(value, dict) or value}

    def from_dict(self, nested: Nested) -> "TrainState":
        """The state that `nested` holds, in the structure of this one."""
        return TrainState(
            **{f.name: filled(getattr(self, f.name), nested.get(f.name)) for f in dataclasses.fields(self)}
        )


@dataclasses.dataclass(frozen=True)
class Skeleton:
    """A module without its parameters."""

    graphdef: Any
    params: nnx.State  # abstract: shapes and dtypes
    frozen: nnx.State  # likewise
    rest: nnx.State  # other variables (constants, the canary's zeros)

    def merge(self, values: Nested) -> nnx.Module:
        """The module with these parameters, frozen ones too. Works under `jax.jit`, and with abstract arrays."""
        return nnx.merge(self.graphdef, self.as_state(values), filled(self.frozen, values), self.rest, copy=True)

    def as_state(self, nested: Nested) -> nnx.State:
        """What has the structure of the trained parameters (they themselves, gradients) as flax has it."""
        return filled(self.params, nested)

    def divide(self, values: Nested) -> tuple[Nested, Nested]:
        """Of all parameters, those that are trained, and those that are frozen."""
        return to_nested(self.as_state(values)), to_nested(filled(self.frozen, values))

    @property
    def abstract(self) -> nnx.Module:
        """The module without values: for names and shapes."""
        return nnx.merge(self.graphdef, self.params, self.frozen, self.rest, copy=True)


def split(model: nnx.Module) -> tuple[Skeleton, Nested]:
    """Returns `model` as its skeleton and all of its parameters, which are the model's own arrays."""
    graphdef, params, frozen, rest = nnx.split(model, nnx.Param, Frozen, ...)
    if not jax.tree.leaves(params):
        raise ValueError(f"{type(model).__name__} has no nnx.Param, so there is nothing to train.")
    abstract = lambda state: jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), state)
    return Skeleton(graphdef, abstract(params), abstract(frozen), rest), united(to_nested(params), to_nested(frozen))


def split_abstract(make_model: Callable[[], nnx.Module]) -> tuple[Skeleton, Nested]:
    """As `split(make_model())`, but makes no parameters: shapes are in their place."""
    skeleton, params = split(nnx.eval_shape(make_model))
    rest = jax.jit(lambda: split(make_model())[0].rest)()
    return dataclasses.replace(skeleton, rest=rest), params


def init_state(
    params: Nested,
    optimizer: optax.GradientTransformation,
    key: jax.Array,
    *,
    frozen: Nested | None = None,
    ema: bool = False,
    loss_scale: bool = False,
    spikes: bool = False,
) -> TrainState:
    """The state before the first step. It holds the parameters themselves: a step that donates the state uses them up.

    Args:
      params: those that are trained.
      key: of the whole run: every step folds its number into it.
      frozen: those that are not, see `Skeleton.divide`.
      ema: keep a running mean of the parameters.
      loss_scale: scale losses, for float16.
      spikes: remember losses, to tell spikes.
    """
    zero = lambda: jnp.zeros((), jnp.int32)
    return TrainState(
        params=params,
        frozen={} if frozen is None else frozen,
        opt_state=optimizer.init(params),
        ema=jax.tree.map(lambda p: jnp.array(p, jnp.float32, copy=True), params) if ema else {},
        loss_scale=init_loss_scale() if loss_scale else {},
        spikes=init_spikes() if spikes else {},
        step=zero(),
        skipped=zero(),
        key=jax.random.key_data(key),
    )


def united(first: Nested, second: Nested) -> Nested:
    """Both as one: the inverse of `Skeleton.divide`. A leaf that both have is the second's."""
    both = {name: (first[name], second[name]) for name in first.keys() & second.keys()}
    return first | second | {name: united(a, b) for name, (a, b) in both.items() if isinstance(a, dict)}


def to_nested(tree: PyTree) -> PyTree:
    """Any pytree as nested dicts with string keys; an array is itself. `nnx.Variable`s are their arrays."""
    if isinstance(tree, jax.Array | np.ndarray | jax.ShapeDtypeStruct):
        return tree
    nested: Nested = {}
    for path, leaf in jax.tree.flatten_with_path(tree)[0]:
        *parents, last = _names(path)
        place = nested
        for name in parents:
            place = place.setdefault(name, {})
        place[last] = leaf
    return nested


def filled(like: PyTree, nested: PyTree) -> PyTree:
    """A pytree with the structure of `like`, and the leaves of what `to_nested` made of one."""

    def leaf(path, _):
        place = nested
        for name in _names(path):
            place = place[name]
        return place

    return jax.tree.map_with_path(leaf, like)


def _names(path) -> list[str]:
    """ "stack", "runs", "0", ...; the attribute in which a variable keeps its array is left out."""
    names = [str(getattr(k, "key", getattr(k, "idx", getattr(k, "name", None)))) for k in path]
    in_variable = len(names) > 1 and isinstance(path[-1], jax.tree_util.GetAttrKey) and names[-1] == "value"
    return names[:-1] if in_variable else names
