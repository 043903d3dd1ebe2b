"""Layers that are updated in the backward pass go where they go otherwise, and their gradients need no memory."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from revjax.core import backward
from revjax.models import (
    Decoder,
    DecoderConfig,
    LoRAConfig,
    ReversibleStack,
    value_and_grad,
    value_and_update,
)
from revjax.training import (
    OptimizerConfig,
    init_state,
    make_optimizer,
    make_schedule,
    make_train_step,
    split,
    split_abstract,
    step_compiler_options,
)
from revjax.training.layer_updates import LayerUpdates
from revjax.training.norms import global_norm

CONFIG = DecoderConfig(  # periods of two kinds of layers, and one that remains
    d_model=32, num_layers=3, num_heads=2, vocab_size=64, dropout=0.1, layer_pattern=("local", "global"), window=8
)
HOW = ("one_sweep", "two_sweeps")


def token_loss(model, rows, key):
    return model.loss(rows[:, :-1], rows[:, 1:], rows[:, 1:] > 3, key=key)


def rows(seed):
    return np.random.default_rng(seed).integers(0, 64, (4, 17)).astype(np.int32)


def prepared(in_backward, *, config=CONFIG, spoil=lambda params: params, **settings):
    """The first state, and the jitted step."""
    skeleton, params = split(Decoder(config, rngs=nnx.Rngs(0)))
    settings = OptimizerConfig(**{"warmup_steps": 2, "clip_norm": None} | settings)
    optimizer = make_optimizer(settings, make_schedule(settings, 100))
    state = init_state(spoil(params), optimizer, jax.random.key(7))
    return state, jax.jit(make_train_step(skeleton, token_loss, optimizer, in_backward=in_backward))


def trained(in_backward, steps, **settings):
    """The state and the metrics after so many steps, and the state before the last."""
    state, step = prepared(in_backward, **settings)
    before, metrics = state, {}
    for i in range(steps):
        before = state
        state, metrics = step(state, rows(i))
    return state, metrics, before


def same_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def close(ours, theirs):
    """To rounding: XLA merges products and sums in one loop that it does not in another."""
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-6 * float(jnp.max(jnp.abs(b))))


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"name": "lion", "moment_dtype": "bfloat16"}], ids=["adamw", "lion"])
@pytest.mark.parametrize("how", HOW)
@pytest.mark.optimized
def test_the_first_step_is_the_ordinary_one_to_the_bit(how, settings):
    (ours, metrics, _), (theirs, expected, _) = trained(how, 1, **settings), trained(None, 1, **settings)
    assert same_bits(ours, theirs) and metrics["loss"] == expected["loss"] and metrics["canary"] == 0
    np.testing.assert_allclose(metrics["grad_norm"], expected["grad_norm"], rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("how, clip_norm", [("one_sweep", None), ("two_sweeps", None), ("two_sweeps", 0.5)])
def test_parameters_follow_as_without(how, clip_norm):
    settings = dict(name="sgd", clip_norm=clip_norm)
    (ours, metrics, _), (theirs, expected, _) = trained(how, 20, **settings), trained(None, 20, **settings)
    assert int(metrics["skipped"]) == 0 and float(metrics["loss"]) == pytest.approx(float(expected["loss"]), rel=1e-5)
    close(ours.params, theirs.params)


@pytest.mark.slow
@pytest.mark.parametrize("how, clip_norm", [("one_sweep", None), ("two_sweeps", None), ("two_sweeps", 0.5)])
def test_signs_follow_as_without_where_no_rounding_decides_them(how, clip_norm):
    """Step by step from the same state: a sign that differs changes all that follows."""
    settings = dict(name="lion", clip_norm=clip_norm, b1=0.9, b2=0.95)
    (state, step), (_, ordinary) = prepared(how, **settings), prepared(None, **settings)
    is_lion = lambda s: isinstance(s, optax.ScaleByLionState)
    moments = lambda state: next(s.mu for s in jax.tree.leaves(state.opt_state, is_leaf=is_lion) if is_lion(s))
    for i in range(20):
        ours, theirs = step(state, rows(i))[0], ordinary(state, rows(i))[0]
        close(moments(ours), moments(theirs))

        def near_zero(before, after):
            direction = 0.9 * before + (1 - 0.9) * (after - 0.95 * before) / (1 - 0.95)  # b1 m + (1 - b1) g
            return jnp.abs(direction) < 1e-5 * jnp.max(jnp.abs(direction))

        doubtful = jax.tree.map(near_zero, moments(state), moments(theirs))
        assert np.mean(np.concatenate([np.ravel(x) for x in jax.tree.leaves(doubtful)])) < 1e-3
        close(jax.tree.map(jnp.where, doubtful, theirs.params, ours.params), theirs.params)
        state = theirs


def test_in_one_sweep_all_together_stay_below_the_largest_norm():
    settings = dict(name="sgd", momentum=0.0, weight_decay=0.0, learning_rate=1.0, warmup_steps=0, schedule="constant")
    state, metrics, before = trained("one_sweep", 1, clip_norm=0.1, **settings)
    moved = float(global_norm(jax.tree.map(jnp.subtract, state.params, before.params)))
    assert 0.05 < moved <= 0.1 * (1 + 1e-4) < float(metrics["grad_norm"])


def overflowing(params):
    """Embeddings that no stream can hold."""
    return params | {"embedding": {"table": 1e6 * params["embedding"]["table"]}}


@pytest.mark.parametrize("how", HOW)
def test_nothing_moves_by_a_gradient_that_is_known_to_be_wrong(how):
    state, metrics, before = trained(how, 1, spoil=overflowing)
    assert metrics["unsafe"] > 0 and metrics["trouble"] and int(metrics["skipped"]) == 1
    assert same_bits(state.params, before.params) and same_bits(state.opt_state, before.opt_state)


@pytest.mark.parametrize("how", HOW)
def test_memory_of_a_step_does_not_grow_with_depth(how):
    def temporary(num_layers, in_backward=how):
        config = DecoderConfig(d_model=64, num_layers=num_layers, num_heads=1, vocab_size=64, loss_tile=64)
        skeleton, params = split_abstract(lambda: Decoder(config, rngs=nnx.Rngs(0)))
        optimizer = make_optimizer(OptimizerConfig(), make_schedule(OptimizerConfig(), 100))
        state = jax.eval_shape(lambda params: init_state(params, optimizer, jax.random.key(0)), params)
        step = jax.jit(make_train_step(skeleton, token_loss, optimizer, in_backward=in_backward), donate_argnums=0)
        lowered = step.lower(state, jax.ShapeDtypeStruct((1, 65), jnp.int32))
        options = step_compiler_options(jax.default_backend())
        return lowered.compile(compiler_options=options).memory_analysis().temp_size_in_bytes

    assert temporary(32) <= 1.02 * temporary(8)
    assert temporary(32, None) > 2 * temporary(8, None)


def test_what_cannot_be_taken_back_is_refused():
    skeleton, _ = split(Decoder(CONFIG, rngs=nnx.Rngs(0)))
    optimizer = make_optimizer(OptimizerConfig(), lambda step: 1e-3)
    with pytest.raises(ValueError, match="no gradients to add up: accumulation must be 1"):
        make_train_step(skeleton, token_loss, optimizer, in_backward="two_sweeps", accumulation=2)
    with pytest.raises(ValueError, match="in_backward='two_sweeps'"):
        make_train_step(skeleton, token_loss, optimizer, in_backward="one_sweep", spike_sigmas=6.0)
    with pytest.raises(ValueError, match="on_trouble cannot be 'warn'"):
        make_train_step(skeleton, token_loss, optimizer, in_backward="two_sweeps", on_trouble="warn")
    state = init_state(split(Two(nnx.Rngs(0)))[1], optimizer, jax.random.key(0), loss_scale=True)
    step = make_train_step(split(Two(nnx.Rngs(0)))[0], token_loss, optimizer, in_backward="one_sweep")
    with pytest.raises(ValueError, match="A loss scale that is too large is known too late"):
        step(state, rows(0))
    with pytest.raises(ValueError, match="The model has no reversible stack"):
        make_train_step(split(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))[0], token_loss, optimizer, in_backward="one_sweep")
    with pytest.raises(ValueError, match="depends on the name of their stack"):
        make_train_step(split(Named(nnx.Rngs(0)))[0], token_loss, optimizer, in_backward="one_sweep")
    with pytest.raises(ValueError, match=r"each element by itself \(adamw, lion, sgd\), but got 'muon'"):
        OptimizerConfig(name="muon", in_backward="one_sweep")


def halve(params, state, grads):
    return jax.tree.map(lambda p, g: p - 0.125 * g, params, grads), state + 1


def test_layers_of_a_module_are_updated_by_a_function_of_ones_own():
    model = Decoder(CONFIG, rngs=nnx.Rngs(0))
    loss = lambda model: jnp.divide(*token_loss(model, rows(0), None))
    states = {"stack": tuple(tuple(jnp.zeros(n) for _ in run) for run, n in zip(model.stack.runs, model.stack.lengths))}
    found = jax.jit(value_and_update(loss, halve))(model, states)
    ((value, report), grads, layers, states), ((expected, _), all_grads) = found, jax.jit(value_and_grad(loss))(model)
    assert value == expected and report.canary == 0 and all((x == 1).all() for x in jax.tree.leaves(states))
    old, all_grads = (dict(nnx.to_flat_state(s)) for s in (nnx.state(model, nnx.Param), all_grads))
    layers, grads = dict(nnx.to_flat_state(layers)), dict(nnx.to_flat_state(grads))
    assert layers.keys() | grads.keys() == old.keys() and {path[0] for path in layers} == {"stack"}
    assert all((grads[path][...] == all_grads[path][...]).all() for path in grads)
    assert all((layers[p][...] == old[p][...] - 0.125 * all_grads[p][...]).all() for p in layers)


def test_losses_whose_layers_cannot_be_updated_on_the_way_are_refused():
    model = Decoder(CONFIG, rngs=nnx.Rngs(0))
    loss = lambda model: jnp.divide(*token_loss(model, rows(0), None))
    states = {"stack": tuple(tuple(jnp.zeros(n) for _ in run) for run, n in zip(model.stack.runs, model.stack.lengths))}
    penalty = lambda model: sum(jnp.sum(x**2) for x in jax.tree.leaves(nnx.state(model.stack, nnx.Param)))
    with pytest.raises(TypeError, match="otherwise than by calling the stack"):
        value_and_update(lambda model: loss(model) + penalty(model), halve)(model, states)
    with pytest.raises(ValueError, match="only where the loss calls the stack once"):
        value_and_update(lambda model: loss(model) + loss(model), halve)(model, states)


class Two(nnx.Module):
    """Two stacks, the second of which reads the first."""

    def __init__(self, rngs):
        make = lambda rngs: nnx.Linear(8, 8, rngs=rngs)
        self.first = ReversibleStack(make, num_layers=2, rngs=rngs)
        self.second = ReversibleStack(make, num_layers=2, rngs=rngs)


class Named(nnx.Module):
    """A stack whose name says that nothing in it decays."""

    def __init__(self, rngs):
        self.embedding_stack = ReversibleStack(lambda rngs: nnx.Linear(8, 8, rngs=rngs), num_layers=2, rngs=rngs)


@pytest.mark.parametrize("first", [jax.lax.stop_gradient, jnp.zeros_like])
def test_a_stack_that_the_loss_does_not_depend_on_is_not_overwritten(first):
    """Its "gradients", the new values, would be zeros."""
    model, states = Two(nnx.Rngs(0)), {name: ((jnp.zeros(2),),) for name in ("first", "second")}
    loss = lambda model: jnp.mean(model.second(first(model.first(jnp.ones((2, 8))))) ** 2)
    with pytest.raises(ValueError, match="does not depend on first"):
        value_and_update(loss, halve)(model, states)


@pytest.mark.slow
def test_branches_without_adapters_have_nothing_to_update():
    config = dataclasses.replace(CONFIG, lora=LoRAConfig(rank=2, layers=("query",)))
    skeleton, values = split(Decoder(config, rngs=nnx.Rngs(0)))
    params, frozen = skeleton.divide(values)
    found = []
    for how in (None, "two_sweeps"):
        optimizer = make_optimizer(OptimizerConfig(warmup_steps=0), lambda step: 1e-2)
        state = init_state(params, optimizer, jax.random.key(7), frozen=frozen)
        found.append(jax.jit(make_train_step(skeleton, token_loss, optimizer, in_backward=how))(state, rows(0))[0])
    assert jax.tree.structure(found[0]) == jax.tree.structure(found[1])
    for a, b in zip(jax.tree.leaves(found[0].params), jax.tree.leaves(found[1].params), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)


def test_a_second_sweep_that_goes_wrong_by_itself_is_refused(monkeypatch):
    right, in_second = backward._wrong, []
    update = LayerUpdates.update

    def second(*args, **kwargs):
        in_second.append(True)
        return update(*args, **kwargs)

    monkeypatch.setattr(LayerUpdates, "update", second)
    monkeypatch.setattr(backward, "_wrong", lambda *args: right(*args) + (1.0 if in_second else 0.0))
    state, metrics, before = trained("two_sweeps", 1)
    assert metrics["canary"] > 0 and metrics["trouble"] and int(metrics["skipped"]) == 1
    assert same_bits(state.params, before.params) and same_bits(state.opt_state, before.opt_state)
