"""The bias of relative positions, and scores with a bias."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from revjax.nn import Attention, attention, relative_bias
from revjax.nn.relative import buckets_of


@pytest.mark.parametrize("causal", [False, True])
def test_the_bias_is_the_table_at_the_bucket_of_each_distance(causal):
    table = jax.random.normal(jax.random.key(0), (8, 3))
    bias = relative_bias(table, 9, 7, causal=causal, max_distance=16)
    buckets = buckets_of(8, causal=causal, max_distance=16)
    assert bias.shape == (1, 3, 9, 7)
    for t in range(9):
        for s in range(7):
            np.testing.assert_array_equal(bias[0, :, t, s], table[buckets[s - t + 16]])


def test_buckets_widen_with_distance():
    """T5's: half for each direction, half of these for single distances."""
    both, past = (buckets_of(32, causal=causal, max_distance=128) for causal in (False, True))
    assert [int(both[128 - d]) for d in (0, 1, 7, 8, 11, 12, 16, 127, 128)] == [0, 1, 7, 8, 8, 9, 10, 15, 15]
    assert [int(both[128 + d]) for d in (1, 7, 8, 128)] == [17, 23, 24, 31]
    assert [int(past[128 - d]) for d in (0, 15, 16, 128)] == [0, 15, 16, 31] and not past[129:].any()
    assert len(past) == len(both) == 257


@pytest.mark.parametrize(
    "num_buckets, max_distance, message",
    [(2, 16, "at least 4 buckets"), (7, 16, "an even number"), (32, 8, "max_distance must be above 8")],
)
def test_impossible_buckets_are_refused(num_buckets, max_distance, message):
    with pytest.raises(ValueError, match=message):
        buckets_of(num_buckets, causal=False, max_distance=max_distance)


def test_a_bias_is_added_to_scores_and_has_a_gradient():
    q, k, v = (jax.random.normal(jax.random.key(i), (2, 5, 2, 4)) for i in range(3))
    bias = jax.random.normal(jax.random.key(3), (1, 2, 5, 5))

    def plain(bias):
        s = jnp.einsum("btnh,bsnh->bnts", q, k) / 2 + jnp.broadcast_to(bias, (2, 2, 5, 5))
        s = jnp.where(jnp.tri(5, dtype=bool)[None, None], s, -jnp.inf)
        return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(s, -1), v)

    ours = lambda bias: attention(q, k, v, causal=True, bias_BNTS=bias)
    np.testing.assert_allclose(ours(bias), plain(bias), atol=1e-5)
    of = lambda f: jax.grad(lambda bias: jnp.sum(jnp.sin(f(bias))))(bias)
    np.testing.assert_allclose(of(ours), of(plain), atol=1e-5)
    with pytest.raises(ValueError, match="A bias needs all scores at once"):
        attention(q, k, v, bias_BNTS=bias, implementation="flash")


def test_dropout_of_scores_with_a_bias_is_replayed_by_its_key():
    q, k, v = (jax.random.normal(jax.random.key(i), (1, 64, 2, 4)) for i in range(3))
    bias = jnp.zeros((1, 2, 64, 64))
    run = lambda key: attention(q, k, v, bias_BNTS=bias, dropout=0.5, key=key)
    np.testing.assert_array_equal(run(jax.random.key(1)), run(jax.random.key(1)))
    assert jnp.any(run(jax.random.key(1)) != run(jax.random.key(2)))
    mean = jnp.mean(jnp.stack([run(jax.random.key(i)) for i in range(200)]), 0)
    np.testing.assert_allclose(mean, run(None), atol=0.15)


def test_segments_of_a_context():
    layer = Attention(8, 2, context_dim=6, dtype=jnp.float32, rngs=nnx.Rngs(0))
    x, context = jax.random.normal(jax.random.key(0), (1, 4, 8)), jax.random.normal(jax.random.key(1), (1, 5, 6))
    first = jnp.array([[1, 1, 1, 0, 0]])
    alone = layer(x, context=context[:, :3])
    np.testing.assert_allclose(layer(x, context=context, context_segment_ids=first), alone, atol=1e-5)
    mine = jnp.array([[1, 1, 0, 0]])
    both = layer(x, context=context, context_segment_ids=first, segment_ids=mine)
    np.testing.assert_allclose(both[:, :2], alone[:, :2], atol=1e-5)
    np.testing.assert_allclose(both[:, 2:], layer(x, context=context[:, 3:])[:, 2:], atol=1e-5)
    for more, message in [
        ({"context_segment_ids": first[:, :4]}, "must have the shape"),
        ({"segment_ids": mine}, "need context_segment_ids beside them"),
    ]:
        with pytest.raises(ValueError, match=message):
            layer(x, context=context, **more)
