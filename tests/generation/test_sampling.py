"""Tokens are drawn from exactly the distribution that temperature, penalty and filters leave."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from revjax.generation import Sampling, sample
from revjax.generation.sampling import keep_min_p, keep_top_k, keep_top_p, penalize

LOGITS = jnp.log(jnp.array([[0.5, 0.05, 0.3, 0.15], [0.1, 0.2, 0.3, 0.4]]))


def frequencies(draws=4000, **options):
    keys = jax.random.split(jax.random.key(0), draws)
    tokens = jax.vmap(lambda key: sample(LOGITS, key, Sampling(**options)))(keys)
    return np.stack([np.bincount(np.asarray(row), minlength=4) / draws for row in tokens.T])


def test_temperature_zero_takes_the_largest():
    assert sample(LOGITS, jax.random.key(0), Sampling(temperature=0)).tolist() == [0, 3]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_are_those_of_the_softmax(temperature):
    expected = jax.nn.softmax(LOGITS / temperature)
    np.testing.assert_allclose(frequencies(temperature=temperature), expected, atol=0.03)  # 4 standard errors


def test_top_k_keeps_k():
    assert np.isfinite(keep_top_k(LOGITS, 2)).tolist() == [[True, False, True, False], [False, False, True, True]]
    np.testing.assert_allclose(frequencies(top_k=2)[0], [0.625, 0, 0.375, 0], atol=0.03)
    assert np.isfinite(keep_top_k(LOGITS, 99)).all()


@pytest.mark.parametrize("p, kept", [(0.4, 1), (0.6, 2), (0.79, 2), (0.81, 3), (1.0, 4), (1e-6, 1)])
def test_top_p_keeps_the_fewest_that_sum_to_p(p, kept):
    finite = np.isfinite(keep_top_p(LOGITS, p))[0]
    assert finite.tolist() == [order < kept for order in (0, 3, 1, 2)]


@pytest.mark.parametrize("m, kept", [(0.0, 4), (0.2, 3), (0.31, 2), (0.7, 1), (1.0, 1)])
def test_min_p_keeps_what_is_not_much_less_likely_than_the_likeliest(m, kept):
    finite = np.isfinite(keep_min_p(LOGITS, m))[0]
    assert finite.tolist() == [order < kept for order in (0, 3, 1, 2)]


def test_a_repetition_penalty_lowers_logits_of_either_sign():
    logits, seen = jnp.array([[2.0, -2.0, 1.0]]), jnp.array([[True, True, False]])
    assert penalize(logits, seen, 2.0).tolist() == [[1.0, -4.0, 1.0]]
    drawn = sample(logits, jax.random.key(0), Sampling(temperature=0, repetition_penalty=3.0), seen_BV=seen)
    assert drawn.tolist() == [2]


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -1.0},
        {"top_k": 0},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": 1.5},
        {"repetition_penalty": 0.0},
    ],
)
def test_impossible_options_are_refused_by_name(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        Sampling(**options)
