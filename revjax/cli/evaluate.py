"""`revjax evaluate runs/NAME [--source=PATH]`."""

from .. import experiment
from ..config import help_text, load
from ..logging import setup
from .words import leading_names, one_name, take

USAGE = "revjax evaluate runs/NAME [--source=PATH] [--max_batches=100]"
DESCRIPTION = f"""{USAGE}

Prints the loss of the model of a run, at its latest checkpoint, on the text that the run held out, or on another,
and how many of its tokens these were: a rest that fills no batch is left out (the least with --batch_size=1)."""


def evaluate(argv: list[str]) -> int:
    """Prints the loss of the model of a run on a text; returns the exit code."""
    names, settings = leading_names(argv)
    if take(settings, "-h", "--help"):
        print(help_text(experiment.EvaluateConfig, prog="revjax evaluate", description=DESCRIPTION))
        return 0
    options = load(experiment.EvaluateConfig, (), settings, environ={})
    experiment.use_compilation_cache("auto")
    setup()
    for done in experiment.evaluate(one_name(names, USAGE), options):
        print(
            f"{done.source}: {done.bits_per_byte:.4f} bits/byte, {done.loss:.4f} nats/token, perplexity "
            f"{done.perplexity:.4g}, over {done.num_tokens:,} of {done.num_tokens_of_text:,} tokens"
        )
    return 0
