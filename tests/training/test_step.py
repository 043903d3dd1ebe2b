"""One step is plain AdamW on the mean loss; an update made from a wrong gradient is refused inside it."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from revjax.models import Decoder, DecoderConfig
from revjax.models.stack import ReversibleStack
from revjax.training import init_state, make_eval_step, make_train_step, split
from revjax.training.state import TrainState

CONFIG = DecoderConfig(d_model=32, num_layers=2, num_heads=2, dtype="float32")


def token_loss(model, rows, key):
    rows = rows.astype(jnp.int32)
    return model.loss(rows[:, :-1], rows[:, 1:], key=key)


def make_rows(seed=0):
    return np.random.default_rng(seed).integers(0, 256, (4, 17)).astype(np.uint8)


def make(model, loss=token_loss, optimizer=None, **options):
    skeleton, params = split(model)
    optimizer = optax.adamw(1e-2) if optimizer is None else optimizer
    step = make_train_step(skeleton, loss, optimizer, **options)
    return skeleton, jax.jit(step), init_state(params, optimizer, jax.random.key(7))


def same_bits(a, b):
    return all(np.array_equal(x, y, equal_nan=True) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)))


@pytest.fixture(scope="module")
def decoder():
    return nnx.jit(lambda: Decoder(CONFIG, rngs=nnx.Rngs(0)))()


def test_a_model_goes_into_plain_dicts_and_back(decoder):
    skeleton, params = split(decoder)
    assert params["embedding"]["table"].shape == (256, 32)
    assert set(params["stack"]["runs"]["0"]) == {"0", "1"}
    back = nnx.state(skeleton.merge(params), nnx.Param)
    assert same_bits(back, nnx.state(decoder, nnx.Param))
    assert skeleton.abstract.stack.names == decoder.stack.names


def test_the_state_goes_into_plain_dicts_and_back(decoder):
    _, _, state = make(decoder)
    nested = state.as_dict()
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(nested))
    back = state.from_dict(nested)
    assert jax.tree.structure(back) == jax.tree.structure(state) and same_bits(back, state)


def test_a_step_is_the_optimizer_on_the_gradient_of_the_mean(decoder):
    _, step, state = make(decoder, optimizer=optax.sgd(0.5))
    rows = make_rows()
    graphdef, params, rest = nnx.split(decoder, nnx.Param, ...)

    def mean(params):
        logits = nnx.merge(graphdef, params, rest, copy=True)(jnp.asarray(rows[:, :-1], jnp.int32))
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, jnp.asarray(rows[:, 1:], jnp.int32)))

    value, grads = jax.jit(jax.value_and_grad(mean))(params)
    expected = jax.tree.map(lambda w, g: w - 0.5 * g, params, grads)
    new, metrics = step(state, rows)
    assert float(metrics["loss"]) == pytest.approx(float(value), rel=1e-5)
    assert float(metrics["grad_norm"]) == pytest.approx(float(optax.tree.norm(grads)), rel=1e-4)
    assert int(metrics["canary"]) == 0 and int(metrics["unsafe"]) == 0 and not bool(metrics["trouble"])
    flat = dict(zip(range(99), jax.tree.leaves(expected)))
    for i, x in enumerate(jax.tree.leaves(nnx.state(split(decoder)[0].merge(new.params), nnx.Param))):
        np.testing.assert_allclose(x, flat[i], rtol=2e-4, atol=2e-6)
    assert int(new.step) == 1 and int(new.skipped) == 0


def test_every_step_has_a_key_of_its_own_and_the_same_one_again():
    seen = lambda model, rows, key: (jnp.sum(model.w[...]) * 0 + jax.random.uniform(key), 1.0)
    _, step, state = make(Weights(), seen)
    (after, first), (_, second) = step(state, 0), step(step(state, 0)[0], 0)
    assert float(first["loss"]) != float(second["loss"])
    assert float(step(state, 0)[1]["loss"]) == float(first["loss"])
    assert int(after.step) == 1


class Weights(nnx.Module):
    def __init__(self):
        self.w = nnx.Param(jnp.ones((3, 3)))


@pytest.mark.parametrize("on_trouble", ["skip", "stop"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_loss_that_is_not_finite_changes_nothing(on_trouble, bad):
    loss = lambda model, rows, key: (jnp.sum(model.w[...]) * rows, 1.0)
    _, step, state = make(Weights(), loss, on_trouble=on_trouble)
    state, _ = step(state, np.float32(1))  # the optimizer now remembers something
    after, metrics = step(state, np.float32(bad))
    assert bool(metrics["trouble"]) and same_bits((after.params, after.opt_state), (state.params, state.opt_state))
    assert int(after.step) == 2 and int(after.skipped) == 1
    later, metrics = step(after, np.float32(1))
    assert not bool(metrics["trouble"]) and not same_bits(later.params, after.params)


def test_the_gate_can_fail():
    """Its twin: with "warn" the same NaN does reach the parameters."""
    loss = lambda model, rows, key: (jnp.sum(model.w[...]) * rows, 1.0)
    _, step, state = make(Weights(), loss, on_trouble="warn")
    after, metrics = step(state, np.float32(np.nan))
    assert bool(metrics["trouble"]) and np.isnan(after.params["w"]).all() and int(after.skipped) == 0


def test_an_overflow_of_the_streams_changes_nothing_and_names_the_layer(decoder):
    skeleton, step, state = make(decoder)
    huge = jax.tree.map(lambda x: x, state.params)
    kernel = huge["stack"]["runs"]["0"]["1"]["mlp"]["down"]["kernel"]
    huge["stack"]["runs"]["0"]["1"]["mlp"]["down"]["kernel"] = kernel.at[1].multiply(1e9)
    state = TrainState(huge, state.opt_state, state.step, state.skipped, state.key)
    after, metrics = step(state, make_rows())
    assert int(metrics["unsafe"]) > 0 and bool(metrics["trouble"]) and same_bits(after.params, state.params)
    assert "layer 1 MLPBranch" in metrics["report"].describe(skeleton.abstract)


class Unsteady(nnx.Module):
    """A branch that is another function every time it is called."""

    calls = itertools.count()

    def __init__(self, rngs):
        self.kernel = nnx.Param(0.1 * jax.random.normal(rngs.params(), (8, 8)))

    def __call__(self, x):
        count = lambda _: np.float32(next(self.calls) % 7)
        shift = jax.pure_callback(count, jax.ShapeDtypeStruct((), jnp.float32), jnp.sum(jax.lax.stop_gradient(x)))
        return jnp.tanh(x @ self.kernel[...]) + 0.01 * shift


def test_a_branch_that_is_not_the_same_twice_changes_nothing_and_is_named():
    stack = ReversibleStack(Unsteady, num_layers=3, rngs=nnx.Rngs(0))
    loss = lambda model, x, key: (jnp.sum(model(x) ** 2), jnp.float32(x.size))
    skeleton, step, state = make(stack, loss)
    x = np.random.default_rng(0).normal(size=(2, 4, 8)).astype(np.float32)
    after, metrics = step(state, x)
    assert int(metrics["canary"]) > 0 and bool(metrics["trouble"]) and int(after.skipped) == 1
    assert same_bits((after.params, after.opt_state), (state.params, state.opt_state))
    assert "was not rebuilt to the bit" in metrics["report"].describe(skeleton.abstract)
    assert "layer" in metrics["report"].describe(skeleton.abstract)


def test_the_learning_rate_counts_the_updates_that_were_made():
    loss = lambda model, rows, key: (jnp.sum(model.w[...]) * rows, 1.0)
    _, step, state = make(Weights(), loss, schedule=lambda t: 10.0 + t)
    rates = []
    for value in (1.0, np.nan, 1.0, 1.0):
        state, metrics = step(state, np.float32(value))
        rates.append(float(metrics["learning_rate"]))
    assert rates == [10, 11, 11, 12]


def test_evaluation_sums_without_randomness(decoder):
    skeleton, params = split(decoder)
    rows = make_rows()
    total, weight = jax.jit(make_eval_step(skeleton, token_loss))(params, rows)
    logits = jax.jit(decoder)(rows[:, :-1].astype(np.int32))
    expected = optax.softmax_cross_entropy_with_integer_labels(logits, rows[:, 1:].astype(np.int32))
    assert float(total) == pytest.approx(float(jnp.sum(expected)), rel=1e-5) and float(weight) == rows[:, 1:].size


def test_rewind_is_not_taken_for_something_else(decoder):
    with pytest.raises(ValueError, match="'warn', 'skip' or 'stop', but got 'rewind'"):
        make_train_step(split(decoder)[0], token_loss, optax.sgd(1.0), on_trouble="rewind")


def test_a_module_without_parameters_is_refused():
    with pytest.raises(ValueError, match="no nnx.Param"):
        split(nnx.Dropout(0.5))
