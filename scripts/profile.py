import importlib.util
import pathlib
import sys
import sysconfig

if __name__ == "__main__":
    from revjax.cli import call
    from revjax.cli.profile import profile

    raise SystemExit(call(profile))

# Python looks for modules in a script's folder first, so `import profile` in another script (cProfile does it) finds
# this file. It shall find the standard library's.
_spec = importlib.util.spec_from_file_location("profile", pathlib.Path(sysconfig.get_path("stdlib"), "profile.py"))
sys.modules[__name__] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(sys.modules[__name__])
