"""What `shard_map` asks: which arrays differ from shard to shard."""

from typing import Any

import jax

from .trace import is_float

PyTree = Any


def vary_alike(tree: PyTree, like: PyTree = None) -> PyTree:
    """Lets every float of `tree` vary over the manual mesh axes that any of `tree` or `like` varies over.

    The transpose is a sum over those axes: the one that the gradient of a replicated input needs, done once
    and outside the scan. Outside `shard_map` nothing happens.
    """
    axes = frozenset().union(*(_varying(a) for a in jax.tree.leaves((tree, like)) if is_float(a)))

    def vary(a):
        missing = tuple(sorted(axes - _varying(a)))
        return jax.lax.pcast(a, missing, to="varying") if missing and is_float(a) else a

    return jax.tree.map(vary, tree) if axes else tree


def _varying(a) -> frozenset:
    return getattr(getattr(jax.typeof(a), "manual_axis_type", None), "varying", frozenset())
