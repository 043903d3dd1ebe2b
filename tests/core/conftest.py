import jax
import pytest


@pytest.fixture
def four_devices():
    """A mesh of four CPU devices over one axis, "data"."""
    if jax.device_count() < 4:
        pytest.skip("needs four devices")
    return jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:4])
