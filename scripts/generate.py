from revjax.cli import call
from revjax.cli.generate import generate

raise SystemExit(call(generate))
