"""`revjax compare STUDY.yaml`."""

import pathlib

from .. import benchmarking, experiment
from ..config import load
from ..logging import setup
from .words import leading_names, take

USAGE = "revjax compare STUDY.yaml [--section.field=value ...] [--report]"
DESCRIPTION = f"""usage: {USAGE}

Trains every variant of a study with every seed, prints a table of them beside the baseline, and draws it. What is in
the file of results is not trained again; an interrupted study goes on where it was. --report trains nothing."""


def compare(argv: list[str]) -> int:
    """Makes the runs of a study that are not made yet, and prints what all have come to; returns the exit code."""
    paths, settings = leading_names(argv)
    if take(settings, "-h", "--help"):
        print(DESCRIPTION)
        return 0
    only_report = take(settings, "--report")
    setup()
    config = load(benchmarking.StudyConfig, paths, settings, environ={})
    experiment.use_compilation_cache("auto")
    rows = list(benchmarking.compare(config, measure=not only_report))
    comparisons = benchmarking.summarize(rows, config.baseline)
    if comparisons:
        print(benchmarking.table(comparisons))
        picture = pathlib.Path(config.results).with_suffix(".png")
        benchmarking.plot(comparisons, picture, title=pathlib.Path(config.results).stem)
        print(f"\n{picture}")
    missing = len(config.variants) * len(config.seeds) - len(rows)
    if missing:
        print(
            f"{missing} of {len(config.variants) * len(config.seeds)} runs are not made yet: the same command goes on."
        )
    return 0 if only_report or not missing else 130
