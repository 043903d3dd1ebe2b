"""`revjax tokenizer train SOURCE [--vocab_size=8192] [--output=tokenizer.json]`."""

import os
import pathlib
import sys

from .. import data
from ..config import help_text, load
from ..errors import ConfigError, DataError
from ..logging import setup
from .words import leading_names, one_name, take

USAGE = "revjax tokenizer train SOURCE [--vocab_size=8192] [--output=tokenizer.json] [--text_field=text]"
DESCRIPTION = f"""{USAGE}

Learns a byte-level BPE from a text: a file, a folder, a glob or python-stdlib, as for data.source."""


def tokenizer(argv: list[str]) -> int:
    """Trains a tokenizer and writes it; returns the exit code."""
    names, settings = leading_names(argv)
    if take(settings, "-h", "--help"):
        print(help_text(data.TokenizerConfig, prog="revjax tokenizer train", description=DESCRIPTION))
        return 0
    if names[:1] != ["train"]:
        raise ConfigError(f"Expected 'train', but got {names[0] if names else 'nothing'}. Write: {USAGE}")
    source = one_name(names[1:], USAGE)
    config = load(data.TokenizerConfig, (), settings, environ={})
    setup()
    output = pathlib.Path(config.output).expanduser()
    if output.exists():
        raise DataError(f"{output} is there already. Delete it, or set --output to another place.")
    text = data.train_tokenizer(
        source, config.vocab_size, text_field=config.text_field, show_progress=sys.stderr.isatty()
    )
    temporary = output.with_suffix(".tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, output)
    except OSError as e:
        temporary.unlink(missing_ok=True)
        raise DataError(f"Cannot write {output}: {e.strerror}. Set --output to another place.") from None
    print(
        f"{output}: {config.vocab_size:,} tokens. To train with it: --data.tokenizer={output} "
        f"--model.vocab_size={config.vocab_size}"
    )
    return 0
