from revjax.cli import call
from revjax.cli.benchmark import benchmark

raise SystemExit(call(benchmark))
