"""Compiled programs are kept for the next start, in a folder that only their owner may write to."""

import os
import pathlib
import stat
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PROGRAM = """
import logging, sys
logging.basicConfig()
import jax
from revjax.experiment import use_compilation_cache
print(use_compilation_cache(eval(sys.argv[1])))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.jit(lambda x: x * 2 + 1)(3.0)
"""


def start(argument, home, **environ):
    environ = (
        {name: value for name, value in os.environ.items() if "_CACHE_" not in name}
        | {
            "XDG_CACHE_HOME": str(home),
            "JAX_ENABLE_COMPILATION_CACHE": "true",
            "PYTHONPATH": str(ROOT),
            "JAX_PLATFORMS": "cpu",
        }
        | environ
    )
    command = [sys.executable, "-c", PROGRAM, repr(argument)]
    return subprocess.run(command, env=environ, capture_output=True, text=True, check=True, timeout=120)


def test_programs_go_into_the_users_cache_which_is_private(tmp_path):
    folder = tmp_path / "revjax" / "xla"
    assert start("auto", tmp_path).stdout.strip() == str(folder)
    assert list(folder.glob("*-cache")) and stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_a_folder_that_others_may_write_to_is_not_used(tmp_path):
    folder = tmp_path / "open"
    folder.mkdir()
    folder.chmod(0o777)
    done = start(str(folder), tmp_path)
    assert done.stdout.strip() == "None" and f"Type: chmod 700 {folder}" in done.stderr
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    "argument, environ",
    [(None, {}), ("auto", {"JAX_ENABLE_COMPILATION_CACHE": "false"})],
)
def test_no_cache_is_made_where_none_is_wanted(tmp_path, argument, environ):
    assert start(argument, tmp_path, **environ).stdout.strip() == "None"
    assert not (tmp_path / "revjax").exists()


def test_a_cache_that_jax_was_told_of_is_left_as_it_is(tmp_path):
    told = tmp_path / "told"
    done = start("auto", tmp_path, JAX_COMPILATION_CACHE_DIR=str(told))
    assert done.stdout.strip() == str(told) and not (tmp_path / "revjax").exists()
