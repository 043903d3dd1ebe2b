"""What a user can get wrong, as exceptions whose message is all that they need to read.

The command line prints the message of a `RevjaxError` and exits with status 2, without a traceback.
Anything else is a fault of the program, and keeps its traceback. Mistakes in Python calls stay plain
`ValueError` and `TypeError`.
"""

import difflib
from collections.abc import Iterable


class RevjaxError(ValueError):
    """A mistake outside the program: in a file, an argument, or the environment."""


class ConfigError(RevjaxError):
    """A configuration that cannot be read, or says something impossible."""


class DataError(RevjaxError):
    """Training data that is missing, unreadable, or too short."""


class CheckpointError(RevjaxError):
    """A checkpoint that is missing, damaged, or does not fit what it is restored into."""


class DamagedCheckpointError(CheckpointError):
    """A checkpoint whose files are not what was saved; an older one may be whole. `why` is what is wrong with it."""

    def __init__(self, message: str, why: str):
        super().__init__(message)
        self.why = why


class RunFolderError(RevjaxError):
    """A run folder that cannot be used: it is missing, not writable, or belongs to another run."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Returns a hint to append to an error message, or "" where no known name is near.

    >>> nearest("num_layer", ["d_model", "num_layers"])
    " Did you mean 'num_layers'?"
    """
    by_lower = {k.lower(): k for k in known}
    close = difflib.get_close_matches(name.lower(), by_lower, n=1)
    return f" Did you mean {by_lower[close[0]]!r}?" if close else ""
