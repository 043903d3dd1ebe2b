"""XLA's own cache of compiled programs: the second start of a run does not compile again."""

import os
import pathlib
import stat

import jax

from ..config import users_cache
from ..logging import get_logger

MAX_BYTES = 4 * 2**30  # beyond it, the programs that were not used for the longest time are deleted


def use_compilation_cache(folder: str | None) -> pathlib.Path | None:
    """Makes jax keep compiled programs in `folder`; returns it, or None where none is used.

    "auto" is the user's cache folder, revjax/xla. What is cached is run as a program: so the folder is made for its
    owner alone, and one that others may write to is not used, with a warning. A cache that jax was told of already
    (JAX_COMPILATION_CACHE_DIR) is left as it is.
    """
    known = jax.config.values
    if known["jax_compilation_cache_dir"] is not None:
        return pathlib.Path(known["jax_compilation_cache_dir"])
    if folder is None or not known["jax_enable_compilation_cache"]:
        return None
    path = users_cache("xla") if folder == "auto" else pathlib.Path(folder).expanduser()
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = path.stat()
    except OSError as e:
        get_logger(__name__).warning("no compilation cache: cannot use %s (%s)", path, e.strerror)
        return None
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH) or (hasattr(os, "getuid") and status.st_uid != os.getuid()):
        message = "no compilation cache: others may write to %s, and what is in it is run. Type: chmod 700 %s"
        get_logger(__name__).warning(message, path, path)
        return None
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_compilation_cache_max_size", MAX_BYTES)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    return path
