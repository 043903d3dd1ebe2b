"""`revjax train [CONFIG.yaml ...] [--section.field=value ...]`."""

from .. import experiment
from ..config import load_with_provenance
from ..errors import ConfigError
from ..logging import setup
from .terminal import shown
from .words import leading_names, refuse_unknown, run_help, take

USAGE = "revjax train [CONFIG.yaml ...] [--section.field=value ...] [--print-config | --dry-run] [--log-format=json]"
_OPTIONS = ("--print-config", "--dry-run", "--log-format=", "--allow-change=")
DESCRIPTION = f"""{USAGE}

Trains a model and leaves everything in runs/NAME. Run again, it continues where it ended. With a config, --help shows
its values, and the fields of its family of models (others are --model.family=encoder, encoder-decoder and, with
--data.kind=images, vision).
--print-config shows every value and where it was set. --dry-run checks everything, tells what the run would need,
and trains nothing. A run that was begun refuses other settings, but not those that are named, such as
--allow-change=training.steps,training.eval_every. --log-format=json writes one JSON object a line to stderr.
Exit codes: 0 finished, 2 a mistake in the settings, 3 training ended by training.on_trouble or its model broken (a loss
that is no number), 130 Ctrl-C, 143 SIGTERM, 138 SIGUSR1."""


def train(argv: list[str]) -> int:
    """Trains the run that files and settings describe; returns the exit code."""
    paths, settings = leading_names(argv)
    if take(settings, "-h", "--help"):
        print(run_help(paths, settings, prog="revjax train", description=DESCRIPTION))
        return 0
    refuse_unknown(settings, _OPTIONS, USAGE)
    print_only, dry = take(settings, "--print-config"), take(settings, "--dry-run")
    allowed = [word for word in settings if word.startswith("--allow-change=")]
    settings = [word for word in settings if word not in allowed]
    allow_change = [name for word in allowed for name in word.partition("=")[2].replace("-", "_").split(",") if name]
    formats = [word for word in settings if word.startswith("--log-format=")]
    settings = [word for word in settings if word not in formats]
    if unknown := [word for word in formats if word not in ("--log-format=json", "--log-format=text")]:
        raise ConfigError(f"--log-format is json or text, but got {unknown[0].partition('=')[2]!r}.")
    if not paths and not settings:
        raise ConfigError(f"Give a config, such as configs/quickstart.yaml. Write: {USAGE}")
    setup(format="json" if "--log-format=json" in formats else "text")
    loaded = load_with_provenance(experiment.RunConfig, paths, settings)
    if print_only:
        print(loaded.describe(), end="")
        return 0
    config = loaded.config
    experiment.use_compilation_cache(config.run.compilation_cache)
    ready = experiment.build(config, dry=dry, allow_change=allow_change)
    print(experiment.announce(ready), flush=True)
    if dry:
        return 0
    result = experiment.run(ready)
    print(f"\n{shown(experiment.summarize(result))}")
    return result.exit_code
