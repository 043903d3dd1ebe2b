"""Gradients are those of the stored run of the same rounded network; every input that has one gets it."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name

from revjax import core
from revjax.core import Run, reversible_scan

from .problems import COUPLINGS, D, T, make_problem, make_run, objective

pytestmark = pytest.mark.optimized

L = 12
NAMED = core.Reverse(("increment",))


def f32_mix(w, x):
    return jnp.tanh(x @ w)


def named(f):
    return lambda *args, **kwargs: checkpoint_name(f(*args, **kwargs), "increment")


def f32_swish(w, x):
    return 0.5 * jax.nn.silu(x @ w)


def rounded(x, grid=2.0**-16, up=False):
    """To the grid, straight through: what the streams hold. A shift rounds ties up, jnp.round to even."""
    n = jnp.floor(x / grid + 0.5) if up else jnp.round(x / grid)
    return x + jax.lax.stop_gradient(n * grid - x)


def oracle(params, x, b, h):
    """The same rounded network in plain jax, differentiated by jax."""
    x_prev = x = rounded(x)
    for i in range(params[0].shape[0]):
        for f, p in zip((f32_mix, f32_swish), params, strict=True):
            x_prev, x = x, x + np.sign(b) * rounded(abs(b) * (x_prev - x), up=True) + rounded(h * f(p[i], x))
    return jnp.mean(x**2) + jnp.mean(jnp.sin(x_prev))


def relative(a, b):
    flat = lambda t: jnp.concatenate([jnp.ravel(x) for x in jax.tree.leaves(t)])
    return float(jnp.linalg.norm(flat(a) - flat(b)) / jnp.linalg.norm(flat(b)))


@pytest.mark.parametrize(
    "coupling, b, h",
    [(core.RevNet(), 1, 1), (core.Midpoint(0.5), 1, 1), (core.Leapfrog(0.3), -1, 0.09), (core.NearResidual(1), 0.5, 1)]
    + [(core.Momentum(0.25), -0.25, 0.75)],
    ids=["revnet", "midpoint", "leapfrog", "near-residual-1", "momentum"],
)
def test_gradients_equal_those_of_plain_jax(coupling, b, h):
    params, x, _ = make_problem(L, scale=0.5)
    loss = lambda p, x: objective(reversible_scan(Run((f32_mix, f32_swish), p), x, coupling=coupling))
    value, ours = jax.jit(jax.value_and_grad(loss, (0, 1)))(params, x)
    expected, theirs = jax.jit(jax.value_and_grad(lambda p, x: oracle(p, x, b, h), (0, 1)))(params, x)
    assert abs(value - expected) <= 1e-5 * abs(expected)
    assert relative(ours, theirs) <= 1e-5


MIXED = "3 all, inputs:2, 1 nothing, 2 all"
RARE = ("momentum", "bdia", "h per f")


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "name", ["revnet", "near-residual-1", *(pytest.param(name, marks=pytest.mark.slow) for name in RARE)]
)
def test_every_plan_gives_the_same_loss_and_the_same_gradients_to_the_bit(name, dtype):
    """Rebuilt, recomputed or stored: in fp32, and in bf16 with dropout."""
    params, x, side = make_problem(L)

    def of(params):
        run = Run((f32_mix, f32_swish), params) if dtype == "fp32" else make_run(params, side)
        return dataclasses.replace(run, fns=tuple(map(named, run.fns)))

    def run(plan):
        loss = lambda p, x: objective(reversible_scan(of(p), x, coupling=COUPLINGS[name], plan=plan))
        return jax.jit(jax.value_and_grad(loss, (0, 1)))(params, x)

    expected = run("all")
    for other in map(run, ("nothing", MIXED) if name in RARE else ("nothing", "inputs:5", NAMED, MIXED)):
        for a, b in zip(jax.tree.leaves(other), jax.tree.leaves(expected), strict=True):
            np.testing.assert_array_equal(a, b)


def test_residual_is_the_ordinary_network():
    params, x, _ = make_problem(4, scale=0.5)

    def plain(p, x):
        for i in range(4):
            x = x + f32_mix(p[0][i], x)
            x = x + f32_swish(p[1][i], x)
        return jnp.mean(x**2)

    for plan in ("inputs", "inputs:2", "all"):
        run = lambda p, x, plan=plan: reversible_scan(
            Run((f32_mix, f32_swish), p), x, coupling=core.Residual(), plan=plan, exact=False
        )
        ours = jax.jit(jax.grad(lambda p, x, run=run: jnp.mean(run(p, x).last ** 2), (0, 1)))(params, x)
        assert relative(ours, jax.jit(jax.grad(plain, (0, 1)))(params, x)) <= 1e-6


@pytest.mark.parametrize(
    "coupling", [core.RevNet(), core.NearResidual(1), core.Momentum(0.3)], ids=["1", "1/2", "-0.3"]
)
def test_finite_differences_in_float64(coupling):
    with jax.enable_x64(True):
        params, x, _ = make_problem(3, scale=0.5)
        to64 = lambda t: jax.tree.map(lambda a: a.astype(jnp.float64), t)
        params, x = to64(params), to64(x)
        direction = jax.tree.map(lambda a: jnp.sin(jnp.arange(a.size, dtype=jnp.float64)).reshape(a.shape), params)
        run = lambda p: reversible_scan(Run((f32_mix, f32_swish), p), x, coupling=coupling, exact=False)
        loss = jax.jit(lambda p: objective(run(p)))
        moved = lambda e: loss(jax.tree.map(lambda a, d: a + e * d, params, direction))
        numeric = (moved(1e-5) - moved(-1e-5)) / 2e-5
        grads = jax.jit(jax.grad(loss))(params)
        exact = sum(jnp.vdot(g, d) for g, d in zip(grads, direction, strict=True))
        assert abs(numeric - exact) <= 1e-6 * abs(exact)


@pytest.mark.parametrize("plan", ["nothing", "inputs:4", "all"])
def test_context_and_closures_get_their_gradients(plan):
    params, x, _ = make_problem(4, scale=0.5)
    context = jax.random.normal(jax.random.key(3), (D, D)) / D**0.5

    def with_context(c, w, x):
        f = lambda w, x, context: jnp.tanh(x @ w @ context)
        return objective(reversible_scan(Run(f, w), x, context=c, plan=plan))

    def with_closure(c, w, x):
        return objective(reversible_scan(Run(lambda w, x: jnp.tanh(x @ w @ c), w), x, plan=plan))

    def plain(c, w, x):
        x_prev = x = rounded(x)
        for i in range(4):
            x_prev, x = x, x_prev + rounded(jnp.tanh(x @ w[i] @ c))
        return jnp.mean(x**2) + jnp.mean(jnp.sin(x_prev))

    expected = jax.jit(jax.grad(plain, (0, 1, 2)))(context, params[0], x)
    for loss in (with_context, with_closure):
        assert relative(jax.jit(jax.grad(loss, (0, 1, 2)))(context, params[0], x), expected) <= 1e-6


def test_a_python_number_that_f_closes_over_gets_its_gradient():
    """Without jit, jax hands it on as a Python float."""
    params, x, _ = make_problem(4, scale=0.5)
    loss = lambda c: objective(reversible_scan(Run(lambda w, x: c * jnp.tanh(x @ w), params[0]), x))
    assert jax.grad(loss)(2.0) == jax.grad(loss)(jnp.float32(2.0)) != 0


@pytest.mark.parametrize("plan", ["nothing", "inputs:3", "all"])
def test_auxiliary_outputs_get_their_gradients(plan):
    """With 4 layers, inputs:3 leaves a remainder: its auxiliary outputs come back in one piece."""
    params, x, _ = make_problem(4, scale=0.5)

    def loss(w):
        f = lambda w, x: (jnp.tanh(x @ w), {"aux": jnp.mean(x @ w)})
        result = reversible_scan(Run(f, w), x, plan=plan)
        return objective(result) + jnp.sum(result.aux[0][0] * jnp.arange(1.0, 5.0))

    def plain(w):
        x_prev = x_ = rounded(x)
        aux = 0.0
        for i in range(4):
            aux += (i + 1) * jnp.mean(x_ @ w[i])
            x_prev, x_ = x_, x_prev + rounded(jnp.tanh(x_ @ w[i]))
        return jnp.mean(x_**2) + jnp.mean(jnp.sin(x_prev)) + aux

    assert relative(jax.jit(jax.grad(loss))(params[0]), jax.jit(jax.grad(plain))(params[0])) <= 1e-6


@pytest.mark.parametrize("plan", ["nothing", "inputs:2"])
def test_a_decision_on_the_tape_is_not_taken_again(plan):
    """A router that would decide otherwise the second time: the tape keeps its first decision."""
    params, x, _ = make_problem(4, scale=0.5)
    draws = iter(range(10**6))
    draw = lambda _: np.int32(next(draws) % D)

    def f(w, x, side, tape=None):
        if tape is None:
            tape = jax.pure_callback(draw, jax.ShapeDtypeStruct((), jnp.int32), side)
        return jnp.tanh(x @ w) * jax.nn.one_hot(tape, D)[None, None], {"tape": tape}

    def loss(w, canary):
        result = reversible_scan(Run(f, w, jnp.arange(4)), x, plan=plan, canary=canary)
        return objective(result)

    assert not jax.jit(jax.grad(loss, 1))(params[0], jnp.zeros((4, 3)))[:, 0].any()


@pytest.mark.parametrize("plan, is_kept", [(core.Reverse(("draw",)), True), ("nothing", False)])
def test_what_is_kept_by_name_is_not_computed_again(plan, is_kept):
    """Noise that would be other noise the second time, inside a function of its own."""
    params, x, _ = make_problem(4, scale=0.5)
    draws = iter(range(1, 10**6))
    noise = lambda _: np.full((), next(draws) / 100, np.float32)

    @jax.jit
    def noisy(x, side):
        y = x + jax.pure_callback(noise, jax.ShapeDtypeStruct((), jnp.float32), side)
        return checkpoint_name(y, "draw")

    f = lambda w, x, side: jnp.tanh(noisy(x, side) @ w)
    loss = lambda w, canary: objective(reversible_scan(Run(f, w, jnp.arange(4)), x, plan=plan, canary=canary))
    wrong = jax.jit(jax.grad(loss, 1))(params[0], jnp.zeros((4, 3)))[:, 0]
    assert wrong.any() != is_kept


@pytest.mark.parametrize(
    "plans",
    [
        ("nothing", "all"),
        ("all", "nothing"),
        ("inputs:2", "nothing"),
        ("nothing", "inputs"),
        (NAMED, "all"),
        ("1 nothing, 3 all", "1 all, 1 inputs"),
        ("2 all, nothing", "nothing, 1 all"),
        (core.Parts(((1, NAMED), (None, core.Inputs(2)))), "nothing"),
    ],
)
def test_runs_with_plans_of_their_own_share_one_gradient(plans):
    params, x, side = make_problem(4)

    def loss(params, plan, canary):
        run = make_run(params, side)
        runs = [dataclasses.replace(run, fns=(named(run.fns[0]), run.fns[1])), Run(f32_mix, params[0][:2])]
        return objective(reversible_scan(runs, x, plan=plan, canary=canary))

    grad = jax.jit(jax.grad(loss, (0, 2)), static_argnums=1)
    (ours, canary), (expected, _) = grad(params, plans, jnp.zeros((10, 3))), grad(params, "all", jnp.zeros((10, 3)))
    assert relative(ours, expected) <= 1e-6 and not canary[:, 0].any()


def test_sharded_by_the_compiler_with_constrained_streams(four_devices):
    params, _, _ = make_problem(4, scale=0.5)
    x = jax.random.normal(jax.random.key(5), (4, T, D))
    sharding = jax.sharding.NamedSharding(four_devices, jax.sharding.PartitionSpec("data"))
    seen = []

    def constrain(a):
        seen.append(a.dtype)
        return jax.lax.with_sharding_constraint(a, sharding)

    loss = lambda p, x, c: objective(reversible_scan(Run((f32_mix, f32_swish), p), x, constrain=c))
    ours = jax.jit(jax.grad(lambda p, x: loss(p, x, constrain)))(params, jax.device_put(x, sharding))
    # Shards multiply in another order, and a last bit of f can move an element by one step of the grid.
    assert relative(ours, jax.jit(jax.grad(lambda p, x: loss(p, x, None)))(params, x)) <= 1e-5
    assert jnp.int32 in seen and jnp.float32 in seen  # streams, and their cotangents


def test_an_affine_coupling_from_outside_the_package():
    """b depends on x[l]: x[l+1] = s(x[l]) x[l-1] + t(x[l]), in a few lines (RealNVP, arXiv:1605.08803)."""

    class Affine(core.AbstractCoupling):
        def forward(self, x_prev, x, fx, n):
            return jnp.exp(fx["log_s"]) * x_prev + fx["t"]

        def inverse(self, x, x_next, fx, n):
            return (x_next - fx["t"]) * jnp.exp(-fx["log_s"])

    def f(w, x):
        return {"log_s": 0.1 * jnp.tanh(x @ w["s"]), "t": jnp.tanh(x @ w["t"])}

    params, x, _ = make_problem(4, scale=0.5)
    weights = {"s": params[0], "t": params[1]}

    def loss(w, plan):
        return objective(reversible_scan(Run(f, w), x, coupling=Affine(), exact=False, plan=plan))

    grad = jax.jit(jax.grad(loss), static_argnums=1)
    assert relative(grad(weights, "nothing"), grad(weights, "all")) <= 1e-5
    with pytest.raises(TypeError, match="exact=False"):
        loss_exact = lambda w: objective(reversible_scan(Run(f, w), x, coupling=Affine()))
        loss_exact(weights)


@pytest.mark.parametrize("plans", ["nothing", "all", ("inputs:2", "1 nothing, 1 all")])
def test_gradients_are_added_to_sums_where_they_are(plans):
    params, x, _ = make_problem(4)
    runs = lambda p: [Run((f32_mix, f32_swish), jax.tree.map(lambda a, i=i: a[2 * i : 2 * i + 2], p)) for i in (0, 1)]
    sums = [jax.tree.map(lambda a: jax.random.normal(jax.random.key(7), a.shape), run.params_L) for run in runs(params)]
    loss = lambda p, x, sums: objective(reversible_scan(runs(p), x, plan=plans, grad_sums=sums))
    dparams, dx = jax.jit(jax.grad(loss, (0, 1)))(params, x, None)
    zeros, dx_too, added = jax.jit(jax.grad(loss, (0, 1, 2)))(params, x, sums)
    np.testing.assert_array_equal(dx_too, dx)
    assert not any(map(np.any, jax.tree.leaves(zeros)))
    for run, got, before in zip(runs(dparams), added, sums, strict=True):
        for new, d, old in zip(
            jax.tree.leaves(got), jax.tree.leaves(run.params_L), jax.tree.leaves(before), strict=True
        ):
            np.testing.assert_array_equal(new, old + d)


def test_sums_that_are_not_like_the_parameters_are_an_error():
    params, x, _ = make_problem(4)
    run = Run((f32_mix, f32_swish), params)
    for wrong in ([params, params], [params[:1]], [jax.tree.map(lambda a: a[:2], params)]):
        with pytest.raises(ValueError, match="grad_sums must have, for each run, one array for each float"):
            reversible_scan(run, x, grad_sums=wrong)


def shrunk(params, count, grads):
    return jax.tree.map(lambda p, g: p - 0.125 * g, params, grads), count + 1


@pytest.mark.parametrize("plan", ["nothing", "inputs:3", "all", "2 all, 2 inputs:2, 2 nothing"])
def test_parameters_are_updated_in_the_backward_pass_by_the_gradients_that_they_have(plan):
    params, x, side = make_problem(6)
    counts = ((jnp.zeros(6), jnp.zeros(6)),)
    of = lambda params, **how: objective(reversible_scan(make_run(params, side), x, plan=plan, **how))
    loss = lambda params, counts: of(params, update=shrunk, update_state=counts)
    new, counts = jax.jit(jax.grad(loss, (0, 1)))(params, counts)
    expected = jax.tree.map(lambda p, g: p - 0.125 * g, params, jax.jit(jax.grad(of))(params))
    for a, b in zip(jax.tree.leaves((new, counts)), jax.tree.leaves((expected, jax.tree.map(jnp.ones_like, counts)))):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("plan, first, second", [("nothing", [0, 0, 0], [0, 1]), ("inputs:2", [0, 0, 0], [0, 0])])
def test_nothing_is_updated_from_the_first_stream_on_that_was_not_rebuilt(plan, first, second):
    """The last f is the same twice in its last layer only; what stands before it, in another run too, stays."""
    calls = itertools.count()
    noise = lambda layer, x: np.float32(0 if layer == 1 else next(calls)) + np.zeros_like(x)
    good = lambda w, x: jnp.tanh(x @ w)

    def noisy(w, x, side):
        more = jax.pure_callback(noise, jax.typeof(x), side, jax.lax.stop_gradient(x))
        return jnp.tanh(x @ w + more)

    params, x, _ = make_problem(3, scale=0.5)

    def loss(a, b, counts, canary):
        runs = [Run(good, a), Run(noisy, b, jnp.arange(2))]
        return objective(reversible_scan(runs, x, plan=plan, update=shrunk, update_state=counts, canary=canary))

    counts = ((jnp.zeros(3),), (jnp.zeros(2),))
    args = params[0], params[1][:2], counts, jnp.zeros((5, 3))
    found, canary = jax.jit(jax.grad(loss, (2, 3)))(*args)
    assert canary[:, 0].any() and [list(a) for (a,) in found] == [first, second]


def test_states_that_do_not_fit_are_refused():
    params, x, side = make_problem(6)
    for states in [((jnp.zeros(6),),), ((jnp.zeros(6), jnp.zeros(5)),), (), ((jnp.zeros(6), jnp.zeros(6, jnp.int32)),)]:
        with pytest.raises(ValueError, match="update_state must have, for each run, for each of its functions"):
            reversible_scan(make_run(params, side), x, update=shrunk, update_state=states)
    with pytest.raises(ValueError, match="update and update_state go together"):
        reversible_scan(make_run(params, side), x, update=shrunk)
