"""What is not supported says so, and what to do."""

import jax
import jax.numpy as jnp
import pytest

from revjax import core
from revjax.core import Run, reversible_scan
from revjax.core.plan import parse

X = jnp.ones((2, 4, 16))
W = jnp.zeros((3, 16, 16))


def f(w, x):
    return jnp.tanh(x @ w)


def total(w=W, x=X, run=None, **options):
    return reversible_scan(run or Run(f, w), x, **options).mean.sum()


def test_a_differentiated_side_input_is_an_error():
    run = lambda s: Run(lambda w, x, side: side * f(w, x), W, s)
    with pytest.raises(TypeError, match=r"side input side_L\.0\.0 is being differentiated.*context="):
        jax.jit(jax.grad(lambda s: total(run=run(s))))(jnp.ones(3))
    assert jax.jit(lambda s: total(run=run(s)))(jnp.ones(3)).shape == ()  # not differentiated: fine
    assert jax.grad(lambda s: total(run=run(jax.lax.stop_gradient(s))))(jnp.ones(3)).sum() == 0


def test_a_differentiated_shared_input_is_an_error_unless_only_others_are():
    run = Run(lambda w, x, shared: shared * f(w, x), W)
    with pytest.raises(TypeError, match="side input shared is"):
        jax.grad(lambda s: total(run=run, shared=s))(1.0)
    g = lambda w, s: total(run=Run(run.fns[0], w), shared=s)
    for wrap in (jax.jit, jax.checkpoint, lambda f: f):
        assert jax.grad(wrap(g))(W, jnp.ones(())).shape == W.shape


def test_a_differentiated_number_of_the_coupling_is_an_error():
    with pytest.raises(TypeError, match="one of f's parameters"):
        jax.grad(lambda h: total(coupling=core.LinearCoupling(h=h)))(jnp.ones(()))


def test_forward_mode_is_an_error():
    with pytest.raises(TypeError, match="reverse mode"):
        jax.jvp(total, (W,), (W,))


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_second_derivatives_are_an_error_not_a_wrong_number(wrap):
    with pytest.raises(TypeError, match="differentiated once"):
        jax.grad(wrap(lambda w: jnp.sum(jax.grad(wrap(total))(w) ** 2)))(W)


@pytest.mark.parametrize("options", [{}, {"plan": "inputs:2"}, {"plan": "all"}, {"exact": False}], ids=str)
@pytest.mark.parametrize("of", [0, 1], ids=["w", "x"])
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_second_derivatives_in_x_are_an_error_too(wrap, of, options):
    """Streams are integers between the passes, through which no derivative would come: it would be 0."""
    first = wrap(jax.grad(lambda w, x: jnp.sum(reversible_scan(Run(f, w), x, **options).mean ** 2), of))
    with pytest.raises(TypeError, match="differentiated once"):
        jax.grad(wrap(lambda x: jnp.sum(first(W, x) ** 2)))(X)


def test_streams_that_differ_are_an_error():
    with pytest.raises(ValueError, match="same shape and dtype.*One array"):
        total(x=(X, X[:1]))
    with pytest.raises(ValueError, match="same shape and dtype"):
        total(x=(X, X.astype(jnp.bfloat16)))


@pytest.mark.parametrize("x", [jnp.ones((2, 4, 16), jnp.int32), jnp.ones(16)])
def test_an_input_that_is_not_a_batch_of_floats_is_an_error(x):
    with pytest.raises(TypeError, match="array of floats"):
        total(x=x)


@pytest.mark.parametrize("shift, width", [(1, 12), (2, 6), (4, 3)])
def test_a_width_that_does_not_fill_whole_bytes_is_an_error(shift, width):
    run = Run(lambda w, x: w * x, jnp.zeros((3, 1, 1, 1)))
    with pytest.raises(ValueError, match=f"multiple of {8 // shift}"):
        total(x=jnp.ones((2, 4, width)), run=run, coupling=core.NearResidual(shift))


def test_a_function_that_changes_the_shape_is_an_error():
    with pytest.raises(ValueError, match="returns an increment of the shape of x"):
        total(run=Run(lambda w, x: x[..., :2], W))
    with pytest.raises(ValueError, match="in floats, but <lambda> took float32.* and returned int32"):
        total(run=Run(lambda w, x: x.astype(jnp.int32), W))
    with pytest.raises(ValueError, match="in floats, but <lambda> took float32.* and returned complex64"):
        total(run=Run(lambda w, x: jnp.fft.fft(x), W))


@pytest.mark.parametrize(
    "f, came",
    [
        (lambda w, x: None, "None .is a `return` missing"),
        (lambda w, x: (x, x[0]), "returned .float32.*, float32"),
        (lambda w, x: {"fx": x}, "returned .fx: float32"),
    ],
    ids=["nothing", "two", "dict"],
)
def test_a_function_that_returns_no_array_is_an_error(f, came):
    with pytest.raises(TypeError, match=came):
        total(run=Run(f, W))


def test_unknown_extras_are_an_error():
    with pytest.raises(ValueError, match="'aux', 'tape', 'cache'; got .'loss'."):
        total(run=Run(lambda w, x: (x, {"loss": 1.0}), W))


def test_a_coupling_without_inverse_needs_a_plan():
    with pytest.raises(ValueError, match="plan='inputs'"):
        total(coupling=core.Residual())


def test_a_name_that_no_value_has_is_an_error():
    with pytest.raises(ValueError, match="no function of this run names anything so"):
        total(plan="attention")
    named = jax.ad_checkpoint.checkpoint_name
    one = lambda w, x, tape=None: (named(x, "n") @ w if tape is None else x @ w, {"tape": jnp.int32(0)})
    with pytest.raises(ValueError, match="must name the same values with and without `tape=`"):
        total(run=Run(one, W), plan=core.Reverse(("n",)))
    constant = lambda w, x: named(x @ w, "n") * named(2.0, "n")
    assert jnp.isfinite(total(run=Run(constant, W), plan=core.Reverse(("n",))))
    with pytest.raises(TypeError, match="names must be a tuple of strings, but got 'attention'"):
        core.Reverse("attention")


class Euler(core.AbstractCoupling):
    """A user's own, as short as it can be: nothing in it can be undone."""

    def forward(self, x_prev, x, fx, n):
        return x + fx


class RoundedEuler(Euler):
    def forward_exact(self, grid, q_prev, q, fx, n):
        return q + grid.encode(fx), None


@pytest.mark.parametrize(
    "coupling, exact, error, message",
    [
        (Euler(), False, NotImplementedError, "Euler has no inverse: use plan 'inputs' or 'all'"),
        (Euler(), True, TypeError, "Euler has no exact arithmetic: pass exact=False"),
        (RoundedEuler(), True, NotImplementedError, "RoundedEuler has no exact inverse: use plan 'inputs' or 'all'"),
    ],
)
def test_a_coupling_of_ones_own_that_cannot_be_undone_says_what_to_do(coupling, exact, error, message):
    with pytest.raises(error, match=message):
        jax.grad(lambda w: total(w, coupling=coupling, exact=exact))(W)
    if error is NotImplementedError:  # what the message says does help
        for plan in ("inputs:1", "all"):
            of_plan = lambda w, plan=plan: total(w, coupling=coupling, exact=exact, plan=plan)
            assert jax.grad(of_plan)(W).shape == W.shape


def test_caches_run_forward_only():
    run = lambda w: Run(lambda w, x, cache: (f(w, x), {"cache": cache + 1}), w, None, jnp.zeros(3))
    for plan in ("nothing", "1 all, nothing", "inputs:2"):
        assert reversible_scan(run(W), X, plan=plan).cache[0][0].tolist() == [1.0, 1.0, 1.0]
    with pytest.raises(TypeError, match="forward only"):
        jax.grad(lambda w: total(run=run(w)))(W)


def test_parameters_of_different_lengths_are_an_error():
    with pytest.raises(ValueError, match="same leading axis.*'2', '3'"):
        Run((f, f), (W, W[:2]))
    with pytest.raises(ValueError, match="no array .pass length=."):
        Run(f, None)
    with pytest.raises(ValueError, match="one entry for each of the 2 functions"):
        Run((f, f), W)
    with pytest.raises(TypeError, match="runs must be a Run"):
        reversible_scan((f, W), X)


def test_a_canary_of_the_wrong_shape_is_an_error():
    with pytest.raises(ValueError, match="shape .3, 3."):
        total(canary=jnp.zeros(3))


@pytest.mark.parametrize(
    "text",
    [
        "nothin",
        "inputs:0",
        "inputs:x",
        "host:0",
        "hosts",
        "all:2",
        "inputs:-1",
        "all, nothing",
        "0 all, nothing",
        "two all, all",
    ],
)
def test_an_unknown_plan_is_an_error(text):
    with pytest.raises(ValueError, match="A plan is|at least 1|A part of a plan is"):
        parse(text)
    with pytest.raises(ValueError, match="2 entries for 1 runs"):
        total(plan=("nothing", "all"))


@pytest.mark.parametrize("text, said", [("2 nothing, 2 all", 4), ("2 all", 2), ("4 all, nothing", 4)])
def test_parts_that_do_not_add_up_are_an_error(text, said):
    with pytest.raises(ValueError, match=f"is for {said} layers, but there are 3"):
        total(plan=text)


def test_a_plan_of_parts_is_read_as_it_is_written():
    for text in ("nothing, 8 all", "40 nothing, inputs:4, 8 attention", "3 inputs, 1 all", "host, 2 host:2"):
        assert str(parse(text)) == text
    assert parse("nothing, 8 all").of(8) == ((8, core.All()),)


@pytest.mark.parametrize(
    "make", [lambda: core.LinearCoupling(shift=3), lambda: core.LinearCoupling(sign=2), lambda: core.Momentum(1.5)]
)
def test_impossible_couplings_are_errors(make):
    with pytest.raises(ValueError, match="must"):
        make()


@pytest.mark.parametrize("text", ["revnett", "residual:2", "near-residual:3"])
def test_a_coupling_that_cannot_be_read_is_an_error(text):
    with pytest.raises(ValueError, match="coupling|shift must be"):
        core.parse_coupling(text)
    assert core.parse_coupling("near-residual:4") == core.NearResidual(4)


def test_a_coupling_of_ones_own_is_named_by_its_module():
    assert isinstance(core.parse_coupling(f"{__name__}:euler"), Euler)
    with pytest.raises(ValueError, match=f"{__name__}:number must return a coupling, but it returned a float"):
        core.parse_coupling(f"{__name__}:number")
    with pytest.raises(ValueError, match="no function 'eulr'. Did you mean 'euler'"):
        core.parse_coupling(f"{__name__}:eulr")


def euler():
    return Euler()


def number():
    return 0.5
