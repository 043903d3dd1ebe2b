"""Where revjax keeps what can be made again."""

import os
import pathlib


def users_cache(name: str) -> pathlib.Path:
    """The folder `name` of revjax in the user's cache folder: $XDG_CACHE_HOME, or ~/.cache. It need not exist."""
    base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(base).expanduser() / "revjax" / name
