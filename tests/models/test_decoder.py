"""The decoder: right, causal, countable, deep."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import revjax
from revjax.memory import RIVALS, activation_memory, peak_flops, residual_loss
from revjax.models import PRESETS, flops_per_token, hardware_flops_per_token, num_params, summary

TINY = revjax.DecoderConfig(vocab_size=50, d_model=32, num_layers=3, num_heads=4, num_kv_heads=2, dtype="float32")
TOKENS = jax.random.randint(jax.random.key(0), (2, 24), 0, 50)
VARIANTS = {
    "rotary": TINY,
    "learned": dataclasses.replace(TINY, positions="learned", norm="layer", use_bias=True, tie_embeddings=False),
    "window": dataclasses.replace(TINY, window=5, qk_norm=True),
    "block": dataclasses.replace(
        TINY, granularity="block", coupling="midpoint:0.5", gated=False, activation="gelu", readout="mean"
    ),
    "near-residual": dataclasses.replace(TINY, coupling="near-residual:1"),
    "residual": dataclasses.replace(TINY, coupling="residual", exact=False),
    "last": dataclasses.replace(TINY, readout="last", second_stream="zero"),
    "learned read-out": dataclasses.replace(TINY, readout="learned", layer_scale=0.5),
    "concat": dataclasses.replace(TINY, readout="concat", second_stream="own", norm="layer"),
    "own coupling": dataclasses.replace(TINY, coupling="revjax.benchmarking.couplings:alternating"),
}


def make(config, **options):
    plan = "inputs" if config.coupling == "residual" else "nothing"
    return revjax.Decoder(config, plan=plan, rngs=nnx.Rngs(0), **options)


def mean_loss(model, tokens, **inputs):
    return jnp.divide(*model.loss(tokens[:, :-1], tokens[:, 1:], **inputs))


@pytest.mark.parametrize("name", VARIANTS)
def test_the_loss_is_that_of_the_logits(name):
    model = make(VARIANTS[name])
    expected = optax.softmax_cross_entropy_with_integer_labels(model(TOKENS[:, :-1]), TOKENS[:, 1:]).mean()
    np.testing.assert_allclose(mean_loss(model, TOKENS), expected, rtol=1e-5)


@pytest.mark.parametrize("name", VARIANTS)
def test_no_token_sees_a_later_one(name):
    run = jax.jit(make(VARIANTS[name]))
    seen = []
    for t in (0, 11):
        other = TOKENS.at[:, t + 1 :].set((TOKENS[:, t + 1 :] + 7) % 50)
        seen.append(jnp.array_equal(run(TOKENS)[:, : t + 1], run(other)[:, : t + 1]))
        assert not jnp.array_equal(run(TOKENS)[:, t + 1 :], run(other)[:, t + 1 :])
    assert all(seen)


@pytest.mark.parametrize("name", VARIANTS)
def test_cached_logits_equal_the_full_pass(name):
    """On float streams; on integers a last bit of f may move an element by a step of the grid."""
    config = dataclasses.replace(VARIANTS[name], exact=False)
    model = make(config)
    decode = jax.jit(lambda model, tokens, cache: model.decode(tokens, cache))
    logits, cache = decode(model, TOKENS[:, :13], model.init_cache(2, 24))
    parts = [logits]
    for t in range(13, 24):
        logits, cache = decode(model, TOKENS[:, t : t + 1], cache)
        parts.append(logits)
    np.testing.assert_allclose(jnp.concatenate(parts, 1), model(TOKENS), atol=2e-5)
    exact = make(VARIANTS[name])
    logits, _ = decode(exact, TOKENS, exact.init_cache(2, 24))
    np.testing.assert_allclose(logits, exact(TOKENS), atol=1e-3)


@pytest.mark.optimized
@pytest.mark.parametrize("name", [pytest.param("window", marks=pytest.mark.slow), "near-residual"])
def test_the_plan_attention_gives_the_same_bits_without_the_forward_kernel_in_the_backward_pass(name):
    config = dataclasses.replace(VARIANTS[name], dtype="bfloat16", attention_dropout=0.1, dropout=0.1)
    tokens = jax.random.randint(jax.random.key(1), (1, 513), 0, 50)  # several blocks: the kernel is a loop

    def run(plan):
        model = revjax.Decoder(config, plan=plan, rngs=nnx.Rngs(0))
        step = jax.jit(lambda model, tokens: revjax.value_and_grad(mean_loss)(model, tokens, key=jax.random.key(2)))
        with_blocks = step.lower(model, tokens).compile()
        return with_blocks(model, tokens), with_blocks.as_text().count(" while(")

    ((nothing, report), gradient), loops = run("nothing")
    ((attention, kept_report), kept_gradient), kept_loops = run("attention")
    assert attention == nothing and report.canary == kept_report.canary == 0
    jax.tree.map(np.testing.assert_array_equal, nnx.state(gradient), nnx.state(kept_gradient))
    assert kept_loops < loops


def rms_norm(x):
    return x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6)


READOUTS = {  # of two streams, with a and c the learned factors
    "mean": lambda x, y, a, c: rms_norm((x + y) / 2),
    "last": lambda x, y, a, c: rms_norm(y),
    "learned": lambda x, y, a, c: rms_norm(a[None, None] * x + c[None, None] * y),
    "concat": lambda x, y, a, c: (lambda both: both[..., :32] + both[..., 32:])(rms_norm(jnp.concatenate([x, y], -1))),
}


@pytest.mark.parametrize("readout", READOUTS)
def test_the_head_reads_what_the_read_out_says(readout):
    model = make(dataclasses.replace(TINY, readout=readout))
    a, c = jax.random.normal(jax.random.key(1), (2, 32))
    if readout == "learned":
        model.readout_scale[...] = jnp.stack([a, c])
    x = model.embedding.encode(TOKENS)
    streams = model.stack.scan((x, x)).streams
    assert not jnp.array_equal(*streams)
    np.testing.assert_allclose(model.hidden(TOKENS), READOUTS[readout](*streams, a, c), atol=1e-5)


@pytest.mark.parametrize(
    "coupling, readout",
    [("revnet", "concat"), ("momentum:0.5", "concat"), ("near-residual:2", "last"), ("bdia:1", "last")]
    + [("residual", "last"), ("revjax.benchmarking.couplings:alternating", "concat")],
)
def test_the_read_out_is_the_best_measured_or_one_that_an_ordinary_head_fits(coupling, readout):
    config = dataclasses.replace(TINY, coupling=coupling)
    assert config.resolved_readout == make(config).readout == readout
    assert dataclasses.replace(TINY, readout="mean").resolved_readout == "mean"


@pytest.mark.parametrize("second_stream", ["copy", "zero", "own"])
def test_the_second_stream_begins_as_is_said(second_stream):
    model = make(dataclasses.replace(TINY, second_stream=second_stream))
    x = model.embedding.encode(TOKENS)
    own = model.second_embedding.encode(TOKENS) if model.second_embedding is not None else None
    begins = {"copy": x, "zero": 0 * x, "own": own}[second_stream]
    np.testing.assert_array_equal(model.hidden(TOKENS), model.read_out(*model.stack.scan((begins, x)).streams))
    assert ("second embedding" in summary(model)) == (second_stream == "own")


def test_a_layer_scale_is_a_learned_factor_of_each_increment():
    plain, scaled, halved = (make(dataclasses.replace(TINY, layer_scale=s)) for s in (None, 1.0, 0.5))
    np.testing.assert_array_equal(plain(TOKENS), scaled(TOKENS))
    assert not jnp.allclose(plain(TOKENS), halved(TOKENS), atol=1e-3)
    grads = revjax.value_and_grad(lambda m: mean_loss(m, TOKENS))(scaled)[1]
    assert all(jnp.abs(branch["scale"][...]).min() > 0 for branch in grads["stack"]["runs"][0].values())


@pytest.mark.optimized
@pytest.mark.parametrize("name", [pytest.param("learned read-out", marks=pytest.mark.slow), "concat", "own coupling"])
def test_every_setting_of_the_streams_is_rebuilt_to_the_bit(name):
    model = make(dataclasses.replace(VARIANTS[name], dtype="bfloat16", dropout=0.1, num_layers=8))
    key = jax.random.key(2)
    (_, report), grads = jax.jit(revjax.value_and_grad(lambda m: mean_loss(m, TOKENS, key=key)))(model)
    stored = revjax.Decoder(model.config, plan="all", rngs=nnx.Rngs(0))
    _, expected = jax.jit(revjax.value_and_grad(lambda m: mean_loss(m, TOKENS, key=key)))(stored)
    assert report.canary == report.unsafe == 0
    jax.tree.map(np.testing.assert_array_equal, grads, expected)


@pytest.mark.parametrize("coupling", ["residual", "bdia:1"])
@pytest.mark.parametrize("setting", [{"readout": "mean"}, {"readout": "concat"}, {"second_stream": "zero"}])
def test_one_stream_has_no_second_to_read_or_to_begin(coupling, setting):
    with pytest.raises(ValueError, match="ordinary network, which has one stream: readout must be auto or last"):
        dataclasses.replace(TINY, coupling=coupling, **setting)


def test_packed_documents_do_not_see_each_other():
    segments = jnp.broadcast_to(jnp.arange(24) // 12, (2, 24))
    positions = jnp.broadcast_to(jnp.arange(24) % 12, (2, 24))
    other = TOKENS.at[:, :12].set((TOKENS[:, :12] + 7) % 50)
    packed = jax.jit(lambda model, tokens: model.hidden(tokens, segment_ids=segments, positions=positions))
    exact = make(TINY)
    np.testing.assert_array_equal(packed(exact, TOKENS)[:, 12:], packed(exact, other)[:, 12:])
    # Alone, a document is another program, and what it rounds otherwise moves an exact stream by a step of its grid,
    # which the last norm makes large where streams are small. Floats have no grid.
    floats = make(dataclasses.replace(TINY, exact=False))
    alone = jax.jit(lambda model, tokens: model.hidden(tokens))(floats, TOKENS[:, 12:])
    np.testing.assert_allclose(packed(floats, TOKENS)[:, 12:], alone, atol=1e-5)


@pytest.mark.optimized
@pytest.mark.parametrize("name", ["rotary", "block", "near-residual"])
def test_gradients_of_the_whole_decoder_equal_the_stored_run(name):
    """fp32, dropout and stochastic depth on: within 1e-6, relative, of the run that stores everything."""
    config = dataclasses.replace(VARIANTS[name], dropout=0.1, stochastic_depth=0.1, attention_dropout=0.1)
    loss = lambda model: mean_loss(model, TOKENS, key=jax.random.key(1))
    grads = {}
    for plan in ("nothing", "all"):
        model = revjax.Decoder(config, plan=plan, rngs=nnx.Rngs(0))
        (value, report), gradient = jax.jit(lambda model: revjax.value_and_grad(loss)(model))(model)
        assert report.canary == 0 and report.unsafe == 0
        grads[plan] = value, jnp.concatenate([jnp.ravel(a) for a in jax.tree.leaves(gradient)])
    assert grads["nothing"][0] == grads["all"][0]
    assert jnp.linalg.norm(grads["nothing"][1] - grads["all"][1]) <= 1e-6 * jnp.linalg.norm(grads["all"][1])


@pytest.mark.slow
def test_the_rivals_are_the_same_network_as_the_ordinary_residual_coupling():
    model = make(VARIANTS["residual"])
    expected, gradient = jax.value_and_grad(mean_loss)(model, TOKENS)
    for rival in RIVALS:
        of_rival = jax.value_and_grad(
            lambda model, rival=rival: residual_loss(model, TOKENS[:, :-1], TOKENS[:, 1:], rival)
        )
        value, gradient_of_rival = of_rival(model)
        np.testing.assert_allclose(value, expected, rtol=1e-6)
        close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6)
        jax.tree.map(close, nnx.state(gradient_of_rival, nnx.Param), nnx.state(gradient, nnx.Param))


def test_memory_of_the_whole_decoder_is_flat_in_depth_and_the_rivals_is_not():
    config = dataclasses.replace(TINY, d_model=64, dtype="bfloat16")
    shallow = activation_memory(dataclasses.replace(config, num_layers=8), 2, 128)
    deep = activation_memory(dataclasses.replace(config, num_layers=64), 2, 128)
    assert deep["reversible"] <= 1.02 * shallow["reversible"]
    assert deep["checkpoint"] > 1.5 * shallow["checkpoint"]
    assert deep["stored"] > 5 * shallow["stored"]


def test_parameters_and_flops_are_counted():
    model = make(TINY)
    d, f, v, h, k = 32, TINY.mlp_width, 50, 32, 16
    weights = 3 * (2 * d * h + 2 * d * k + 3 * d * f)
    assert num_params(model) == v * d + weights + 3 * 2 * d + 2 * d  # both streams are normed
    assert flops_per_token(TINY, 100) == 6 * (weights + v * d) + 12 * 3 * h * 50
    assert hardware_flops_per_token(TINY, 100, "all") == flops_per_token(TINY, 100)
    assert hardware_flops_per_token(TINY, 100, "attention") == 8 * weights + 6 * v * d + 12 * 3 * h * 50
    assert hardware_flops_per_token(TINY, 100, "nothing") == 8 * weights + 6 * v * d + 16 * 3 * h * 50
    assert f"{num_params(model):,}" in summary(model) and "4 heads of 8, 2 kv heads" in summary(model)


@pytest.mark.parametrize(
    "kind, dtype, tera",
    [
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989),
        ("NVIDIA H100 PCIe", "float16", 756),
        ("TPU v5 lite", "bfloat16", 197),
        ("TPU v5p", "bfloat16", 459),
        ("NVIDIA H100 80GB HBM3", "float32", None),
        ("cpu", "bfloat16", None),
    ],
)
def test_the_peak_of_a_device_is_its_makers_figure(kind, dtype, tera):
    assert peak_flops(kind, dtype) == (tera and tera * 1e12)


def test_projections_into_the_stream_start_smaller_with_depth():
    std = lambda n: float(make(dataclasses.replace(TINY, num_layers=n)).stack.runs[0][1].mlp.down.kernel[...].std())
    assert abs(std(2) / std(32) - 4) < 0.4


@pytest.mark.slow
@pytest.mark.optimized
def test_96_layers_train():
    config = dataclasses.replace(TINY, num_layers=96, num_kv_heads=None, dtype="bfloat16")
    model = revjax.Decoder(config, rngs=nnx.Rngs(0))
    optimizer = optax.adam(optax.linear_schedule(0.0, 3e-3, 10))
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    @jax.jit
    def step(params, state):
        loss = lambda model: mean_loss(model, TOKENS)
        (value, report), grads = revjax.value_and_grad(loss)(nnx.merge(graphdef, params, rest))
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value, report.canary + report.unsafe

    state, values = optimizer.init(params), []
    for _ in range(60):
        params, state, value, trouble = step(params, state)
        values.append(float(value))
        assert trouble == 0
    assert values[-1] < 0.7 * values[0]


@pytest.mark.parametrize("name", PRESETS)
def test_presets_build_without_allocating(name):
    model = nnx.eval_shape(lambda: revjax.Decoder(revjax.preset(name), rngs=nnx.Rngs(0)))
    assert num_params(model) > 1e6
    if name == "decoder-1b":
        assert 0.9e9 < num_params(model) < 1.2e9


def test_an_unknown_preset_names_the_nearest():
    with pytest.raises(ValueError, match="Did you mean 'decoder-tiny'"):
        revjax.preset("decoder-tinny")


@pytest.mark.parametrize(
    "wrong, message",
    [
        (dict(num_heads=5), "num_heads must divide d_model.*Try num_heads=4"),
        (dict(num_kv_heads=3), "num_kv_heads must divide num_heads.*Try num_kv_heads=2"),
        (dict(window=0), "window must be at least 1"),
        (dict(num_layers=0), "num_layers must be at least 1"),
        (dict(dropout=1.0), "dropout must be at least 0 and below 1"),
        (dict(num_heads=32, num_kv_heads=None), "head_dim must be even, but got 1"),
        (dict(coupling="revnett"), "A coupling is one of"),
        (dict(d_model=36, num_heads=2, coupling="near-residual:1"), "must be a multiple of 8, but got 36"),
    ],
)
def test_impossible_shapes_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **wrong)


@pytest.mark.optimized
@pytest.mark.parametrize("dtype, param_dtype", [("float16", "float32"), ("bfloat16", "bfloat16")])
def test_half_precision_and_low_precision_parameters_are_exact_and_near_fp32(dtype, param_dtype):
    """Near: as far from fp32, with the same parameters, as a few roundings of the dtype."""
    model = make(dataclasses.replace(TINY, dtype=dtype, param_dtype=param_dtype, dropout=0.1))
    assert {p.dtype for p in jax.tree.leaves(nnx.state(model, nnx.Param))} == {jnp.dtype(param_dtype)}
    fp32 = make(dataclasses.replace(TINY, dropout=0.1))
    nnx.update(fp32, jax.tree.map(lambda p: p.astype(jnp.float32), nnx.state(model, nnx.Param)))
    loss = lambda model, scale: scale * mean_loss(model, TOKENS, key=jax.random.key(1))
    (value, report), grads = jax.jit(revjax.value_and_grad(loss))(model, 1024.0)  # float16 gradients vanish otherwise
    assert report.canary == 0 and report.unsafe == 0
    assert {g.dtype for g in jax.tree.leaves(grads)} == {jnp.dtype(param_dtype)}
    (expected, _), wanted = jax.jit(revjax.value_and_grad(loss))(fp32, 1024.0)
    assert float(value) == pytest.approx(float(expected), rel=1e-3)
    flat = lambda tree: np.concatenate([np.ravel(x.astype(jnp.float32)) for x in jax.tree.leaves(tree)])
    difference = np.linalg.norm(flat(grads) - flat(wanted)) / np.linalg.norm(flat(wanted))
    assert 0 < difference < 8 * float(jnp.finfo(dtype).eps)


def test_z_loss_is_added_to_every_token():
    model, z = make(TINY), 1e-2
    logits = model(TOKENS[:, :-1])
    expected = jnp.sum(z * jax.nn.logsumexp(logits, axis=-1) ** 2)
    with_z, without = (model.loss(TOKENS[:, :-1], TOKENS[:, 1:], z_loss=x)[0] for x in (z, 0.0))
    assert float(with_z - without) == pytest.approx(float(expected), rel=1e-3)
