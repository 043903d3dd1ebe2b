"""`revjax plan [CONFIG.yaml ...] --budget=40GiB [--time] [--maximize=context] [--hardware=h200] [--json] ...`."""

import json
import pathlib

from .. import experiment
from ..config import load
from ..errors import ConfigError
from ..logging import setup
from ..memory import HARDWARE, plot_plans
from .words import leading_names, refuse_unknown, run_help, take

_VALUES = ("--budget", "--maximize", "--hardware", "--plot")
USAGE = (
    "revjax plan [CONFIG.yaml ...] --budget=40GiB [--time] [--maximize=context|layers|batch] [--hardware=h200] "
    "[--section.field=value ...] [--json] [--plot=FILE.png]"
)
DESCRIPTION = f"""{USAGE}

Finds the fastest training step of the config that fits into a budget of memory: what the backward pass keeps, into
how many micro-batches a batch is cut, and the tiles of loss and MLP. Steps are compiled to see that they fit; nothing
is allocated, and nothing is trained.

The budget is of one device and for everything: 40GiB, 500MB; a part of the device, 0.5; auto, most of the device;
aggressive, as little as can be; balanced, where less memory begins to cost much more time.

--time takes steps of a few plans that fit, one of each number of micro-batches, on random tokens, and chooses the one
that is the fastest by the clock. It allocates what one step needs.

--maximize asks the other way round: the longest context, the deepest model or the largest batch for the budget.
--hardware is the device that is meant, where it is not this one: {", ".join(HARDWARE)}. Its memory and speed are known
from data sheets; programs are compiled for the device that is here, so bytes are an estimate of those there."""


def plan(argv: list[str]) -> int:
    """Prints the fastest step of the config that fits, beside others; returns the exit code."""
    paths, words = leading_names(argv)
    if take(words, "-h", "--help"):
        print(run_help(paths, words, prog="revjax plan", description=DESCRIPTION))
        return 0
    refuse_unknown(words, ["--json", "--time", *(f"{name}=" for name in _VALUES)], USAGE)
    as_json, timed = take(words, "--json"), take(words, "--time")
    given = {name: _take_value(words, name) for name in _VALUES}
    setup()
    config = load(experiment.RunConfig, paths, words)
    experiment.use_compilation_cache(config.run.compilation_cache)
    budget, what = given["--budget"] or config.memory.budget, given["--maximize"]
    if what is None:
        sizes, found = {}, experiment.plan(config, budget, given["--hardware"], timed=timed)
    elif timed:
        raise ConfigError(f"--time is for one size: leave it out, or --maximize={what}.")
    else:
        config, found, sizes = experiment.largest(config, what, budget, given["--hardware"])
    if as_json:
        print(json.dumps(experiment.plan_json(config, found, sizes)))
    else:
        print(experiment.describe_plan(config, found, sizes))
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
