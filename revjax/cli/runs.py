"""`revjax runs [FOLDER] [--plot=runs.png]`."""

import pathlib
import sys

from ..errors import ConfigError, RunFolderError
from ..training import find_runs, plot_runs, summarize_run, table
from .words import leading_names, take

USAGE = "revjax runs [FOLDER | RUN_FOLDER ...] [--plot=FILE.png]"


def runs(argv: list[str]) -> int:
    """Prints a table of runs, of all in a folder (default: runs) or of those named; returns the exit code."""
    names, settings = leading_names(argv)
    if take(settings, "-h", "--help"):
        print(f"usage: {USAGE}\n\nA table of runs, and with --plot their losses in one picture.")
        return 0
    unknown = [word for word in settings if not word.startswith("--plot=")]
    if unknown:
        raise ConfigError(f"Unexpected {unknown[0]!r}. Write: {USAGE}")
    named = [pathlib.Path(name).expanduser() for name in names]
    is_run = [(path / "config.yaml").is_file() for path in named]
    folders = named if named and all(is_run) else [run for path in named or ["runs"] for run in find_runs(path)]
    summaries, code = [], 0
    for folder in folders:
        try:
            summaries.append(summarize_run(folder))
        except RunFolderError as e:  # the others can be shown
            print(f"error: {e}", file=sys.stderr)
            code = 2
    print(table(summaries))
    for word in settings[-1:]:
        path = word.removeprefix("--plot=")
        try:
            plot_runs(summaries, pathlib.Path(path))
        except (OSError, ValueError) as e:  # no such folder; no such format
            raise ConfigError(
                f"Cannot write the plot to {path!r} (--plot): {getattr(e, 'strerror', None) or e}"
            ) from None
        print(f"\n{path}")
    return code
