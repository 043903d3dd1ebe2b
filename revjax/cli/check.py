"""`revjax check [CONFIG.yaml ...] [--section.field=value ...]`."""

from .. import experiment
from ..config import load
from ..logging import setup
from .words import leading_names, run_help, take

USAGE = "revjax check [CONFIG.yaml ...] [--section.field=value ...]"
DESCRIPTION = f"""{USAGE}

Rebuilds every layer of the config's model, untrained, on this machine, and compares its gradients with those of
stored activations and with finite differences. Exit codes: 0 all is right, 1 something is not."""


def check(argv: list[str]) -> int:
    """Prints whether the config's model has right gradients on this machine; returns 0 if it does, else 1."""
    paths, settings = leading_names(argv)
    if take(settings, "-h", "--help"):
        print(run_help(paths, settings, prog="revjax check", description=DESCRIPTION))
        return 0
    config = load(experiment.RunConfig, paths, settings)
    setup()
    experiment.use_compilation_cache(config.run.compilation_cache)
    report = experiment.check_model(config)
    print(report)
    return 0 if report.ok else 1
