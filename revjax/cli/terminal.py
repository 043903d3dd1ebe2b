"""Text of a model on a terminal, which would obey the control characters in it."""

import re
import sys

_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but tab and newline


def shown(text: str) -> str:
    """`text` for `print`: as it is, or `visible` where stdout is a terminal."""
    return visible(text) if sys.stdout.isatty() else text


def visible(text: str) -> str:
    r"""`text` with its control characters as escapes, but for tab and newline.

    >>> print(visible("a\x1b[2J"))
    a\x1b[2J
    """
    return _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text)
