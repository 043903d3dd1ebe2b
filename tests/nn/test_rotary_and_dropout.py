import jax
import jax.numpy as jnp
import numpy as np
import pytest

from revjax.nn import RopeScaling, Rotary, dropout, rotary, stochastic_depth
from revjax.nn.rope_scaling import frequencies


def test_rotary_is_a_rotation_of_complex_channels():
    x = jax.random.normal(jax.random.key(0), (2, 5, 3, 8))
    positions = jnp.arange(10).reshape(2, 5)
    angles = np.asarray(positions)[:, :, None, None] * 100.0 ** (-np.arange(0, 8, 2) / 8)
    z = (np.asarray(x[..., :4]) + 1j * np.asarray(x[..., 4:])) * np.exp(1j * angles)
    np.testing.assert_allclose(
        rotary(x, positions, base=100.0), np.concatenate([z.real, z.imag], -1), rtol=1e-4, atol=1e-5
    )


def test_position_zero_changes_nothing_and_the_dtype_stays():
    x = jax.random.normal(jax.random.key(0), (2, 5, 3, 8)).astype(jnp.bfloat16)
    y = Rotary()(x, jnp.zeros((1, 5), int))
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y, x)


def test_scaled_frequencies_are_what_their_papers_say():
    """Beside these, parity with transformers in tests/conversion."""
    plain = np.asarray(frequencies(1e4, 16))
    scaled = lambda length=10, **options: np.asarray(RopeScaling(**options).frequencies(1e4, 16, jnp.int32(length)))
    np.testing.assert_allclose(scaled(kind="linear", factor=4.0), plain / 4)
    long = dict(factor=8.0, original_max_length=64)
    llama3 = scaled(kind="llama3", **long)
    waves = 2 * np.pi / plain
    np.testing.assert_allclose(llama3[waves < 16], plain[waves < 16])
    np.testing.assert_allclose(llama3[waves > 64], plain[waves > 64] / 8, rtol=1e-6)
    yarn = scaled(kind="yarn", **long)
    assert yarn[0] == plain[0] and yarn[-1] == plain[-1] / 8 and np.all(np.diff(yarn / plain) <= 0)
    np.testing.assert_allclose(scaled(64, kind="dynamic", **long), plain, rtol=1e-6)
    longer = scaled(128, kind="dynamic", **long) / plain
    assert longer[0] == 1 and np.all(np.diff(longer) < 0)
    factors = dict(short_factor=(1.0,) * 8, long_factor=(2.0,) * 8)
    np.testing.assert_allclose(scaled(64, kind="longrope", **long, **factors), plain)
    np.testing.assert_allclose(scaled(65, kind="longrope", **long, **factors), plain / 2)


def test_scaled_positions_are_scaled_in_attention_too():
    x, positions = jax.random.normal(jax.random.key(0), (1, 5, 2, 8)), jnp.arange(0, 50, 10)[None]
    linear = Rotary(100.0, RopeScaling(kind="linear", factor=10.0))
    np.testing.assert_allclose(linear(x, positions), Rotary(100.0)(x, positions // 10), rtol=1e-5, atol=1e-6)
    yarn = RopeScaling(kind="yarn", factor=4.0, original_max_length=64, attention_factor=1.5)
    np.testing.assert_allclose(Rotary(100.0, yarn)(x, jnp.zeros((1, 5), int)), 1.5 * x, rtol=1e-6)


def test_rotary_mistakes_are_named():
    with pytest.raises(ValueError, match="factor must be positive"):
        RopeScaling(kind="linear", factor=0.0)
    with pytest.raises(ValueError, match="low_freq_factor must be below"):
        RopeScaling(kind="llama3", low_freq_factor=4.0)
    with pytest.raises(ValueError, match="longrope needs short_factor and long_factor"):
        RopeScaling(kind="longrope", short_factor=(1.0,))
    with pytest.raises(ValueError, match="must be even, but got 7"):
        rotary(jnp.ones((1, 2, 1, 7)), jnp.zeros((1, 2)))
    with pytest.raises(ValueError, match="must be positive"):
        Rotary(base=0.0)


@pytest.mark.parametrize("drop", [dropout, stochastic_depth])
def test_without_a_key_or_a_rate_nothing_is_dropped(drop):
    x = jnp.ones((4, 3))
    assert drop(x, 0.5, None) is x and drop(x, 0.0, jax.random.key(0)) is x


def test_dropout_keeps_the_mean_and_repeats_with_its_key():
    x = jnp.ones((100, 100), jnp.bfloat16)
    y = dropout(x, 0.25, jax.random.key(0))
    np.testing.assert_array_equal(y, dropout(x, 0.25, jax.random.key(0)))
    np.testing.assert_array_equal(y, jax.jit(lambda rate: dropout(x, rate, jax.random.key(0)))(0.25))  # traced
    assert y.dtype == x.dtype and abs(float(jnp.mean(y == 0)) - 0.25) < 0.02
    assert abs(float(jnp.mean(y.astype(jnp.float32))) - 1) < 0.02


def test_stochastic_depth_drops_whole_samples_with_a_traced_rate_too():
    y = jax.jit(lambda rate: stochastic_depth(jnp.ones((200, 3, 2)), rate, jax.random.key(0)))(jnp.float32(0.5))
    assert set(np.unique(y)) == {0.0, 2.0}
    assert all(len(np.unique(sample)) == 1 for sample in np.asarray(y))


@pytest.mark.parametrize("rate", [-0.1, 1.0, 1])
def test_impossible_rates_are_named(rate):
    with pytest.raises(ValueError, match="below 1, but got"):
        dropout(jnp.ones(3), rate, jax.random.key(0))
