"""Which software a run was made with."""

import platform
import sys

import jax


def versions() -> str:
    """ "revjax 0.1.0, jax 0.10.2, Python 3.11.9"."""
    ours = sys.modules[__name__.partition(".")[0]].__version__  # not imported: it stands above this file
    return f"revjax {ours}, jax {jax.__version__}, Python {platform.python_version()}"
