"""The streams are rebuilt to the bit, by every coupling, however the caller compiles; and it is told when not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from revjax import core
from revjax.core import Run, reversible_scan

from .problems import COUPLINGS, B, D, T, make_problem, make_run, mix, num_wrong, objective

pytestmark = pytest.mark.optimized

L = 12


def canary_grad(coupling, plan="nothing", compile=jax.jit, num_layers=L, scale=1.5, wrap=lambda f: f):
    params, x, side = make_problem(num_layers, scale)

    def loss(canary, params, x):
        run = make_run(params, side)
        return objective(reversible_scan(run, x, coupling=coupling, plan=plan, canary=canary))

    return compile(jax.grad(wrap(loss)))(jnp.zeros((2 * num_layers, 3)), params, x)


@pytest.mark.parametrize("name", COUPLINGS)
def test_every_coupling_is_rebuilt_to_the_bit(name):
    g = canary_grad(COUPLINGS[name])
    assert num_wrong(g) == 0
    assert g[:, 1].sum() == 0
    assert g[:, 2].max() > 1


@pytest.mark.parametrize("plan", ["inputs:1", "inputs:5", "all"])
def test_every_plan_is_exact(plan):
    assert num_wrong(canary_grad(core.NearResidual(1), plan)) == 0


@pytest.mark.parametrize(
    "compile, wrap",
    [
        (lambda f: f, lambda f: f),
        (jax.jit, jax.checkpoint),
        (jax.jit, jax.jit),
        (lambda f: jax.jit(f, compiler_options={"xla_allow_excess_precision": False}), lambda f: f),
    ],
    ids=["eager", "checkpoint", "nested jit", "no excess precision"],
)
def test_exactness_holds_however_the_caller_compiles(compile, wrap):
    assert num_wrong(canary_grad(core.RevNet(), compile=compile, wrap=wrap)) == 0


@pytest.mark.slow
def test_float_streams_are_not_exact():
    """The twin of the tests above: the same stack on float streams comes back wrong."""
    params, x, side = make_problem(96)
    run = make_run(params, side)
    forward = jax.jit(lambda x: reversible_scan(run, x, exact=False).streams)
    rebuilt, _ = invert_by_hand(run, forward(x))
    assert jnp.abs(rebuilt - x).max() > 1e-4


def invert_by_hand(run, streams):
    @jax.jit
    def layer(i, x_prev, x):
        for f, p, s in reversed(list(zip(run.fns, run.params_L, run.side_L, strict=True))):
            x_prev, x = x - f(p[i], x_prev, s[i]), x_prev
        return x_prev, x

    for i in reversed(range(run.length)):
        streams = layer(i, *streams)
    return streams


def fickle(layer_to_break):
    """In one layer, the second evaluation differs from the first."""
    calls = []

    def once(layer):
        if layer == layer_to_break:
            calls.append(1)
        return np.float32(layer == layer_to_break and len(calls) > 1)

    def f(w, x, side):
        return jnp.tanh(x @ w) + 1e-3 * jax.pure_callback(once, jax.ShapeDtypeStruct((), jnp.float32), side)

    return f


def test_the_canary_names_the_layer_that_was_not_the_same_twice():
    params, x, _ = make_problem(8)
    run = Run(fickle(5), params[0], jnp.arange(8))
    loss = lambda c: jnp.sum(reversible_scan(run, x, canary=c).last)
    wrong = jax.jit(jax.grad(loss))(jnp.zeros((8, 3)))[:, 0]
    assert wrong[5] == B and not wrong[6:].any()


def test_recomputation_has_a_canary_too():
    params, x, _ = make_problem(8)
    run = Run(fickle(5), params[0], jnp.arange(8))
    loss = lambda c: jnp.sum(reversible_scan(run, x, canary=c, plan="inputs:4").last)
    wrong = jax.jit(jax.grad(loss))(jnp.zeros((8, 3)))[:, 0]
    assert wrong[5] == B and not wrong[:5].any()


@pytest.mark.parametrize("poison", [jnp.nan, jnp.inf, 40_000.0])
def test_nan_and_overflow_are_counted_in_their_layer_and_come_out_as_nan(poison):
    params, x, _ = make_problem(8)
    side = jnp.where(jnp.arange(8) == 3, poison, 0.0)
    f = lambda w, x, side: jnp.tanh(x @ w).at[0, :, 0].set(side)
    result = jax.jit(lambda w, x: reversible_scan(Run(f, w, side), x))(params[0], x)
    assert result.unsafe[3] == T and not result.unsafe[:3].any()
    assert jnp.isnan(result.last[0]).all() and jnp.isfinite(result.last[1:]).all()


def test_a_gap_that_overflows_is_unsafe_though_the_next_stream_fits():
    x_prev, x = 20_000.0 * jnp.ones((B, T, D)), -20_000.0 * jnp.ones((B, T, D))
    run = Run(lambda w, x: jnp.zeros_like(x), jnp.zeros((1, 1)))
    assert reversible_scan(run, (x_prev, x), coupling=core.NearResidual(1)).unsafe[0] == B * T * D
    assert reversible_scan(run, (x_prev, x), coupling=core.RevNet()).unsafe[0] == 0


def test_an_input_that_does_not_fit_is_unsafe():
    params, _, side = make_problem(1)
    result = reversible_scan(make_run(params, side), 40_000.0 * jnp.ones((B, T, D)))
    assert result.unsafe[0] > 0 and jnp.isnan(result.last).all()


def test_canary_works_under_vmap_of_grad():
    params, x, side = make_problem(L)
    loss = lambda c, x: objective(reversible_scan(make_run(params, side), x, canary=c))
    g = jax.jit(jax.vmap(jax.grad(loss), (None, 0)))(jnp.zeros((2 * L, 3)), x)
    assert g.shape == (B, 2 * L, 3) and not g[..., 0].any()


@pytest.mark.parametrize("coupling", [core.RevNet(), core.NearResidual(1)], ids=["revnet", "near-residual-1"])
def test_shards_with_different_dropout_masks_are_exact(coupling, four_devices):
    """Under shard_map: the canary is silent, and gradients are the sum over the shards."""
    params, _, _ = make_problem(4)
    x = jax.random.normal(jax.random.key(5), (4, T, D))
    keys_of = lambda shard: jax.random.split(jax.random.fold_in(jax.random.key(9), shard), (2, 4))

    def shard_loss(params, canary, x):
        keys = keys_of(jax.lax.axis_index("data"))
        result = reversible_scan(make_run(params, tuple(keys)), x, coupling=coupling, canary=canary)
        return jax.lax.psum(jnp.sum(result.mean**2), "data")

    def one_by_one(params):
        results = [
            reversible_scan(make_run(params, tuple(keys_of(i))), x[i : i + 1], coupling=coupling) for i in range(4)
        ]
        return sum(jnp.sum(r.mean**2) for r in results)

    with jax.set_mesh(four_devices):
        sharded = jax.shard_map(shard_loss, in_specs=(P(), P(), P("data")), out_specs=P())
        grads, canary = jax.jit(jax.grad(sharded, (0, 1)))(params, jnp.zeros((8, 3)), x)
    expected = jax.jit(jax.grad(one_by_one))(params)
    assert not canary[:, 0].any()
    for g, e in zip(grads, expected, strict=True):
        np.testing.assert_allclose(g, e, rtol=0, atol=2e-2 * float(jnp.abs(e).max()))  # bf16 backward passes
    masks = [mix(params[0][0], x[:1], keys_of(i)[0, 0]) == 0 for i in range(4)]
    assert any((masks[0] != m).any() for m in masks[1:])


def test_float_streams_work_without_a_canary():
    params, x, side = make_problem(4)
    loss = lambda c: objective(reversible_scan(make_run(params, side), x, canary=c, exact=False))
    assert not jax.jit(jax.grad(loss))(jnp.zeros((8, 3)))[:, 0].any()
