"""`revjax train [CONFIG.yaml ...] [--section.field=value ...]`."""

from .. import experiment
from ..config import help_text, load_with_provenance
from ..logging import setup
from .words import leading_names, take

USAGE = "revjax train [CONFIG.yaml ...] [--section.field=value ...] [--print-config | --dry-run] [--log-format=json]"
DESCRIPTION = f"""{USAGE}

Trains a language model and leaves everything in runs/NAME. Run again, it continues where it ended.
--print-config shows every value and where it was set. --dry-run checks everything, tells what the run would need,
and trains nothing. A run that was begun refuses other settings, but not those that are named, such as
--allow-change=training.steps,training.eval_every. --log-format=json writes one JSON object a line to stderr.
Exit codes: 0 finished, 2 a mistake in the settings, 3 stopped by training.on_trouble, 130 Ctrl-C, 143 SIGTERM,
138 SIGUSR1."""


def train(argv: list[str]) -> int:
    """Trains the run that files and settings describe; returns the exit code."""
    paths, settings = leading_names(argv)
    if take(settings, "-h", "--help"):
        print(help_text(experiment.RunConfig, prog="revjax train", description=DESCRIPTION))
        return 0
    print_only, dry = take(settings, "--print-config"), take(settings, "--dry-run")
    allowed = [word for word in settings if word.startswith("--allow-change=")]
    settings = [word for word in settings if word not in allowed]
    allow_change = [name for word in allowed for name in word.partition("=")[2].replace("-", "_").split(",") if name]
    setup(format="json" if take(settings, "--log-format=json") else "text")
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
    print(f"\n{experiment.summarize(result)}")
    return result.exit_code
