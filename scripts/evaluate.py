from revjax.cli import call
from revjax.cli.evaluate import evaluate

raise SystemExit(call(evaluate))
