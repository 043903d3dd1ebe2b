"""AdamW with a warm-up and a cosine; only matrices decay."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from revjax.training import OptimizerConfig, make_optimizer, make_schedule
from revjax.training.optimizer import is_decayed


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
    optimizer = make_optimizer(config, total_steps=10)
    w, g = np.array([[1.0, -2.0]]), np.array([[3.0, 4.0]])  # the norm of g is 5, so it is clipped to g / 5
    params, m, v = {"kernel": jnp.asarray(w, jnp.float32)}, 0.0, 0.0
    state = optimizer.init(params)
    for t in (1, 2):
        updates, state = optimizer.update({"kernel": jnp.asarray(g, jnp.float32)}, state, params)
        params = {"kernel": params["kernel"] + updates["kernel"]}
        m, v = 0.9 * m + 0.1 * g / 5, 0.95 * v + 0.05 * (g / 5) ** 2
        w = w - 0.1 * (m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.95**t)) + 1e-8) + 0.3 * w)
    np.testing.assert_allclose(params["kernel"], w, rtol=1e-5)


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
