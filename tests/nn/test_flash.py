"""Blockwise attention against its definition."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from revjax.nn import flash_attention, flash_attention_with_lse
from revjax.nn.blocks import Tiling

TOLERANCE = dict(rtol=2e-4, atol=2e-5)  # fp32, another order of summation

CASES = {
    "full, whole blocks": dict(T=32, S=48),
    "causal": dict(causal=True),
    "window": dict(window=5),
    "segments, one block": dict(segments=True, block_q=64, block_k=64),
    "causal, window, segments": dict(causal=True, window=9, segments=True),
    "more keys": dict(T=9, S=37),
    "more queries, scale": dict(T=37, S=9, causal=True, scale=0.9),
    "offset": dict(T=9, S=37, causal=True, q_offset=20),
    "offset, window": dict(T=9, S=37, causal=True, window=6, q_offset=28),
    "offset, nobody in the window": dict(T=9, S=37, causal=True, window=3, q_offset=60),
    "traced offset, window, dropout": dict(T=9, S=37, window=6, q_offset=jnp.int32(15), dropout=0.3),
    "offset before the keys": dict(T=20, S=20, causal=True, q_offset=-5),
    "one query": dict(T=1, S=37, causal=True, q_offset=30),
    "causal, window, segments, dropout": dict(causal=True, window=9, segments=True, dropout=0.3),
    "soft cap": dict(T=9, S=37, softcap=0.7),
    "soft cap, causal, window, segments, dropout": dict(causal=True, window=9, segments=True, dropout=0.3, softcap=0.7),
}
HEADS = {"multi-head": (4, 4), "grouped": (4, 2), "multi-query": (4, 1)}
EVERYTHING = "causal, window, segments, dropout"
CROSSED = [(case, "grouped") for case in CASES] + [(EVERYTHING, "multi-head"), (EVERYTHING, "multi-query")]


@pytest.mark.parametrize("case, heads", CROSSED)
def test_outputs_and_gradients_are_those_of_the_definition(case, heads):
    (q, k, v), options = inputs(*HEADS[heads], **CASES[case])
    keep = kept_entries(q, k, **options)
    do, dlse = normal(9, *q.shape), normal(10, *q.shape[:3]).swapaxes(1, 2)

    @functools.partial(jax.jit, static_argnums=0)
    def outputs_and_gradients(attend, q, k, v):
        (o, lse), vjp = jax.vjp(attend, q, k, v)
        return (o, lse), vjp((do, jnp.where(jnp.isfinite(lse), dlse, 0)))

    same(
        outputs_and_gradients(lambda *qkv: flash_attention_with_lse(*qkv, **options), q, k, v),
        outputs_and_gradients(lambda *qkv: definition(*qkv, keep, **options), q, k, v),
    )


def test_a_query_that_sees_no_key_gives_zeros_and_gradients_of_zero():
    (q, k, v), _ = inputs(2, 2, T=4, S=4)
    nobody = dict(q_segments_BT=jnp.ones((2, 4), int), k_segments_BS=jnp.zeros((2, 4), int))
    o, vjp = jax.vjp(lambda *qkv: flash_attention(*qkv, **nobody), q, k, v)
    for x in (o, *vjp(jnp.ones_like(o))):
        np.testing.assert_array_equal(x, 0)


def test_the_future_has_no_gradient_and_the_past_has():
    (q, k, v), _ = inputs(2, 2, T=21, S=21)
    t = 10
    dk, dv = jax.grad(lambda k, v: jnp.sum(flash_attention(q, k, v, causal=True, block_q=8, block_k=8)[:, t]), (0, 1))(
        k, v
    )
    assert not np.any(dk[:, t + 1 :]) and not np.any(dv[:, t + 1 :])
    assert np.all(np.any(dv[:, : t + 1], axis=(0, 2, 3)))


def test_a_future_nan_does_not_reach_the_past():
    (q, k, v), _ = inputs(2, 2, T=21, S=21)
    k, v = k.at[:, 16:].set(jnp.nan), v.at[:, 16:].set(jnp.nan)
    o = flash_attention(q, k, v, causal=True, block_q=8, block_k=8)
    assert np.all(np.isfinite(o[:, :16])) and not np.any(np.isfinite(o[:, 16:]))


def test_large_scores_do_not_overflow():
    (q, k, v), _ = inputs(2, 2, T=21, S=21)
    attend = jax.jit(functools.partial(flash_attention, causal=True, block_q=8, block_k=8))
    o, vjp = jax.vjp(attend, 1e3 * q, 1e3 * k, v)
    assert all(np.all(np.isfinite(x)) for x in (o, *vjp(o)))


def test_block_sizes_do_not_change_the_result():
    (q, k, v), _ = inputs(4, 2, T=37, S=29)
    results = [
        jax.jit(functools.partial(flash_attention, causal=True, block_q=block_q, block_k=block_k))(q, k, v)
        for block_q, block_k in ((None, None), (1, 64), (5, 7))
    ]
    same(results[1:], [results[0]] * 2)


@pytest.mark.parametrize("wrap", ["vmap", "scan", "map", "checkpoint"])
def test_transformations_do_not_change_outputs_or_gradients(wrap):
    (q, k, v), _ = inputs(4, 2, T=17, S=17)
    attend = functools.partial(flash_attention, causal=True, block_q=8, block_k=8)
    one_by_one = lambda qkv: attend(*(x[None] for x in qkv))[0]
    wrapped = {
        "vmap": jax.vmap(one_by_one),
        "scan": lambda qkv: jax.lax.scan(lambda c, qkv: (c, one_by_one(qkv)), 0, qkv)[1],
        "map": lambda qkv: jax.lax.map(one_by_one, qkv),
        "checkpoint": jax.checkpoint(lambda qkv: attend(*qkv)),
    }[wrap]
    loss = lambda attend, qkv: jnp.sum(jnp.sin(attend(qkv)))
    value_and_grad = lambda attend: jax.jit(jax.value_and_grad(functools.partial(loss, attend)))((q, k, v))
    same(value_and_grad(wrapped), value_and_grad(lambda qkv: attend(*qkv)))


def test_vmap_over_traced_offsets():
    (q, k, v), _ = inputs(2, 2, T=5, S=33)
    attend = jax.jit(lambda offset: flash_attention(q, k, v, causal=True, q_offset=offset, block_q=4, block_k=8))
    offsets = jnp.array([0, 13, 28])
    same(jax.jit(jax.vmap(attend))(offsets), jnp.stack([attend(offset) for offset in offsets]))


def test_only_inputs_output_and_lse_are_kept_for_backward():
    (q, k, v), _ = inputs(4, 2, T=64, S=64)
    o, vjp = jax.vjp(flash_attention, q, k, v)
    kept = sum(x.size for x in jax.tree.leaves(vjp) if hasattr(x, "size"))
    assert kept == q.size + k.size + v.size + o.size + q.size // q.shape[-1]


def test_causal_attention_runs_only_blocks_that_somebody_sees():
    tiling = Tiling(num_queries=80, num_keys=80, block_q=10, block_k=10, causal=True, window=None, offset=0)
    assert len(tiling.pairs()) == 8 * 9 // 2
    tiling = Tiling(num_queries=80, num_keys=80, block_q=10, block_k=10, causal=True, window=10, offset=0)
    assert len(tiling.pairs()) == 8 + 7
    tiling = Tiling(num_queries=80, num_keys=80, block_q=10, block_k=10, causal=True, window=None, offset=None)
    assert len(tiling.pairs()) == 64


@pytest.mark.optimized
@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("length", [64, 600])
def test_bf16_bits_are_the_same_alone_and_beside_the_gradient(length, dropout):
    make = lambda seed: normal(seed, 1, length, 4, 32).astype(jnp.bfloat16)
    q, k, v, do = make(0), make(1), make(2), make(3)
    attend = lambda q, k, v: flash_attention(q, k, v, causal=True, dropout=dropout, key=jax.random.key(1, impl="rbg"))
    alone = jax.jit(attend)(q, k, v)

    @jax.jit
    def beside(q, k, v, do):
        o, vjp = jax.vjp(attend, q, k, v)
        return o, jax.tree.map(jnp.sum, vjp(do))

    @jax.jit
    def in_a_larger_program(q, k, v, do):
        o, vjp = jax.vjp(lambda q, k, v: attend(jnp.tanh(q), k, 2 * v), q, k, v)
        return o, vjp(jnp.sin(o) + do)

    np.testing.assert_array_equal(bits(alone), bits(beside(q, k, v, do)[0]))
    larger = jax.jit(lambda q, k, v: attend(jnp.tanh(q), k, 2 * v))(q, k, v)
    np.testing.assert_array_equal(bits(larger), bits(in_a_larger_program(q, k, v, do)[0]))


def test_bf16_is_as_near_to_fp32_as_the_definition_in_bf16():
    (q, k, v), _ = inputs(4, 2, T=64, S=64)
    low = tuple(x.astype(jnp.bfloat16) for x in (q, k, v))
    exact, _ = definition(*(x.astype(jnp.float32) for x in low), 1.0)
    error = jnp.abs(flash_attention(*low, block_q=16, block_k=16).astype(jnp.float32) - exact).max()
    assert error < 2**-7 * jnp.abs(exact).max()


def test_fp64_gradients_are_finite_differences():
    with jax.enable_x64(True):
        (q, k, v), options = inputs(2, 1, T=5, S=5, causal=True)
        q, k, v = (x.astype(jnp.float64) for x in (q, k, v))
        check_grads(jax.jit(lambda *qkv: flash_attention(*qkv, **options)), (q, k, v), order=1, modes=["rev"])


def flash_gradient_bytes(attend, length):
    """XLA's temporary bytes of the gradient; nothing is run."""
    x = jax.ShapeDtypeStruct((1, length, 4, 32), jnp.bfloat16)
    grad = jax.grad(lambda q, k, v: jnp.sum(attend(q, k, v).astype(jnp.float32)), (0, 1, 2))
    return jax.jit(grad).lower(x, x, x).compile().memory_analysis().temp_size_in_bytes


def test_memory_of_the_gradient_is_linear_in_length():
    attend = functools.partial(flash_attention, causal=True)
    short, middle, long = (flash_gradient_bytes(attend, n) for n in (4096, 8192, 16384))
    assert middle <= 2 * short and long <= 2 * middle
    assert long < 4 * 16384 * 4 * 32 * 40  # bytes per element of q: far from 16384**2


def test_checkpointed_layers_keep_no_masks():
    """jax.checkpoint keeps what does not depend on a layer's input: masks of all pairs of blocks would be T * S / 2."""
    plain = functools.partial(flash_attention, causal=True, block_q=64, block_k=64)
    layer = jax.checkpoint(lambda x, _: (x + plain(x, x, x), None))
    layers = lambda q, k, v: jax.lax.scan(layer, q + k + v, None, length=2)[0]
    short, long = (flash_gradient_bytes(layers, length) for length in (1024, 4096))
    assert long < 4.2 * short


def test_the_memory_test_can_fail():
    attend = functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation="xla")
    short, middle, long = (flash_gradient_bytes(attend, n) for n in (4096, 8192, 16384))
    assert middle > 3.5 * short and long > 3.5 * middle


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(k=(2, 8, 3, 4), v=(2, 8, 3, 4)), "N a multiple of K"),
        (dict(v=(2, 7, 2, 4)), r"v \(2, 7, 2, 4\)"),
        (dict(window=0), "window must be at least 1"),
        (dict(dropout=1.0), "below 1"),
        (dict(softcap=0.0), "softcap must be positive"),
        (dict(block_q=0), "block_q must be at least 1"),
        (dict(q_segments_BT=jnp.zeros((2, 8), int)), "both sides"),
        (dict(q_segments_BT=jnp.zeros((2, 8), int), k_segments_BS=jnp.zeros((2, 9), int)), "shapes"),
    ],
)
def test_mistakes_are_named(change, message):
    shapes = dict(q=(2, 8, 4, 4), k=(2, 8, 2, 4), v=(2, 8, 2, 4))
    arrays = [jnp.ones(change.pop(name, shape)) for name, shape in shapes.items()]
    with pytest.raises(ValueError, match=message):
        flash_attention(*arrays, **change)


def test_mixed_dtypes_are_an_error():
    x = jnp.ones((1, 4, 2, 4))
    with pytest.raises(TypeError, match="one dtype"):
        flash_attention(x, x.astype(jnp.bfloat16), x)


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def inputs(num_heads, num_kv_heads, *, T=37, S=37, segments=False, **options):
    q, k, v = normal(0, 2, T, num_heads, 8), normal(1, 2, S, num_kv_heads, 8), normal(2, 2, S, num_kv_heads, 8)
    options = dict(block_q=16, block_k=8) | options
    if segments:
        options["q_segments_BT"] = jnp.sort(jax.random.randint(jax.random.key(4), (2, T), 0, 3), axis=1)
        options["k_segments_BS"] = options["q_segments_BT"]
    if options.get("dropout"):
        options["key"] = jax.random.key(7, impl="rbg")  # compiles faster
    return (q, k, v), options


def kept_entries(q, k, *, dropout=0.0, **options):
    """The dropout mask (B, N, T, S) over 1 - rate, read off the kernel: with v the identity, o is the softmax."""
    if not dropout:
        return 1.0
    S = k.shape[1]
    identity = jnp.broadcast_to(jnp.eye(S)[None, :, None, :], (k.shape[0], S, k.shape[2], S))
    probabilities = jax.jit(
        lambda q, k, rate: flash_attention(q, k, identity, dropout=rate, **options), static_argnums=2
    )
    o = probabilities(q, k, dropout)
    keep = jnp.where(o.transpose(0, 2, 1, 3) != 0, 1 / (1 - dropout), 0.0)
    share = float(jnp.sum(keep != 0) / jnp.sum(probabilities(q, k, 0.0) != 0))
    assert abs(share - (1 - dropout)) < 0.1
    return keep


def definition(
    q, k, v, keep, *, causal=False, window=None, q_offset=0, scale=None, softcap=None, dropout=0.0, **options
):
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    s = jnp.einsum("btnh,bsnh->bnts", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    s = s if softcap is None else softcap * jnp.tanh(s / softcap)
    t, u = q_offset + jnp.arange(q.shape[1])[:, None], jnp.arange(k.shape[1])[None, :]
    visible = jnp.full(s.shape, True)
    visible &= (u <= t)[None, None] if causal else True
    visible &= (abs(t - u) < window)[None, None] if window else True
    if options.get("q_segments_BT") is not None:
        visible &= (options["q_segments_BT"][:, :, None] == options["k_segments_BS"][:, None, :])[:, None]
    somebody = visible.any(axis=-1, keepdims=True)
    s = jnp.where(visible, s, -1e9)
    lse = jax.nn.logsumexp(s, axis=-1, keepdims=True)
    p = jnp.where(visible & somebody, jnp.exp(s - lse), 0)
    return jnp.einsum("bnts,bsnh->btnh", p * keep, v), jnp.where(somebody, lse, -jnp.inf)[..., 0]


def same(a, b):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **TOLERANCE), a, b)


def bits(x):
    return np.asarray(x).view(np.uint16)
