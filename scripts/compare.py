from revjax.cli import call
from revjax.cli.compare import compare

raise SystemExit(call(compare))
