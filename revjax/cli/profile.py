"""`revjax profile [CONFIG.yaml ...] [--section.field=value ...] [--output=FOLDER]`."""

import json
import pathlib

from .. import experiment
from ..config import help_text, load
from ..errors import ConfigError
from ..logging import setup
from ..memory import plot_timeline, timeline
from .words import leading_names, take

USAGE = "revjax profile [CONFIG.yaml ...] [--section.field=value ...] [--output=FOLDER]"
DESCRIPTION = f"""{USAGE}

Says where the memory of the config's training step goes, from the buffers that XLA gives the compiled program on this
machine: at the highest point by what they are for, the largest with the line of Python that they come from, and over
the whole step as a picture. Nothing is allocated, and nothing is trained.

The folder of --output (default: runs/profiles/NAME) gets memory.png and memory.json."""


def profile(argv: list[str]) -> int:
    """Prints and draws where the memory of the config's training step goes; returns the exit code."""
    paths, settings = leading_names(argv)
    if take(settings, "-h", "--help"):
        print(help_text(experiment.RunConfig, prog="revjax profile", description=DESCRIPTION))
        return 0
    outputs = [word for word in settings if word.startswith("--output=")]
    setup()
    config = load(experiment.RunConfig, paths, [word for word in settings if word not in outputs])
    default = pathlib.Path(config.run.folder) / "profiles" / config.run.name
    folder = (pathlib.Path(outputs[-1].removeprefix("--output=")) if outputs else default).expanduser()
    ready = experiment.build(config, dry=True)
    try:
        found = timeline(ready.train_step, ready.state.params)
    except ValueError as e:
        raise ConfigError(f"There is no profile of memory here: {e}") from None
    print(experiment.describe_memory(ready, found), flush=True)
    title = f"{config.run.name}: {config.model.num_layers} layers, plan {config.memory.plan}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        plot_timeline(found, folder / "memory.png", title=title)
        (folder / "memory.json").write_text(json.dumps(found.to_json()) + "\n")
    except OSError as e:
        raise ConfigError(f"Cannot write to {folder} (--output): {e.strerror}.") from None
    print(f"{'results':<12} {folder}/: memory.png, memory.json")
    return 0
