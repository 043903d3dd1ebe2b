from revjax.cli import call
from revjax.cli.train import train

raise SystemExit(call(train))
