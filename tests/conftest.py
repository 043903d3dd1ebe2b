"""What would pass silently in use is an error in tests: here rank promotion; warnings are in pyproject.toml.

Eight CPU devices let a sharding test run where it stands. They cost a test on one device nothing (7.3 s against
7.2 s for the reconstruction tests of 96 layers, on two cores), and neither did one thread per operation gain any.

Many tests compile the same small programs: each is compiled once, and kept in a folder of the session's own that all
workers and the processes that they start share.
"""

import atexit
import gc
import logging
import os
import tempfile

import jax
import pytest
from jax._src import compiler

if "PYTEST_XDIST_WORKER" not in os.environ:  # a worker has those of the process that started it
    caches = os.environ.get("REVJAX_TEST_CACHES")  # a folder that several sessions share
    if caches is None:
        _caches = tempfile.TemporaryDirectory()  # the user's own stays as it is
        atexit.register(_caches.cleanup)
        caches = _caches.name
    os.environ["XDG_CACHE_HOME"] = caches
for name, value in {
    "jax_compilation_cache_dir": os.path.join(os.environ["XDG_CACHE_HOME"], "programs"),
    "jax_compilation_cache_max_size": 2**31,  # a limit brings locks
    "jax_persistent_cache_min_compile_time_secs": 0.3,
}.items():
    os.environ[name.upper()] = str(value)  # of processes that tests start
    jax.config.update(name, value)
OLDER_EMITTERS = "--xla_cpu_use_fusion_emitters=false" if jax.__version_info__ < (0, 11) else ""
XLA_FLAGS = os.environ.get("XLA_FLAGS", "").replace(OLDER_EMITTERS, "").strip()
os.environ["XLA_FLAGS"] = f"{XLA_FLAGS} {OLDER_EMITTERS}".strip()
os.environ["REVJAX__MESH__DATA"] = "1"  # of commands: a run is on one device where nothing is said of more
jax.config.update("jax_num_cpu_devices", 8)
if jax.default_backend() == "gpu":
    jax.config.update("jax_default_matmul_precision", "highest")  # products of fp32 are rounded to 10 bits there
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_collection_finish():
    """What imports and collection made stays: looking through it again and again was a fourteenth of a test's time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


def _compile_options(*args, env_options_overrides=None, **kwargs):
    if OLDER_EMITTERS and OLDER_EMITTERS not in os.environ["XLA_FLAGS"]:  # in an optimized test
        env_options_overrides = {"xla_cpu_use_fusion_emitters": True} | (env_options_overrides or {})
    return _get_compile_options(*args, env_options_overrides=env_options_overrides, **kwargs)


# XLA_FLAGS are of a process, and jax has no other way to give an option to every program of some tests.
_get_compile_options, compiler.get_compile_options = compiler.get_compile_options, _compile_options


@pytest.hookimpl(tryfirst=True)  # before fixtures, also those of a module
def pytest_runtest_setup(item):
    """What a program computes, to the bit, is tested as users compile it: these tests are marked `optimized`.

    What commands write, print, keep and refuse is not of the compiler. There the programs, which hardly run, are
    compiled without most optimizations (and with a tanh that depends on what stands beside it), and, where there are
    two kinds of makers of machine code, by the older ones: in half, and with these in a quarter of the time.
    """
    name, without = "jax_disable_most_optimizations", item.get_closest_marker("optimized") is None
    jax.config.update(name, without)
    os.environ[name.upper()] = str(without)  # of processes that tests start
    os.environ["XLA_FLAGS"] = f"{XLA_FLAGS} {OLDER_EMITTERS}".strip() if without else XLA_FLAGS


@pytest.fixture(autouse=True)
def _logging_as_it_was():
    """A command sends the log to a stderr that is closed after its test, and keeps it from pytest's `caplog`."""
    logger = logging.getLogger("revjax")
    handlers, level, propagate = logger.handlers[:], logger.level, logger.propagate
    yield
    logger.handlers[:], logger.propagate = handlers, propagate
    logger.setLevel(level)
