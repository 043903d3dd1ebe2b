from revjax.cli import call
from revjax.cli.doctor import doctor

raise SystemExit(call(doctor))
