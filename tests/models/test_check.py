"""`check` passes what is right, and names what is not."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import revjax

D = 16
X = jax.random.normal(jax.random.key(0), (2, 8, D))


class Good(nnx.Module):
    dtype = None

    def __init__(self, rngs):
        self.linear = nnx.Linear(D, D, rngs=rngs)

    def __call__(self, x):
        return jnp.tanh(self.linear(x))


class LowPrecision(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(D, 4 * D, dtype=jnp.bfloat16, rngs=rngs)
        self.down = nnx.Linear(4 * D, D, dtype=jnp.bfloat16, rngs=rngs)

    def __call__(self, x):
        return self.down(jax.nn.silu(self.up(x)))


class AddsItsInput(Good):
    def __call__(self, x):
        return x + jnp.tanh(self.linear(x))


class HoldsRandomness(Good):
    def __init__(self, rngs):
        super().__init__(rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)

    def __call__(self, x):
        return self.dropout(self.linear(x))


class Writes(Good):
    def __init__(self, rngs):
        super().__init__(rngs)
        self.norm = nnx.BatchNorm(D, rngs=rngs)

    def __call__(self, x):
        return self.norm(self.linear(x))


class DrawsFromNumpy(Good):
    def __call__(self, x):
        return jnp.tanh(self.linear(x)) * np.random.rand()


def count(_, calls=[0]):  # noqa: B006
    calls[0] += 1
    return np.float32(calls[0])


class Counts(Good):
    def __call__(self, x):
        counted = jax.pure_callback(count, jax.ShapeDtypeStruct((), jnp.float32), jax.lax.stop_gradient(x)[0, 0, 0])
        return jnp.tanh(self.linear(x)) + 1e-3 * counted


@jax.custom_vjp
def wrong_derivative(x):
    return jnp.sin(x)


wrong_derivative.defvjp(lambda x: (jnp.sin(x), x), lambda x, dy: (1.01 * dy * jnp.cos(x),))


class Sows(Good):
    def __call__(self, x):
        y = self.linear(x)
        self.sow(nnx.Intermediate, "hidden", y)
        return jnp.tanh(y)


class WrongDerivative(Good):
    def __call__(self, x):
        return wrong_derivative(self.linear(x))


class WrongWhereZero(Good):
    """A modulation that begins at 0, in float32, whose derivative has the wrong sign. Key and context are required."""

    def __init__(self, rngs):
        super().__init__(rngs)
        self.modulation = nnx.Linear(X.shape[-1], X.shape[-1], kernel_init=nnx.initializers.zeros, rngs=rngs)

    def __call__(self, x, *, key, context):
        modulation = reversed_derivative(self.modulation(context))[:, None].astype(jnp.float32)
        return revjax.nn.dropout(jnp.tanh(self.linear(x)) * (1 + modulation), 0.1, key)


@jax.custom_vjp
def reversed_derivative(x):
    return x


reversed_derivative.defvjp(lambda x: (x, None), lambda _, dy: (-dy,))


class WrongContext(Good):
    def __call__(self, x, *, context):
        return jnp.tanh(self.linear(x)) + reversed_derivative(context)[:, None]


class Rounds(Good):
    def __call__(self, x):
        y = self.linear(x)
        return jnp.tanh(y + jax.lax.stop_gradient(jnp.round(y) - y))


class Tiny(Good):
    def __call__(self, x):
        return 1e-6 * jnp.tanh(self.linear(x))


class HasMore(Good):
    def __init__(self, rngs):
        super().__init__(rngs)
        self.unused = nnx.Param(jnp.ones(3))


def report_on(block, **options):
    return revjax.check(revjax.ReversibleStack(block, num_layers=3, rngs=nnx.Rngs(0), **options), X)


@pytest.mark.parametrize("coupling", [revjax.RevNet(), revjax.NearResidual(1)], ids=["revnet", "near-residual"])
def test_a_good_block_passes(coupling):
    report = report_on(Good, coupling=coupling)
    assert report.ok and not report.notes
    assert report.difference_error <= 1e-6 and report.gradient_error <= 1e-5
    assert len(report.rows) == 3 and "exact; safe to train" in str(report)


def test_a_key_that_no_branch_takes_is_worth_a_note():
    stack = revjax.ReversibleStack(Good, num_layers=2, rngs=nnx.Rngs(0))
    report = revjax.check(stack, X, key=jax.random.key(0))
    assert report.ok and ["no branch takes one, so nothing is random" in note for note in report.notes] == [True]


def test_a_wrong_derivative_of_what_begins_at_zero_or_comes_from_outside_is_named():
    stack = revjax.ReversibleStack(WrongWhereZero, num_layers=3, rngs=nnx.Rngs(0))
    context = jnp.ones((X.shape[0], X.shape[-1]))
    (fault,) = revjax.check(stack, X, key=jax.random.key(0), context=context).faults
    assert "The gradient of runs.0.0.modulation.bias, runs.0.0.modulation.kernel differs from finite diff" in fault
    stack = revjax.ReversibleStack(WrongContext, num_layers=3, rngs=nnx.Rngs(0))
    (fault,) = revjax.check(stack, X, context=context).faults
    assert "The gradient of context differs from finite differences by 2.0e+00" in fault


@pytest.mark.parametrize(
    "block, noted",
    [
        (Tiny, "Tiny returns increments of at most"),
        (HasMore, "The gradient is 0 in all of runs.0.0.unused"),
    ],
)
def test_what_is_no_fault_but_worth_knowing_is_a_note(block, noted):
    report = report_on(block)
    assert report.ok and [noted in note for note in report.notes] == [True]


def test_low_precision_passes():
    assert report_on(LowPrecision).ok


@pytest.mark.filterwarnings("ignore:Using 'Module.sow:DeprecationWarning")
@pytest.mark.parametrize(
    "block, named",
    [
        (AddsItsInput, "AddsItsInput returns x . f.x., but a branch returns the increment"),
        (HoldsRandomness, "HoldsRandomness draws random numbers from a stream that it holds"),
        (Writes, "Writes changes its variables"),
        (Sows, "Sows changes its variables when it is called .hidden"),
        (DrawsFromNumpy, "DrawsFromNumpy is not the same function twice"),
        (Counts, "Counts is not the same function twice"),
        (WrongDerivative, "differs from finite differences"),
        (Rounds, "Where stop_gradient is meant to give another derivative, check cannot tell"),
    ],
)
def test_a_broken_block_is_named(block, named):
    report = report_on(block)
    assert not report.ok and "do not train" in str(report)
    assert any(__import__("re").search(named, fault) for fault in report.faults), report.faults


def test_a_function_that_differs_in_the_backward_pass_is_seen_by_the_canary():
    report = report_on(Counts)
    assert len(report.faults) == 2 and "was not rebuilt to the bit" in report.faults[1]
    assert report.gradient_error is None and "Gradients were not compared" in report.notes[0]


@pytest.mark.slow
@pytest.mark.optimized
def test_what_no_branch_explains_is_said_to_be_a_fault_of_revjax(monkeypatch):
    """Without the seal on what is divided by; with it, a rate that grows with depth is rebuilt to the bit."""

    class Drops(nnx.Module):
        def __init__(self, rngs):
            self.linear = nnx.Linear(64, 64, rngs=rngs)
            self.rate = nnx.Variable(jnp.zeros(()))

        def __call__(self, x, *, key=None):
            return revjax.nn.stochastic_depth(jax.nn.gelu(self.linear(x)), self.rate[...], key)

    stack = revjax.ReversibleStack(Drops, num_layers=4, rngs=nnx.Rngs(0))
    stack.runs[0][0].rate[...] = 0.2 * jnp.arange(4) / 3
    x = jax.random.normal(jax.random.key(7), (4, 16, 64))
    assert revjax.check(stack, x, key=jax.random.key(0)).ok
    monkeypatch.setattr(sys.modules["revjax.core.pin"]._Pinned, "_seal", lambda self, x: x)
    rebuilt, *others = revjax.check(stack, x, key=jax.random.key(0)).faults
    assert "was not rebuilt to the bit" in rebuilt and "may well be a fault of revjax" in others[0]


def test_a_model_may_return_several_arrays():
    class Routed(nnx.Module):
        def __init__(self, rngs):
            self.stack = revjax.ReversibleStack(Balanced, num_layers=2, rngs=rngs)

        def __call__(self, x):
            result = self.stack.scan(x)
            return result.out, result.aux

    class Balanced(Good):
        def __call__(self, x):
            y = self.linear(x)
            return jnp.tanh(y), {"aux": {"balance": jnp.mean(y**2), "most": jnp.argmax(y)}}

    assert revjax.check(Routed(nnx.Rngs(0)), X).ok

    class Chosen(Routed):
        def __call__(self, x):
            return jnp.argmax(super().__call__(x)[0], -1)

    with pytest.raises(TypeError, match="returns floats, but Chosen returned none"):
        revjax.check(Chosen(nnx.Rngs(0)), X)


@pytest.mark.parametrize(
    "wrong, shown",
    [
        ({}, ["0", "1", "2", "3", "(92 more, nothing wrong)", "96", "97", "98", "99"]),
        ({3, 50}, ["0", "1", "2", "3", "(46 more, nothing wrong)", "50", "(45 more, nothing wrong)", "96", "97"]),
        (set(range(4, 90)), [*map(str, range(40)), "(60 more, 50 of them wrong)"]),
    ],
    ids=["none", "two", "many"],
)
def test_a_long_table_says_what_it_leaves_out_where_it_does(wrong, shown):
    rows = [(str(i), int(i in wrong), 0, 1.0) for i in range(100)]
    report = revjax.models.CheckReport([], [], rows, 0.0, 0.0)
    names = [line.split("\u2502")[1].strip() for line in str(report).splitlines() if line.startswith("\u2502")]
    assert names[: len(shown)] == shown


def test_a_whole_decoder_passes_with_its_dropout():
    config = revjax.DecoderConfig(d_model=32, num_layers=2, num_heads=2, dropout=0.1, dtype="float32")
    model = revjax.Decoder(config, rngs=nnx.Rngs(0))
    tokens = jax.random.randint(jax.random.key(0), (2, 16), 0, 256)
    report = revjax.check(model, tokens, key=jax.random.key(1))
    assert report.ok, report.faults
    assert report.difference_error <= 1e-6


class Kinks(nnx.Module):
    """Differences over any stretch that is not tiny see some of 16,384 kinks."""

    function = staticmethod(nnx.relu)

    def __init__(self, rngs):
        self.norm, self.up = nnx.LayerNorm(16, rngs=rngs), nnx.Linear(16, 128, rngs=rngs)
        self.down = nnx.Linear(128, 16, rngs=rngs)

    def __call__(self, x):
        return self.down(self.function(self.up(self.norm(x))))


class AbsoluteKinks(Kinks):
    function = staticmethod(jnp.abs)


@jax.custom_vjp
def nearly_relu(x):
    return nnx.relu(x)


nearly_relu.defvjp(lambda x: (nnx.relu(x), x), lambda x, dy: ((1 + 1e-4) * jnp.where(x > 0, dy, 0),))


class WrongKinks(Kinks):
    function = staticmethod(nearly_relu)


def report_on_long_rows(block):
    x = jax.random.normal(jax.random.key(1), (4, 32, 16))
    return revjax.check(revjax.ReversibleStack(block, num_layers=4, rngs=nnx.Rngs(0)), x)


class RootOfZero(Good):
    def __call__(self, x):
        return jnp.sqrt(jnp.abs(self.linear(0 * x)))


def test_gradients_that_are_not_finite_are_one_fault():
    report = report_on(RootOfZero)
    (fault,) = report.faults
    assert "Gradients hold NaN or infinite numbers" in fault
    assert report.gradient_error is None and report.difference_error is None


@pytest.mark.parametrize("block", [Kinks, AbsoluteKinks])
def test_a_function_with_kinks_passes_as_strictly_as_others(block):
    report = report_on_long_rows(block)
    assert report.ok and not report.notes and report.difference_error <= 1e-6


def test_kinks_hide_no_wrong_derivative():
    (fault,) = report_on_long_rows(WrongKinks).faults
    assert "differs from finite differences by" in fault and "at most 1e-06" in fault


class InFloat32(Good):
    """As attention's scores often are: float32 whatever comes in."""

    def __call__(self, x):
        y = jax.nn.softmax(self.linear(x).astype(jnp.float32))
        return y.astype(x.dtype)


@jax.custom_vjp
def double(x):
    return 2 * x


double.defvjp(lambda x: (2 * x, None), lambda _, dy: (1.8 * dy,))  # wrong by a tenth


class CastsAtTheEnd(nnx.Module):
    def __init__(self):
        self.stack = revjax.ReversibleStack(Good, num_layers=2, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.stack(x).astype(jnp.float32)


class WrongInFloat32(Good):
    def __call__(self, x):
        return double(jnp.tanh(self.linear(x)).astype(jnp.float32)).astype(x.dtype)


def test_a_cast_to_float32_is_no_fault_and_hides_none():
    report = revjax.check(revjax.ReversibleStack(InFloat32, num_layers=3, rngs=nnx.Rngs(0)), X)
    assert report.ok and report.difference_error is not None and report.difference_error > 1e-6
    assert ["no more precise than float32 (InFloat32: cast" in note for note in report.notes] == [True]
    report = revjax.check(CastsAtTheEnd(), X)
    assert report.ok and ["float32 (the model's output: cast" in note for note in report.notes] == [True]
    report = revjax.check(revjax.ReversibleStack(WrongInFloat32, num_layers=3, rngs=nnx.Rngs(0)), X)
    (fault,) = report.faults
    assert "linear.kernel, x differs from finite differences" in fault and "at most 1e-02" in fault


def test_a_model_without_a_stack_is_an_error():
    with pytest.raises(TypeError, match="Linear holds none"):
        revjax.check(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), X)


def test_a_deep_stack_that_keeps_bits_is_not_blamed_for_the_drift_of_float_inverses():
    stack = revjax.ReversibleStack(Good, num_layers=24, coupling=revjax.NearResidual(4), rngs=nnx.Rngs(0))
    assert revjax.check(stack, 0.1 * X).ok


def test_bdia_is_checked_as_it_trains_and_float_streams_are_not_called_exact():
    assert report_on(Good, coupling=revjax.BDIA()).ok
    report = report_on(Good, exact=False)
    assert report.ok and "float streams drift" in str(report) and "exact; safe" not in str(report)
