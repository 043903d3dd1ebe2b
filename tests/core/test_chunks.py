"""A function that treats each token alone gives the same in chunks, in the memory of one chunk."""

import jax
import jax.numpy as jnp
import pytest

from revjax import core
from revjax.core import Run, by_tokens, reversible_scan

from .problems import make_problem, objective

B, T, D, F, L = 2, 24, 16, 512, 4


def mlp(w, x, side=None):
    h = jnp.tanh(x @ w["up"])
    h = h if side is None else jnp.where(jax.random.bernoulli(side, 0.8, h.shape), h, 0)
    return h @ w["down"]


def weights(num_layers=L):
    up, down = jax.random.normal(jax.random.key(0), (2, num_layers, D, F)) / F**0.5
    return {"up": up, "down": jnp.swapaxes(down, 1, 2)}


X = jax.random.normal(jax.random.key(1), (B, T, D))


def gradient(f, plan="nothing", side=None, coupling=None, **options):
    def loss(w, x, canary):
        return objective(reversible_scan(Run(f, w, side), x, plan=plan, canary=canary, coupling=coupling, **options))

    return jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(weights(), X, jnp.zeros((L, 3)))


def relative(a, b):
    flat = lambda t: jnp.concatenate([jnp.ravel(x) for x in jax.tree.leaves(t)])
    return float(jnp.linalg.norm(flat(a) - flat(b)) / jnp.linalg.norm(flat(b)))


def test_chunks_give_the_same_gradient():
    _, (*whole, _) = gradient(mlp, exact=False)
    _, (*chunks, _) = gradient(by_tokens(mlp, 7), exact=False)  # 24 tokens: four chunks of 6
    assert relative(chunks, whole) <= 1e-5


@pytest.mark.optimized
@pytest.mark.parametrize("plan", ["inputs:2", "all"])
def test_chunks_are_exact_and_equal_the_stored_run_with_a_mask_for_each_chunk(plan):
    keys = jax.random.split(jax.random.key(2), L)
    f = by_tokens(mlp, 8, side_of_chunk=jax.random.fold_in)
    value, (*grads, canary) = gradient(f, side=keys, coupling=core.NearResidual(1))
    stored_value, (*stored, _) = gradient(f, plan, side=keys, coupling=core.NearResidual(1))
    assert not canary[:, 0].any() and value == stored_value
    assert relative(grads, stored) <= 1e-6


def test_tokens_that_fill_no_whole_number_of_chunks():
    _, (*whole, _) = gradient(mlp, exact=False)
    for plan in ("nothing", "all"):
        _, (*chunks, _) = gradient(by_tokens(mlp, 5), plan, exact=False)  # 24 tokens: five chunks of 5
        assert relative(chunks, whole) <= 1e-5
    assert not gradient(by_tokens(mlp, 5))[1][2][:, 0].any()


def test_context_and_closures_get_their_gradients_through_chunks():
    c = jnp.linspace(0.5, 1.5, D)[None, None]

    def loss(c, wrap):
        f = lambda w, x, context: mlp(w, x * c) * context
        run = Run(wrap(f), weights())
        return objective(reversible_scan(run, X, context=c, exact=False))

    ours = jax.jit(jax.grad(lambda c: loss(c, lambda f: by_tokens(f, 6))))(c)
    assert relative(ours, jax.jit(jax.grad(lambda c: loss(c, lambda f: f)))(c)) <= 1e-5


def test_memory_is_that_of_one_chunk():
    def temp_bytes(f):
        loss = lambda w, x: objective(reversible_scan(Run(f, w), x))
        x = jax.ShapeDtypeStruct((B, 1024, D), jnp.float32)
        return jax.jit(jax.grad(loss)).lower(weights(), x).compile().memory_analysis().temp_size_in_bytes

    hidden = B * 1024 * F * 4  # of all tokens, fp32; a gradient needs two of them
    assert temp_bytes(mlp) - temp_bytes(by_tokens(mlp, 64)) > 1.5 * hidden


def test_what_chunks_cannot_do_is_refused():
    with pytest.raises(ValueError, match="chunk_tokens must be at least 1"):
        by_tokens(mlp, 0)
    with pytest.raises(ValueError, match="without extras"):
        gradient(by_tokens(lambda w, x: (mlp(w, x), {"aux": x.mean()}), 8))
    with pytest.raises(ValueError, match="cuts x"):
        params, _, _ = make_problem(2)
        reversible_scan(Run(by_tokens(lambda w, x: x @ w, 8), params[0]), jnp.ones((2, 32)))

    class Square(core.AbstractCoupling):
        def forward(self, x_prev, x, fx, n):
            return x_prev + fx**2

        def inverse(self, x, x_next, fx, n):
            return x_next - fx**2

    with pytest.raises(ValueError, match="linear in f, but Square is not"):
        gradient(by_tokens(mlp, 8), coupling=Square(), exact=False)
