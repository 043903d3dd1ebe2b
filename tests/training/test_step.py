"""One step is plain AdamW on the mean loss; an update made from a wrong gradient is refused inside it."""

import dataclasses
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from revjax.models import Decoder, DecoderConfig
from revjax.models.stack import ReversibleStack
from revjax.training import (
    OptimizerConfig,
    init_state,
    make_eval_step,
    make_optimizer,
    make_schedule,
    make_train_step,
    split,
    step_compiler_options,
)
from revjax.training.norms import KnownNorm, global_norm

CONFIG = DecoderConfig(d_model=32, num_layers=2, num_heads=2, dtype="float32")


def token_loss(model, rows, key):
    rows = rows.astype(jnp.int32)
    return model.loss(rows[:, :-1], rows[:, 1:], key=key)


def make_rows(seed=0):
    return np.random.default_rng(seed).integers(0, 256, (4, 17)).astype(np.uint8)


def make(model, loss=token_loss, optimizer=None, *, loss_scale=False, **options):
    skeleton, params = split(model)
    optimizer = optax.adamw(1e-2) if optimizer is None else optimizer
    step = make_train_step(skeleton, loss, optimizer, **options)
    keeps = {"ema": "ema_decay" in options, "spikes": "spike_sigmas" in options, "loss_scale": loss_scale}
    return skeleton, jax.jit(step), init_state(params, optimizer, jax.random.key(7), **keeps)


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


@pytest.mark.optimized
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


def test_a_step_holds_one_copy_of_the_gradients():
    """No squares for their norm, no quotients, nothing of the forward pass. With optax's own clipping there is more."""
    config = dataclasses.replace(CONFIG, d_model=64, num_layers=48, loss_tile=64)
    skeleton, params = split(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))
    optimizer = make_optimizer(OptimizerConfig(), make_schedule(OptimizerConfig(), 100))
    rows = jax.ShapeDtypeStruct((2, 65), jnp.int32)

    def temporary(optimizer, loss=token_loss, **how):
        state = jax.eval_shape(lambda params: init_state(params, optimizer, jax.random.key(0)), params)
        lowered = jax.jit(make_train_step(skeleton, loss, optimizer, **how), donate_argnums=0).lower(state, rows)
        options = step_compiler_options(jax.default_backend())
        return lowered.compile(compiler_options=options).memory_analysis().temp_size_in_bytes

    one_copy = sum(4 * p.size for p in jax.tree.leaves(params))
    assert one_copy < temporary(optimizer) < 1.25 * one_copy
    assert temporary(optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))) > 1.5 * one_copy
    assert temporary(optimizer, accumulation=2) < 1.25 * one_copy  # micro-batches add to the same array
    weighted = lambda model, rows, key: model.loss(rows[:, :-1], rows[:, 1:], rows[:, 1:] > 0)
    assert temporary(optimizer, weighted) < 1.25 * one_copy  # nor does it matter when the weights are known


def test_a_part_of_the_gradients_is_clipped_by_its_own_norm():
    """The step tells the norm of all; where others are frozen, or all were scaled, that is not the one to clip by."""
    config = OptimizerConfig(name="sgd", momentum=0.0, weight_decay=0.0, warmup_steps=0, learning_rate=1.0)
    schedule = lambda count: 1.0
    params = {"trained": jnp.zeros(2), "frozen": jnp.zeros(2)}
    grads = {"trained": jnp.array([3.0, 4.0]), "frozen": jnp.array([3e3, 4e3])}
    labels = {"trained": "t", "frozen": "f"}
    clipped = make_optimizer(config, schedule)
    frozen = optax.partition({"t": clipped, "f": optax.set_to_zero()}, labels)
    known = KnownNorm(grads, global_norm(grads))
    for optimizer in (clipped, frozen, optax.chain(optax.scale(2.0), clipped)):
        optimizer = optax.with_extra_args_support(optimizer)
        state = optimizer.init(params)
        told, _ = optimizer.update(grads, state, params, known_norm=known)
        found, _ = optimizer.update(grads, state, params)
        np.testing.assert_allclose(told["trained"], found["trained"], rtol=1e-6)
    told, _ = optax.with_extra_args_support(frozen).update(grads, frozen.init(params), params, known_norm=known)
    np.testing.assert_allclose(told["trained"], [-0.6, -0.8], rtol=1e-6)


@pytest.mark.parametrize("shape", [(0, 3, 3), (5,), (3, 200, 100), (40, 3, 3)])
def test_the_norm_of_all_gradients_is_the_norm(shape):
    x = jax.random.normal(jax.random.key(0), shape)
    np.testing.assert_allclose(global_norm({"x": x}), np.sqrt(np.sum(np.square(x, dtype=np.float64))), rtol=1e-5)


@pytest.mark.optimized
def test_compiled_with_its_options_a_step_copies_no_moments_and_gives_the_same_bits(decoder):
    skeleton, params = split(decoder)
    optimizer = optax.adamw(1e-2)
    state, rows = init_state(params, optimizer, jax.random.key(7)), make_rows()
    lowered = jax.jit(make_train_step(skeleton, token_loss, optimizer), donate_argnums=0).lower(state, rows)
    plain, ours = lowered.compile(), lowered.compile(compiler_options=step_compiler_options(jax.default_backend()))
    copies = lambda compiled: re.findall(r" copy\(%(state_opt_state.*mlp.*)\)", compiled.as_text())
    assert len(copies(plain)) >= 3 and copies(ours) == []
    assert ours.memory_analysis().temp_size_in_bytes < plain.memory_analysis().temp_size_in_bytes
    a, b = (jax.tree.map(jnp.copy, state) for _ in range(2))  # a step uses its state up
    assert same_bits(plain(a, rows)[0], ours(b, rows)[0])


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
    state = dataclasses.replace(state, params=huge)
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


def ragged_loss(model, rows, key):
    """Rows with unequal numbers of tokens that count."""
    rows = rows.astype(jnp.int32)
    weights = (jnp.arange(16)[None] < 1 + rows[:, :1] % 16).astype(jnp.float32)
    return model.loss(rows[:, :-1], rows[:, 1:], weights)


def relative_difference(a, b):
    a, b = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)]).astype(np.float64) for tree in (a, b))
    return np.linalg.norm(a - b) / np.linalg.norm(b)


def test_accumulation_is_one_batch_however_many_tokens_each_part_has(decoder):
    """The difference is at most three times that between two orders of the same rows."""
    sgd = optax.sgd(1.0)

    def update(rows, **options):
        _, step, state = make(decoder, ragged_loss, sgd, **options)
        return jax.tree.map(jnp.subtract, step(state, rows)[0].params, state.params)

    rows = np.random.default_rng(3).integers(0, 256, (32, 17)).astype(np.uint8)
    counts = np.minimum(1 + rows[:, 0] % 16, 16).reshape(4, 8).sum(0)
    assert len(set(counts.tolist())) > 1  # so the mean of means would be something else
    whole = update(rows)
    floor = relative_difference(update(rows[::-1]), whole)
    assert 0 < floor < 1e-5
    assert relative_difference(update(rows, accumulation=8), whole) <= 3 * floor


def test_the_mean_of_means_is_another_gradient(decoder):
    """The twin: what accumulation would be if every part were divided by its own weight."""
    mean_loss = lambda model, rows, key: (jnp.divide(*ragged_loss(model, rows, key)), 1.0)
    rows = np.random.default_rng(3).integers(0, 256, (32, 17)).astype(np.uint8)
    updates = []
    for loss, options in ((ragged_loss, {}), (mean_loss, {"accumulation": 8})):
        _, step, state = make(decoder, loss, optax.sgd(1.0), **options)
        updates.append(jax.tree.map(jnp.subtract, step(state, rows)[0].params, state.params))
    assert relative_difference(updates[1], updates[0]) > 1e-2


def test_accumulation_adds_up_what_the_parts_report(decoder):
    _, whole, state = make(decoder, optimizer=optax.sgd(0.1))
    _, parts, _ = make(decoder, optimizer=optax.sgd(0.1), accumulation=2)
    one, two = whole(state, make_rows())[1], parts(state, make_rows())[1]
    assert float(one["max_abs"]) == float(two["max_abs"]) and float(two["canary"]) == 0
    assert float(one["loss"]) == pytest.approx(float(two["loss"]), rel=1e-6)


def test_accumulation_must_divide_the_rows(decoder):
    _, step, state = make(decoder, accumulation=3)
    with pytest.raises(ValueError, match="accumulation=3 must divide the rows"):
        step(state, make_rows())


def test_the_running_mean_of_parameters_follows_them():
    loss = lambda model, rows, key: (jnp.sum(model.w[...]) * rows, 1.0)
    _, step, state = make(Weights(), loss, optax.sgd(1.0), ema_decay=0.75)
    mean, w = 1.0, 1.0
    for value in (1.0, 2.0, np.nan, 4.0):
        state, _ = step(state, np.float32(value))
        if np.isfinite(value):
            w -= value
            mean = 0.75 * mean + 0.25 * w
        np.testing.assert_allclose(state.ema["w"], mean, rtol=1e-6)
        np.testing.assert_allclose(state.params["w"], w, rtol=1e-6)


def test_a_spike_changes_nothing_and_is_forgotten_when_it_stays():
    loss = lambda model, rows, key: (jnp.sum(model.w[...]) * 0 + rows, 1.0)
    _, step, state = make(Weights(), loss, spike_sigmas=6.0)
    noise = np.random.default_rng(0).normal(3, 0.1, 80)
    for x in noise:
        state, metrics = step(state, np.float32(x))
        assert not bool(metrics["trouble"])
    after, metrics = step(state, np.float32(5))
    assert bool(metrics["spike"]) and bool(metrics["trouble"]) and same_bits(after.params, state.params)
    assert int(after.skipped) == 1
    same, metrics = step(after, np.float32(3))
    assert not bool(metrics["spike"])
    spikes = []
    for _ in range(100):
        state, metrics = step(state, np.float32(5))
        spikes.append(bool(metrics["spike"]))
    assert spikes[0] and not spikes[-1]  # a new level is accepted after a while


def test_a_loss_that_is_not_finite_does_not_spoil_the_memory_of_losses():
    loss = lambda model, rows, key: (jnp.sum(model.w[...]) * 0 + rows, 1.0)
    _, step, state = make(Weights(), loss, spike_sigmas=6.0)
    state, _ = step(state, np.float32(3))
    after, metrics = step(state, np.float32(np.nan))
    assert bool(metrics["trouble"]) and not bool(metrics["spike"]) and same_bits(after.spikes, state.spikes)


def test_a_scaled_gradient_that_overflows_halves_the_scale_and_is_no_trouble():
    """float16 gradients: the loss is fine, its scaled gradient is not."""

    def loss(model, rows, key):
        half = model.w[...].astype(jnp.float16)
        return jnp.sum((half * jnp.float16(rows)).astype(jnp.float32)), 1.0

    _, step, state = make(Weights(), loss, optax.sgd(1.0), loss_scale=True)
    after, metrics = step(state, np.float32(100))  # 2^15 * 100 is above 65504
    assert not bool(metrics["trouble"]) and int(after.skipped) == 1 and same_bits(after.params, state.params)
    assert float(after.loss_scale["scale"]) == float(state.loss_scale["scale"]) / 2
    after, metrics = step(state, np.float32(0.5))
    np.testing.assert_allclose(after.params["w"], 0.5)  # divided again
    assert float(after.loss_scale["scale"]) == float(state.loss_scale["scale"])
    nearly = dataclasses.replace(state, loss_scale=state.loss_scale | {"finite": jnp.int32(1999)})
    assert float(step(nearly, np.float32(0.5))[0].loss_scale["scale"]) == 2**16


def test_more_sums_of_the_loss_become_means_in_the_metrics():
    loss = lambda model, rows, key: (jnp.sum(model.w[...]), 4.0, {"z_loss": 2.0 * rows})
    _, step, state = make(Weights(), loss)
    assert float(step(state, np.float32(6))[1]["z_loss"]) == 3


def test_evaluation_sums_without_randomness(decoder):
    skeleton, params = split(decoder)
    rows = make_rows()
    total, weight = jax.jit(make_eval_step(skeleton, token_loss))(params, rows)
    logits = jax.jit(decoder)(rows[:, :-1].astype(np.int32))
    expected = optax.softmax_cross_entropy_with_integer_labels(logits, rows[:, 1:].astype(np.int32))
    assert float(total) == pytest.approx(float(jnp.sum(expected)), rel=1e-5) and float(weight) == rows[:, 1:].size


def test_a_module_without_parameters_is_refused():
    with pytest.raises(ValueError, match="no nnx.Param"):
        split(nnx.Dropout(0.5))
