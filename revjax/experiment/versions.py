"""Which software a run was made with."""

import pathlib
import platform
import subprocess
import sys

import jax


def versions() -> str:
    """ "revjax 0.1.0, jax 0.10.2, Python 3.11.9"."""
    ours = sys.modules[__name__.partition(".")[0]].__version__  # not imported: it stands above this file
    return f"revjax {ours}, jax {jax.__version__}, Python {platform.python_version()}"


def git_revision() -> str | None:
    """ "git 9ee2466" of the checkout that revjax is run from, with "+" where files were changed; None without one."""
    package = pathlib.Path(__file__).parent
    describe = ["git", "-C", str(package), "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        tracked = subprocess.run([*describe[:3], "ls-files", "--error-unmatch", __file__], capture_output=True)
        done = subprocess.run(describe, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return f"git {done.stdout.strip()}" if tracked.returncode == 0 and done.returncode == 0 else None
