from revjax.cli import call
from revjax.cli.runs import runs

raise SystemExit(call(runs))
