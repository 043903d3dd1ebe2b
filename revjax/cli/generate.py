"""`revjax generate runs/NAME [--prompt="def "] [--temperature=0.7] ...`."""

from .. import experiment
from ..config import help_text, load
from .words import leading_names, one_name, take

USAGE = "revjax generate runs/NAME [--prompt='def '] [--temperature=0.7] [--max_new_tokens=300]"


def generate(argv: list[str]) -> int:
    """Prints a text that the model of a run makes of a prompt, as it comes; returns the exit code."""
    names, settings = leading_names(argv)
    if take(settings, "-h", "--help"):
        print(help_text(experiment.SampleConfig, prog="revjax generate", description=USAGE))
        return 0
    options = load(experiment.SampleConfig, (), settings, environ={})
    experiment.use_compilation_cache("auto")
    run = experiment.load_run(one_name(names, USAGE))
    print(options.prompt, end="", flush=True)
    for text in experiment.stream_text(run.model, run.tokenizer, options):
        print(text, end="", flush=True)
    print()
    return 0
