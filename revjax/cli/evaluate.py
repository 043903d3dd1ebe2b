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
        if done.accuracy is not None:
            what = f"accuracy {done.accuracy:.2%}, {done.loss:.4f} nats/image"
            print(f"{done.source}: {what}, over {done.count:,} of {done.size:,} images")
            continue
        bits = "" if done.bits_per_byte is None else f"{done.bits_per_byte:.4f} bits/byte, "
        what = f"{bits}{done.loss:.4f} nats/token, perplexity {done.perplexity:.4g}"
        of = "" if done.bits_per_byte is None else f" of {done.size:,}"  # elsewhere, not every token is predicted
        print(f"{done.source}: {what}, over {done.count:,}{of} tokens")
    return 0
