import jax
import jax.numpy as jnp
import numpy as np
import pytest

from revjax.nn import KVCache


def test_append_writes_behind_what_is_there():
    cache = KVCache.zeros(2, 6, 1, 3, jnp.float32)
    first, second = jnp.full((2, 2, 1, 3), 1.0), jnp.full((2, 1, 1, 3), 2.0)
    cache = cache.append(first, -first).append(second, -second)
    np.testing.assert_array_equal(cache.k_BSKH[0, :, 0, 0], [1, 1, 2, 0, 0, 0])
    np.testing.assert_array_equal(cache.v_BSKH, -cache.k_BSKH)
    assert cache.length == 3 and cache.length.dtype == jnp.int32


def test_a_cache_is_a_value():
    cache = KVCache.zeros(1, 6, 1, 3)
    cache.append(*[jnp.ones((1, 2, 1, 3))] * 2)
    assert cache.length == 0 and not np.any(cache.k_BSKH)


def test_a_cache_goes_through_scan():
    cache = KVCache.zeros(1, 6, 1, 3)
    cache, _ = jax.lax.scan(lambda c, x: (c.append(x, x), None), cache, jnp.ones((4, 1, 1, 1, 3)))
    assert cache.length == 4 and cache.k_BSKH.dtype == jnp.bfloat16


def test_a_full_cache_says_how_to_make_it_longer():
    x = jnp.ones((1, 4, 1, 3))
    cache = KVCache.zeros(1, 6, 1, 3).append(x, x)
    with pytest.raises(ValueError, match="holds 4, so 4 more do not fit"):
        cache.append(x, x)


def test_keys_of_another_shape_are_an_error():
    with pytest.raises(ValueError, match=r"shape \(1, T, 1, 3\), but got \(1, 4, 2, 3\)"):
        KVCache.zeros(1, 6, 1, 3).append(*[jnp.ones((1, 4, 2, 3))] * 2)
