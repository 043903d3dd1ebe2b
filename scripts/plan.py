from revjax.cli import call
from revjax.cli.plan import plan

raise SystemExit(call(plan))
