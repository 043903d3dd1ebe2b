"""Adapters of low rank: the model is frozen, its gradients are not computed, and what was learned can be merged."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from revjax.models import (
    Decoder,
    DecoderConfig,
    LoRAConfig,
    flops_per_token,
    merge_adapters,
    num_params,
    summary,
    value_and_grad,
    without_adapters,
)
from revjax.training import init_state, make_train_step, split, united

LORA = LoRAConfig(rank=3, alpha=6.0)
CONFIG = DecoderConfig(d_model=32, num_layers=3, num_heads=2, num_kv_heads=1, coupling="near-residual:1", lora=LORA)
FLOATS = dataclasses.replace(CONFIG, exact=False, dtype="float32")
TOKENS = jax.random.randint(jax.random.key(0), (2, 16), 0, 256)


def decoder(config: DecoderConfig, **how) -> Decoder:
    return nnx.jit(lambda: Decoder(config, **how, rngs=nnx.Rngs(0)))()


def trained(config: DecoderConfig, **how) -> Any:
    """A skeleton, and parameters whose adapters are not 0 any more."""
    skeleton, values = split(decoder(config, **how))
    params, frozen = skeleton.divide(values)
    return (
        skeleton,
        jax.tree.map(lambda p: p + 0.1 * jax.random.normal(jax.random.key(p.size), p.shape), params),
        frozen,
    )


@jax.jit
def gradient(model):
    return value_and_grad(lambda model: jnp.divide(*model.loss(TOKENS, TOKENS)))(model)


def test_adapters_change_nothing_at_first():
    plain = decoder(dataclasses.replace(CONFIG, lora=None))
    np.testing.assert_array_equal(jax.jit(lambda m: m(TOKENS))(decoder(CONFIG)), jax.jit(lambda m: m(TOKENS))(plain))


def test_gradients_are_those_of_the_adapters_alone_by_the_chain_rule():
    """y = x (W + s A B), so dA = s dW B^T and dB = s A^T dW."""
    skeleton, params, frozen = trained(FLOATS, plan="all")
    (_, report), grads = gradient(skeleton.merge(united(params, frozen)))
    assert report.unsafe == 0
    values = jax.tree.map(np.asarray, united(params, frozen))
    plain, _ = split(decoder(dataclasses.replace(FLOATS, lora=None), plan="all"))
    _, whole = gradient(plain.merge(merge_adapters(values, LORA)))
    found, whole = nnx.to_pure_dict(grads)["stack"]["runs"][0], nnx.to_pure_dict(whole)["stack"]["runs"][0]
    attention, mlp = ("query", "key", "value", "out"), ("gate", "up", "down")
    places = [(0, "attention", name) for name in attention] + [(1, "mlp", name) for name in mlp]
    assert len(jax.tree.leaves(grads)) == 2 * len(places)
    for i, module, name in places:
        adapter, dw = params["stack"]["runs"]["0"][str(i)][module][name]["adapter"], whole[i][module][name]["kernel"]
        length, rank = adapter["b"].shape[:2]
        a, b = adapter["a"].reshape(length, -1, rank), adapter["b"].reshape(length, rank, -1)
        dw = dw.reshape(length, a.shape[1], b.shape[2])
        wanted = {"a": dw @ b.swapaxes(1, 2), "b": a.swapaxes(1, 2) @ dw}
        for which, got in found[i][module][name]["adapter"].items():
            expected = LORA.scale * wanted[which]
            np.testing.assert_allclose(got.reshape(expected.shape), expected, atol=1e-5 * float(abs(expected).max()))


@pytest.mark.optimized
@pytest.mark.parametrize("coupling", [pytest.param("near-residual:1", marks=pytest.mark.slow), "bdia:1"])
def test_a_frozen_stack_is_rebuilt_to_the_bit(coupling):
    config = dataclasses.replace(CONFIG, coupling=coupling, num_layers=6, dropout=0.1)
    skeleton, params, frozen = trained(config)
    loss = lambda model: jnp.divide(*model.loss(TOKENS, TOKENS, key=jax.random.key(1)))
    found = jax.jit(value_and_grad(loss))(skeleton.merge(united(params, frozen)))
    stored, _ = split(decoder(config, plan="all"))
    wanted = jax.jit(value_and_grad(loss))(stored.merge(united(params, frozen)))
    assert found[0][1].canary == 0 and found[0][1].unsafe == 0
    assert all(map(np.array_equal, jax.tree.leaves(found[1]), jax.tree.leaves(wanted[1])))


def test_merged_parameters_are_the_same_network():
    skeleton, params, frozen = trained(FLOATS)
    values = jax.tree.map(np.asarray, united(params, frozen))
    plain, like = split(decoder(dataclasses.replace(FLOATS, lora=None)))
    merged = merge_adapters(values, LORA)
    assert jax.tree.structure(merged) == jax.tree.structure(like) == jax.tree.structure(without_adapters(values))
    logits = jax.jit(lambda m: m(TOKENS))
    expected = logits(skeleton.merge(values))
    np.testing.assert_allclose(logits(plain.merge(merged)), expected, atol=1e-5 * float(jnp.abs(expected).max()))
    assert float(jnp.abs(logits(plain.merge(without_adapters(values))) - expected).max()) > 0.1


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_step_trains_adapters_and_leaves_the_rest_to_the_bit(accumulation):
    skeleton, values = split(decoder(CONFIG))
    params, frozen = skeleton.divide(values)
    optimizer = optax.adamw(1e-2)
    state = init_state(params, optimizer, jax.random.key(0), frozen=frozen)
    loss: Any = lambda model, rows, key: model.loss(rows, rows, key=key)
    step = make_train_step(skeleton, loss, optimizer, accumulation=accumulation)
    compiled = jax.jit(step).lower(state, TOKENS).compile()
    losses, new = [], state
    for _ in range(20):
        new, metrics = compiled(new, TOKENS)
        losses.append(float(metrics["loss"]))
        assert metrics["canary"] == 0 and not metrics["trouble"]
    assert losses[-1] < 0.95 * losses[0]
    assert all(map(np.array_equal, jax.tree.leaves(new.frozen), jax.tree.leaves(frozen)))
    assert not any(map(np.array_equal, jax.tree.leaves(new.params), jax.tree.leaves(params)))
    bytes_of = lambda tree: sum(x.nbytes for x in jax.tree.leaves(tree))
    # Frozen parameters are given to the step, and are no constants of its program; they have no moments.
    analysis: Any = compiled.memory_analysis()
    assert analysis.argument_size_in_bytes >= bytes_of(state)
    assert bytes_of(state.opt_state) < 2.1 * bytes_of(params) < 0.5 * bytes_of(frozen)
    back = state.from_dict(new.as_dict())
    assert jax.tree.structure(back) == jax.tree.structure(state)


def test_counts_tell_what_is_trained():
    model = nnx.eval_shape(lambda: Decoder(CONFIG, rngs=nnx.Rngs(0)))
    plain = dataclasses.replace(CONFIG, lora=None)
    adapters = num_params(model, trained_only=True)
    assert num_params(model) == num_params(nnx.eval_shape(lambda: Decoder(plain, rngs=nnx.Rngs(0)))) + adapters
    # d_model 32, two heads of 16 and one for keys and values, an MLP that is gated and 96 wide
    pairs = [(32, 32), (32, 16), (32, 16), (32, 32), (32, 96), (32, 96), (96, 32)]
    assert adapters == 3 * 3 * sum(i + o for i, o in pairs)
    assert f"{adapters:,}" in summary(model)
    weights = 256 * 32 + 3 * sum(i * o for i, o in pairs)
    attention = flops_per_token(plain, 16) - 6 * weights
    assert flops_per_token(CONFIG, 16) == 4 * weights + 6 * adapters + attention


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(rank=0), "rank must be at least 1, but got 0"),
        (dict(alpha=0.0), "alpha must be above 0"),
        (dict(layers=("query", "keys")), "layers must be some of query, key, value, out, gate, up, down, but got keys"),
        (dict(layers=()), "but got none"),
    ],
)
def test_adapters_that_cannot_be_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        LoRAConfig(**wrong)
