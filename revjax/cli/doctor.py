"""`revjax doctor`."""

from .. import experiment
from ..errors import ConfigError
from ..logging import get_logger, setup
from .words import take

USAGE = "revjax doctor"
DESCRIPTION = f"""usage: {USAGE}

Says what revjax finds on this machine (versions, devices, caches), whether a small model is exact on it, and which
settings are known to do harm. Exit codes: 0 all is well, 1 something is not."""


def doctor(argv: list[str]) -> int:
    """Prints what revjax finds on this machine; returns 0 if nothing is wrong with it, else 1."""
    if take(argv, "-h", "--help"):
        print(DESCRIPTION)
        return 0
    if argv:
        raise ConfigError(f"Unexpected {argv[0]!r}. Write: {USAGE}")
    setup()
    get_logger(__name__).info("looking whether a small model is exact here (up to half a minute)")
    text, problems = experiment.doctor()
    print(text)
    return 1 if problems else 0
