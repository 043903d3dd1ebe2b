"""What would pass silently in use is an error in tests: here rank promotion; warnings are in pyproject.toml.

Eight CPU devices let a sharding test run where it stands. They cost a test on one device nothing (7.3 s against
7.2 s for the reconstruction tests of 96 layers, on two cores), and neither did one thread per operation gain any.
"""

import atexit
import logging
import os
import tempfile

import jax
import pytest

_caches = tempfile.TemporaryDirectory()  # the user's own stays as it is
atexit.register(_caches.cleanup)
os.environ["REVJAX__MESH__DATA"] = "1"  # of commands: a run is on one device where nothing is said of more
os.environ["XDG_CACHE_HOME"] = _caches.name
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # of processes that tests start
jax.config.update("jax_enable_compilation_cache", False)
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(autouse=True)
def _logging_as_it_was():
    """A command sends the log to a stderr that is closed after its test, and keeps it from pytest's `caplog`."""
    logger = logging.getLogger("revjax")
    handlers, level, propagate = logger.handlers[:], logger.level, logger.propagate
    yield
    logger.handlers[:], logger.propagate = handlers, propagate
    logger.setLevel(level)
