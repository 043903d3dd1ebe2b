"""`revjax plan [CONFIG.yaml ...] --budget=40GiB [--section.field=value ...] [--json] [--plot=FILE.png]`."""

import json
import pathlib

from .. import experiment
from ..config import help_text, load
from ..errors import ConfigError
from ..logging import setup
from ..memory import plot_plans
from .words import leading_names, take

USAGE = "revjax plan [CONFIG.yaml ...] --budget=40GiB [--section.field=value ...] [--json] [--plot=FILE.png]"
DESCRIPTION = f"""{USAGE}

Finds the fastest training step of the config that fits into a budget of memory: what the backward pass keeps, into
how many micro-batches a batch is cut, and the tiles of loss and MLP. Steps are compiled to see that they fit; nothing
is allocated, and nothing is trained.

The budget is of one device and for everything: 40GiB, 500MB; a part of the device, 0.5; auto, most of the device;
aggressive, as little as can be; balanced, where less memory begins to cost much more time."""


def plan(argv: list[str]) -> int:
    """Prints the fastest step of the config that fits, beside others; returns the exit code."""
    paths, words = leading_names(argv)
    if take(words, "-h", "--help"):
        print(help_text(experiment.RunConfig, prog="revjax plan", description=DESCRIPTION))
        return 0
    as_json = take(words, "--json")
    given = {name: _take_value(words, name) for name in ("--budget", "--plot")}
    setup()
    config = load(experiment.RunConfig, paths, words)
    found = experiment.plan(config, given["--budget"] or config.memory.budget or "auto")
    print(json.dumps(experiment.plan_json(config, found)) if as_json else experiment.describe_plan(config, found))
    if given["--plot"]:
        try:
            path = plot_plans(found, pathlib.Path(given["--plot"]).expanduser(), title=config.run.name)
        except (OSError, ValueError) as e:  # no such folder; no such format
            what = getattr(e, "strerror", None) or e
            raise ConfigError(f"Cannot write the plot to {given['--plot']!r} (--plot): {what}") from None
        if not as_json:
            print(f"{'plot':<12} {path}")
    return 0


def _take_value(words: list[str], name: str) -> str | None:
    """Removes `name=VALUE` from `words`; returns the last value, or None."""
    found = [word for word in words if word == name or word.startswith(f"{name}=")]
    for word in found:
        words.remove(word)
    if any(word == name or word == f"{name}=" for word in found):
        raise ConfigError(f"{name} needs a value: write {name}=VALUE.")
    return found[-1].partition("=")[2] if found else None
