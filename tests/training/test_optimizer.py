"""Optimizers and schedules are those of their papers; only matrices decay; one of the user's own is one function."""

import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from revjax.errors import ConfigError
from revjax.models import Decoder, DecoderConfig
from revjax.training import OptimizerConfig, make_optimizer, make_schedule, split
from revjax.training.optimizer import DIRECTIONS, is_decayed


def test_the_learning_rate_ramps_up_and_falls_as_a_cosine():
    config = OptimizerConfig(learning_rate=2.0, warmup_steps=4, final_fraction=0.1)
    schedule = make_schedule(config, total_steps=104)
    assert [float(schedule(t)) for t in range(4)] == pytest.approx([0.5, 1.0, 1.5, 2.0])
    for t in (4, 29, 54, 104, 1000):
        p = min((t - 4) / 100, 1)
        expected = 2.0 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * p)))
        assert float(schedule(t)) == pytest.approx(expected, rel=1e-5)


def test_no_warm_up_starts_at_the_peak():
    assert float(make_schedule(OptimizerConfig(learning_rate=0.5, warmup_steps=0), 10)(0)) == pytest.approx(0.5)


def test_two_updates_are_those_of_adamw():
    config = OptimizerConfig(learning_rate=0.1, warmup_steps=0, weight_decay=0.3, clip_norm=1.0, final_fraction=1.0)
    optimizer = make_optimizer(config, make_schedule(config, total_steps=10))
    w, g = np.array([[1.0, -2.0]]), np.array([[3.0, 4.0]])  # the norm of g is 5, so it is clipped to g / 5
    params, m, v = {"kernel": jnp.asarray(w, jnp.float32)}, 0.0, 0.0
    state = optimizer.init(params)
    for t in (1, 2):
        updates, state = optimizer.update({"kernel": jnp.asarray(g, jnp.float32)}, state, params)
        params = {"kernel": params["kernel"] + updates["kernel"]}
        m, v = 0.9 * m + 0.1 * g / 5, 0.95 * v + 0.05 * (g / 5) ** 2
        w = w - 0.1 * (m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.95**t)) + 1e-8) + 0.3 * w)
    np.testing.assert_allclose(params["kernel"], w, rtol=1e-5)


def lr(total_steps, t, **settings):
    return float(make_schedule(OptimizerConfig(learning_rate=1.0, warmup_steps=0, **settings), total_steps)(t))


def test_linear_wsd_and_constant_schedules():
    assert [lr(10, t, schedule="linear", final_fraction=0.2) for t in (0, 5, 10)] == pytest.approx([1, 0.6, 0.2])
    wsd = {"schedule": "wsd", "decay_steps": 4, "final_fraction": 0.0}
    assert [lr(20, t, **wsd) for t in (0, 16, 17, 18, 20, 30)] == pytest.approx([1, 1, 0.75, 0.5, 0, 0])
    assert lr(20, 18, schedule="wsd", final_fraction=0.0) == 1 and lr(20, 19, schedule="wsd", final_fraction=0.0) == 0.5
    assert [lr(10, t, schedule="constant", final_fraction=0.0) for t in (0, 10)] == [1, 1]


def test_durations_in_tokens_are_rounded_up_to_updates():
    config = OptimizerConfig(warmup_tokens=1001, decay_tokens=5000).in_steps(100)
    assert (config.warmup_steps, config.decay_steps) == (11, 50)
    assert OptimizerConfig(warmup_steps=7).in_steps(100).warmup_steps == 7


def two_updates(params, grads, **settings):
    config = OptimizerConfig(learning_rate=0.1, warmup_steps=0, schedule="constant", clip_norm=None, **settings)
    optimizer = make_optimizer(config, make_schedule(config, total_steps=10))
    state = optimizer.init(params)
    for g in grads:
        updates, state = optimizer.update(g, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def test_two_updates_are_those_of_lion():
    w, grads = np.array([[1.0, -2.0]]), [np.array([[3.0, -4.0]]), np.array([[-0.1, 1.0]])]
    tree = lambda x: {"kernel": jnp.asarray(x, jnp.float32)}
    new, _ = two_updates(tree(w), [tree(g) for g in grads], name="lion", b1=0.9, b2=0.99, weight_decay=0.3)
    m = 0.0
    for g in grads:
        w = w - 0.1 * (np.sign(0.9 * m + 0.1 * g) + 0.3 * w)
        m = 0.99 * m + 0.01 * g
    np.testing.assert_allclose(new["kernel"], w, rtol=1e-6)


def test_two_updates_are_those_of_sgd_with_momentum():
    w, g = np.array([[1.0, -2.0]]), np.array([[3.0, 4.0]])
    tree = lambda x: {"kernel": jnp.asarray(x, jnp.float32)}
    new, _ = two_updates(tree(w), [tree(g)] * 2, name="sgd", momentum=0.5, weight_decay=0.0)
    np.testing.assert_allclose(new["kernel"], w - 0.1 * g - 0.1 * 1.5 * g, rtol=1e-6)


def test_adafactor_keeps_a_row_and_a_column():
    params = {"kernel": jnp.ones((256, 128))}
    new, state = two_updates(params, [{"kernel": jnp.full((256, 128), 0.5)}], name="adafactor", weight_decay=0.0)
    kept = sum(x.size for x in jax.tree.leaves(state))
    assert kept < 256 + 128 + 8
    np.testing.assert_allclose(new["kernel"], 0.9, rtol=1e-3)  # sign-like at the first update: lr 0.1


@pytest.fixture(scope="module")
def decoder_params():
    config = DecoderConfig(d_model=32, num_layers=3, num_heads=4, num_kv_heads=2, use_bias=True, tie_embeddings=False)
    return split(nnx.jit(lambda: Decoder(config, rngs=nnx.Rngs(0)))())[1]


@pytest.mark.slow
def test_muon_makes_the_update_of_every_matrix_in_every_layer_orthogonal(decoder_params):
    keys = iter(jax.random.split(jax.random.key(0), 100))
    grads = jax.tree.map(lambda p: jax.random.normal(next(keys), p.shape), decoder_params)
    new, _ = two_updates(decoder_params, [grads], name="muon", weight_decay=0.0)
    updates = jax.tree.map(jnp.subtract, new, decoder_params)["stack"]["runs"]["0"]
    attention, mlp = updates["0"]["attention"], updates["1"]["mlp"]
    matrices = {
        "query": attention["query"]["kernel"].reshape(3, 32, 32),
        "value": attention["value"]["kernel"].reshape(3, 32, 16),
        "out": attention["out"]["kernel"].reshape(3, 32, 32),
        "down": mlp["down"]["kernel"],
    }
    for name, update_L in matrices.items():
        for update in update_L:  # one layer
            singular = np.linalg.svd(update, compute_uv=False) / (0.1 * 0.2 * max(update.shape) ** 0.5)
            assert 0.6 < singular.min() and singular.max() < 1.3, (name, singular)  # five Newton-Schulz iterations


def test_muon_leaves_embeddings_heads_and_vectors_to_adam(decoder_params):
    grads = jax.tree.map(lambda p: jnp.full(p.shape, 1e-3), decoder_params)
    new, _ = two_updates(decoder_params, [grads], name="muon", weight_decay=0.0)
    adam, _ = two_updates(decoder_params, [grads], name="adamw", weight_decay=0.0)
    for path in (("embedding", "table"), ("head", "kernel"), ("norm", "scale")):
        np.testing.assert_array_equal(new[path[0]][path[1]], adam[path[0]][path[1]])
    kernels = [x["stack"]["runs"]["0"]["1"]["mlp"]["up"] for x in (new, adam)]
    np.testing.assert_array_equal(kernels[0]["bias"], kernels[1]["bias"])
    assert not np.array_equal(kernels[0]["kernel"], kernels[1]["kernel"])


@pytest.mark.parametrize("name", ["adamw", "lion", "muon", "sgd"])
def test_mean_gradients_can_be_kept_in_bfloat16(name, decoder_params):
    config = OptimizerConfig(name=name, moment_dtype="bfloat16")
    state = make_optimizer(config, lambda t: 0.1).init(decoder_params)
    bytes_of = lambda dtype: sum(x.nbytes for x in jax.tree.leaves(state) if x.dtype == dtype)
    num_params = sum(x.size for x in jax.tree.leaves(decoder_params))
    assert bytes_of(jnp.bfloat16) == 2 * num_params


@pytest.mark.parametrize("name", DIRECTIONS)
def test_every_optimizer_lowers_a_loss(name):
    target = jax.random.normal(jax.random.key(0), (2, 8, 6))
    loss = lambda params: jnp.mean((params["runs"]["kernel"] - target) ** 2)
    params = {"runs": {"kernel": jnp.zeros((2, 8, 6))}}
    config = OptimizerConfig(name=name, learning_rate=0.1, warmup_steps=0, momentum=0.9, weight_decay=0.0)
    optimizer = make_optimizer(config, make_schedule(config, total_steps=100))

    @jax.jit
    def step(params, state):
        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    state, first = optimizer.init(params), float(loss(params))
    for _ in range(100):
        params, state = step(params, state)
    assert float(loss(params)) < 0.25 * first


def test_an_optimizer_and_a_schedule_of_the_users_own_are_one_function_each(tmp_path, monkeypatch):
    (tmp_path / "my_training.py").write_text(
        "import optax\n"
        "def optimizer(config, schedule): return optax.sgd(schedule)\n"
        "def halves(config, total_steps): return lambda t: config.learning_rate * 0.5**t\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    config = OptimizerConfig(name="my_training:optimizer", schedule="my_training:halves", learning_rate=8.0)
    schedule = make_schedule(config, 10)
    assert schedule(2) == 2
    optimizer = make_optimizer(config, schedule)
    params = {"w": jnp.ones(())}
    updates, _ = optimizer.update({"w": jnp.float32(0.5)}, optimizer.init(params), params)
    assert float(updates["w"]) == -4


@pytest.mark.parametrize(
    "name, message",
    [
        ("adam", "There is no optimizer 'adam'. Did you mean 'adamw'?.*package.module:function"),
        ("no_such_module:make", "cannot be imported: No module named 'no_such_module'"),
        ("math:sqr", "math has no function 'sqr'. Did you mean 'sqrt'"),
    ],
)
def test_an_unknown_optimizer_is_refused_with_what_to_write(name, message):
    with pytest.raises(ConfigError, match=message):
        make_optimizer(OptimizerConfig(name=name), lambda t: 1.0)


def test_norms_biases_embeddings_and_vectors_do_not_decay():
    matrix, vector = jnp.ones((2, 3)), jnp.ones(3)
    params = {
        "stack": {"norm": {"scale": matrix}, "mlp": {"kernel": matrix, "bias": matrix, "gain": vector}},
        "embedding": {"table": matrix},
        "head": {"kernel": matrix},
    }
    assert is_decayed(params) == {
        "stack": {"norm": {"scale": False}, "mlp": {"kernel": True, "bias": False, "gain": False}},
        "embedding": {"table": False},
        "head": {"kernel": True},
    }


@pytest.mark.parametrize(
    "field, value",
    [
        ("learning_rate", 0.0),
        ("learning_rate", float("nan")),
        ("warmup_steps", -1),
        ("final_fraction", 1.5),
        ("b2", 1.0),
        ("clip_norm", 0.0),
        ("weight_decay", -0.1),
    ],
)
def test_impossible_settings_are_refused_by_name(field, value):
    with pytest.raises(ValueError, match=field):
        OptimizerConfig(**{field: value})
