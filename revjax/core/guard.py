"""Refuses derivatives that would come out wrong, instead of returning zeros."""

from typing import Any

import jax

from .trace import is_float

PyTree = Any

SIDE_NOT_DIFFERENTIATED = (
    "The side input {name} is being differentiated, and its gradient would be lost. Pass it as `context=` "
    "(differentiated, the same for all layers; several as a dict) or put it into the parameters; if it is meant to be "
    "constant, pass jax.lax.stop_gradient of it. (What a stack is called with by name is `shared` here, and what each "
    "layer has of its own `side_L`.)"
)
NUMBERS_NOT_DIFFERENTIATED = (
    "A number of the coupling (a sign or a step) is being differentiated, and its gradient would be lost. "
    "Multiply by it inside f, where it is one of f's parameters."
)
CACHE_IS_FORWARD_ONLY = (
    "reversible_scan was given caches, so it runs forward only, but it is being differentiated. "
    "Call it without cache_L to train."
)
FIRST_ORDER_ONLY = (
    "reversible_scan can be differentiated once: its backward pass rebuilds integers, which have no derivative. "
    "For second derivatives use plan-free code, such as jax.lax.scan over x + f(x)."
)


def refuse_gradient(tree: PyTree, message: str) -> PyTree:
    """Returns `tree`; raises TypeError(message) as soon as one of its floats is differentiated.

    `{name}` in the message becomes the place of that float in the tree.
    """

    def guarded(path, a):
        if not (hasattr(a, "dtype") and is_float(a)):
            return a

        @jax.custom_jvp
        def identity(a):
            return a

        @identity.defjvp
        def _(primals, tangents):
            raise TypeError(message.format(name=jax.tree_util.keystr(path, simple=True, separator=".")))

        return identity(a)

    return jax.tree.map_with_path(guarded, tree)
