"""`revjax generate runs/NAME [--prompt="def " | --prompts=FILE] [--temperature=0.7] ...`."""

import json

from .. import experiment
from ..config import help_text, load
from ..logging import setup
from .terminal import shown
from .words import leading_names, one_name, take

USAGE = "revjax generate runs/NAME [--prompt='def ' | --prompts=FILE] [--temperature=0.7] [--max_new_tokens=300]"
DESCRIPTION = f"""{USAGE}

Prints what the model of a run makes of a prompt, as it comes; of a file of prompts, one JSON object a line, with
"prompt" and "text"."""


def generate(argv: list[str]) -> int:
    """Prints what the model of a run makes of one prompt or of many; returns the exit code."""
    names, settings = leading_names(argv)
    if take(settings, "-h", "--help"):
        print(help_text(experiment.SampleConfig, prog="revjax generate", description=DESCRIPTION))
        return 0
    options = load(experiment.SampleConfig, (), settings, environ={})
    prompts = None if options.prompts is None else experiment.read_prompts(options.prompts)
    experiment.use_compilation_cache("auto")
    setup()
    folder = one_name(names, USAGE)
    run = experiment.load_language_model(folder)
    tokenizer = experiment.chat_tokenizer(run, folder) if options.chat else run.tokenizer
    if prompts is not None:
        for prompt, text in experiment.sample_texts(run.model, tokenizer, prompts, options):
            print(shown(json.dumps({"prompt": prompt, "text": text}, ensure_ascii=False)), flush=True)
        return 0
    print(shown(options.prompt), end="\n" if options.chat else "", flush=True)
    for text in experiment.stream_text(run.model, tokenizer, options):
        print(shown(text), end="", flush=True)
    print()
    return 0
