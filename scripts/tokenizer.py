from revjax.cli import call
from revjax.cli.tokenizer import tokenizer

raise SystemExit(call(tokenizer))
