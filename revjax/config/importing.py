"""A user's own function, named in a config: `my_package.optim:make`."""

import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from ..errors import ConfigError, nearest


def import_function(
    name: str, *, what: str, known: Iterable[str] = (), takes: Sequence[str] | None = None
) -> Callable[..., Any]:
    """Returns the function that `package.module:function` names, looked for from the current folder too.

    It runs the module's code, so a config that names one is to be trusted like a program. `known` are the names
    that revjax has itself, for the error; `takes` are the arguments that it must be able to take. Raises `ConfigError`
    where there is no such function.
    """
    module_name, colon, attribute = name.partition(":")
    known = sorted(known)
    if not colon or not module_name or not attribute:
        raise ConfigError(
            f"There is no {what} {name!r}.{nearest(name, known)} Known are {', '.join(known)}; "
            "a function of your own is written package.module:function."
        )
    here = os.getcwd()
    if here not in sys.path:
        sys.path.append(here)  # last, so that nothing in it stands before an installed package
    try:
        module = importlib.import_module(module_name)
    except ImportError as e:
        raise ConfigError(f"The {what} {name!r} cannot be imported: {e} (looked for from {here} too).") from None
    function = getattr(module, attribute, None)
    if not callable(function):
        functions = [n for n, x in vars(module).items() if callable(x) and not n.startswith("_")]
        raise ConfigError(f"{module_name} has no function {attribute!r}.{nearest(attribute, functions)}")
    try:
        inspect.signature(function).bind(*takes or ())
    except TypeError as e:
        if takes is not None:
            raise ConfigError(f"The {what} {name!r} must take ({', '.join(takes)}): {e}.") from None
    return function
