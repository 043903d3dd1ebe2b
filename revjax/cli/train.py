"""`revjax train [CONFIG.yaml ...] [--section.field=value ...]`."""

from .. import experiment
from ..config import dump, help_text, load
from ..logging import setup
from .words import leading_names, take

USAGE = "revjax train [CONFIG.yaml ...] [--section.field=value ...] [--print-config]"
DESCRIPTION = f"""{USAGE}

Trains a byte-level language model and leaves everything in runs/NAME. Run again, it continues where it ended.
Exit codes: 0 finished, 2 a mistake in the settings, 3 stopped by training.on_trouble, 130 Ctrl-C, 143 SIGTERM."""


def train(argv: list[str]) -> int:
    """Trains the run that files and settings describe; returns the exit code."""
    paths, settings = leading_names(argv)
    if take(settings, "-h", "--help"):
        print(help_text(experiment.RunConfig, prog="revjax train", description=DESCRIPTION))
        return 0
    print_only = take(settings, "--print-config")
    config = load(experiment.RunConfig, paths, settings)
    if print_only:
        print(dump(config), end="")
        return 0
    setup()
    ready = experiment.build(config)
    print(experiment.announce(ready), flush=True)
    result = experiment.run(ready)
    print(f"\n{experiment.summarize(result)}")
    return result.exit_code
