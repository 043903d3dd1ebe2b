from revjax.cli import call
from revjax.cli.convert import convert

raise SystemExit(call(convert))
