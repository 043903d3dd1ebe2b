"""`revjax benchmark SUITE [--folder runs/benchmarks]`."""

import json
import pathlib

from ..benchmarking import ABOUT, SUITES, plot_frontier, run_suite
from ..errors import ConfigError, nearest
from ..logging import setup
from .words import leading_names, one_name, take

USAGE = f"revjax benchmark {'|'.join(SUITES)} [--folder=runs/benchmarks]"


def benchmark(argv: list[str]) -> int:
    """Prints a line of JSON for each measurement of a suite; an interrupted suite goes on where it was."""
    names, settings = leading_names(argv)
    if take(settings, "-h", "--help"):
        suites = "\n".join(f"  {name:<11} {about}" for name, about in ABOUT.items())
        kept = "A row is a line of JSON; rows are kept in FOLDER/SUITE.jsonl and not measured again."
        print(f"usage: {USAGE}\n\n{suites}\n\nTimes are for two CPU cores. {kept}")
        return 0
    name = one_name(names, USAGE)
    if name not in SUITES:
        raise ConfigError(f"There is no suite {name!r}.{nearest(name, SUITES)} Write: {USAGE}")
    unknown = [word for word in settings if not word.startswith("--folder=")]
    if unknown:
        raise ConfigError(f"Unexpected {unknown[0]!r}. Write: {USAGE}")
    folder = settings[-1].removeprefix("--folder=") if settings else "runs/benchmarks"
    setup()
    rows = []
    for row in run_suite(name, pathlib.Path(folder)):
        print(json.dumps(row), flush=True)
        rows.append(row)
    if "way" in rows[0]:
        title = f"{rows[0].get('device', rows[0]['backend'])}, jax {rows[0]['jax']}"
        plot_frontier(rows, pathlib.Path(folder) / f"{name}.png", title=title)
    return 0
