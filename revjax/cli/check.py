"""`revjax check [CONFIG.yaml ...] [--section.field=value ...]`."""

from .. import experiment
from ..config import help_text, load
from .words import leading_names, take

USAGE = "revjax check [CONFIG.yaml ...] [--section.field=value ...]"


def check(argv: list[str]) -> int:
    """Prints whether the config's model has right gradients on this machine; returns 0 if it does, else 1."""
    paths, settings = leading_names(argv)
    if take(settings, "-h", "--help"):
        print(help_text(experiment.RunConfig, prog="revjax check", description=USAGE))
        return 0
    report = experiment.check_model(load(experiment.RunConfig, paths, settings))
    print(report)
    return 0 if report.ok else 1
