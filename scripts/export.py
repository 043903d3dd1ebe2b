from revjax.cli import call
from revjax.cli.export import export

raise SystemExit(call(export))
