from revjax.cli import call
from revjax.cli.check import check

raise SystemExit(call(check))
