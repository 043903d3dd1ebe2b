"""The couplings that studies try are what they say, and as exact as those of the core."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from revjax.benchmarking import couplings
from revjax.core import Run, parse_coupling, reconstruction_error, reversible_scan

NUM = 24
L = np.arange(NUM)
B_AND_H = {  # of each f
    "alternating": (np.where(L % 2, -1, 1), np.ones(NUM)),
    "random_signs": (1 - 2 * np.random.default_rng(0).integers(0, 2, NUM), np.ones(NUM)),
    "falling_steps": (np.ones(NUM), 1.5 - L / (NUM - 1)),
    "rising_steps": (np.ones(NUM), 0.5 + L / (NUM - 1)),
    "half_late": (np.where(L < 12, 1, 0.5), np.ones(NUM)),
    "half_early": (np.where(L < 12, 0.5, 1), np.ones(NUM)),
    "half_every_4th": (np.where(L % 4 == 3, 0.5, 1), np.ones(NUM)),
}
X = jax.random.normal(jax.random.key(1), (2, 8, 16))
W_L = jax.random.normal(jax.random.key(0), (NUM, 16, 16)) / 16


def f(w, x):
    return jnp.tanh((x @ w).astype(jnp.bfloat16))


def named(name):
    return parse_coupling(f"{couplings.__name__}:{name}")


@pytest.mark.parametrize("name", B_AND_H)
def test_it_is_the_recurrence_that_it_is_named_for(name):
    x_prev = x = X
    for w, b, h in zip(W_L, *B_AND_H[name], strict=True):
        x_prev, x = x, x + float(b) * (x_prev - x) + float(h) * jnp.tanh(x @ w)
    streams = reversible_scan(Run(lambda w, x: jnp.tanh(x @ w), W_L), X, coupling=named(name), exact=False).streams
    np.testing.assert_allclose(streams, (x_prev, x), rtol=1e-3, atol=1e-4)
    assert name != "random_signs" or set(B_AND_H[name][0]) == {1, -1}


@pytest.mark.parametrize("name", B_AND_H)
def test_its_inverse_gives_back_the_bits_and_its_gradient_is_that_of_the_stored_run(name):
    assert reconstruction_error(Run(f, W_L), X, coupling=named(name)).max() == 0
    loss = lambda w_L, x, plan: jnp.mean(reversible_scan(Run(f, w_L), x, coupling=named(name), plan=plan).mean ** 2)
    grad = lambda plan: jax.jit(jax.grad(lambda w_L, x: loss(w_L, x, plan), (0, 1)))(W_L, X)
    jax.tree.map(np.testing.assert_array_equal, grad("nothing"), grad("all"))
