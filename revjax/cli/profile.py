"""`revjax profile [CONFIG.yaml ...] [--section.field=value ...] [--time] [--output=FOLDER]`."""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable

from .. import experiment
from ..config import load
from ..errors import ConfigError
from ..logging import setup
from ..memory import GPUUse, OpTimes, gpu_use, op_times, plot_op_times, plot_timeline, timeline
from .words import leading_names, refuse_unknown, run_help, take

USAGE = "revjax profile [CONFIG.yaml ...] [--section.field=value ...] [--time] [--output=FOLDER]"
DESCRIPTION = f"""{USAGE}

Says where the memory of the config's training step goes, from the buffers that XLA gives the compiled program on this
machine: at the highest point by what they are for, the largest with the line of Python that they come from, and over
the whole step as a picture. Nothing is allocated, and nothing is trained.

With --time it also takes four steps, on random tokens, and says where their time goes: by what it is for and by loop,
and the longest operations with their line of Python. On NVIDIA GPUs it goes on for five seconds more, and says what
power and energy that took, by the driver (NVML). What is trained so is thrown away.

The folder of --output (default: runs/profiles/NAME) gets memory.png and memory.json; with --time also time.png,
time.json, and trace.json.gz, for ui.perfetto.dev or chrome://tracing."""


def profile(argv: list[str]) -> int:
    """Prints and draws where the memory of the config's training step goes; returns the exit code."""
    paths, settings = leading_names(argv)
    if take(settings, "-h", "--help"):
        print(run_help(paths, settings, prog="revjax profile", description=DESCRIPTION))
        return 0
    refuse_unknown(settings, ["--time", "--output="], USAGE)
    with_time = take(settings, "--time")
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
    config = ready.config
    title = f"{config.run.name}: {config.model.num_layers} layers, plan {config.memory.plan}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        plot_timeline(found, folder / "memory.png", title=title)
        (folder / "memory.json").write_text(json.dumps(found.to_json()) + "\n")
        if with_time:
            take_step = experiment.stepper(config, experiment.Program.of(config, ready.devices))
            step = functools.partial(take_step, ready.train_step)
            times = _times(ready, step, folder / "trace.json.gz")
            print(f"\n{experiment.describe_time(times)}", flush=True)
            plot_op_times(times, folder / "time.png", title=title)
            use = _gpu_use(step)
            print(experiment.describe_gpu_use(use, config.tokens_per_step))
            gpus = None if isinstance(use, str) else [dataclasses.asdict(gpu) for gpu in use]
            (folder / "time.json").write_text(json.dumps(times.to_json() | {"gpus": gpus}) + "\n")
    except OSError as e:
        raise ConfigError(f"Cannot write to {folder} (--output): {e.strerror}.") from None
    print(f"\n{experiment.describe_suggestions(experiment.suggestions(config, ready.state, ready.devices))}\n")
    files = ["memory.png", "memory.json"] + ["time.png", "time.json", "trace.json.gz"] * with_time
    print(f"{'results':<12} {folder}/: {', '.join(files)}")
    return 0


def _times(ready: experiment.Experiment, step: Callable[[], None], trace: pathlib.Path) -> OpTimes:
    try:
        return op_times(ready.train_step, step, trace=trace)
    except ValueError as e:
        raise ConfigError(f"There is no profile of time here: {e}") from None


def _gpu_use(step: Callable[[], None]) -> list[GPUUse] | str:
    """Or why there is none."""
    try:
        return gpu_use(step)
    except ValueError as e:
        return str(e)
