"""Encoder, vision transformer and encoder-decoder: right, exact, flat in depth, and refused where they cannot work."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import revjax
from revjax.memory import activation_memory, as_residual
from revjax.models import (
    Encoder,
    EncoderConfig,
    EncoderDecoder,
    EncoderDecoderConfig,
    VisionConfig,
    VisionTransformer,
    flops_per_token,
    hardware_flops_per_token,
    loss_of,
    make_model,
    num_params,
    summary,
)
from revjax.models.masking import mask_tokens
from revjax.models.transformer_config import post_norm_growth

SMALL = dict(d_model=16, num_layers=2, num_heads=2, dtype="float32")
TEXT = SMALL | dict(vocab_size=40)
CONFIGS = {
    "encoder": EncoderConfig(**TEXT, token_kinds=2),
    "encoder, post-norm": EncoderConfig(
        **TEXT, norm_placement="post", coupling="near-residual:4", positions="learned", max_length=32, pooler=True
    ),
    "encoder, blocks": EncoderConfig(**TEXT, granularity="block", coupling="midpoint:0.5", readout="concat"),
    "vision": VisionConfig(**SMALL, image_size=8, patch_size=4, channels=3, num_classes=5),
    "vision, mean": VisionConfig(**SMALL, image_size=8, patch_size=4, channels=1, pooling="mean", coupling="bdia:4"),
    "encoder-decoder": EncoderDecoderConfig(**TEXT, num_decoder_layers=3),
    "encoder-decoder, relative": EncoderDecoderConfig(
        **TEXT, positions="relative", coupling="near-residual:4", relative_buckets=8, relative_max_distance=16
    ),
}
TOKENS = jax.random.randint(jax.random.key(0), (2, 13), 0, 38)


def without_grid(name):
    """Of float streams, to compare two programs: what they round otherwise moves an exact stream by a whole step."""
    return make(dataclasses.replace(CONFIGS[name], exact=False))


def make(config, plan=None):
    plan = plan or ("inputs" if config.coupling == "residual" else "nothing")
    return make_model(config, plan=plan, rngs=nnx.Rngs(0))


def batch_of(config):
    if not isinstance(config, VisionConfig):
        return {"tokens": TOKENS}
    size = (2, config.image_size, config.image_size, config.channels)
    images = jax.random.randint(jax.random.key(1), size, 0, 256).astype(jnp.uint8)
    return {"images": images, "labels": jnp.array([3, 1])}


def loss_on_batch(config, key=None):
    return lambda model: jnp.divide(*loss_of(config)(model, batch_of(config), key)[:2])


def flat(tree):
    return jnp.concatenate([jnp.ravel(a) for a in jax.tree.leaves(tree)])


QUICK = ("vision", "encoder-decoder, relative")


def by_time(names, quick=QUICK):
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


# Others are checked as configs, and how a vision transformer is pooled is not of its stack.
@pytest.mark.optimized
@pytest.mark.parametrize(
    "name", by_time(["encoder, post-norm", "encoder, blocks", "vision", "encoder-decoder, relative"], ["vision"])
)
def test_every_family_is_rebuilt_to_the_bit_and_has_the_gradients_of_the_stored_run(name):
    """bf16, with dropout and stochastic depth; also with respect to the context, and to tables that layers share."""
    config = dataclasses.replace(
        CONFIGS[name], dtype="bfloat16", num_layers=6, dropout=0.1, attention_dropout=0.1, stochastic_depth=0.1
    )
    loss = loss_on_batch(config, jax.random.key(2))
    run = jax.jit(revjax.value_and_grad(loss))
    (value, report), grads = run(make(config))
    (expected, _), stored = run(make(config, "all"))
    assert value == expected and report.canary == report.unsafe == 0 and report.max_abs > 0.5
    jax.tree.map(np.testing.assert_array_equal, grads, stored)
    still = [path for path, g in jax.tree.leaves_with_path(grads) if not jnp.any(g)]
    allowed = ("kinds", "pooler")  # one kind of tokens was there, and nothing was pooled
    assert [p for p in still if not any(n in jax.tree_util.keystr(p) for n in allowed)] == []


@pytest.mark.parametrize("name", by_time(["encoder, post-norm", "vision", "encoder-decoder, relative"], ["vision"]))
def test_the_rival_of_each_family_is_the_ordinary_network(name):
    config = dataclasses.replace(CONFIGS[name], coupling="residual", exact=False)
    model = make(config)
    expected, gradient = jax.jit(jax.value_and_grad(loss_on_batch(config)))(model)

    def rival(model):
        return loss_on_batch(config)(as_residual(nnx.merge(*nnx.split(model)), "checkpoint"))

    value, of_rival = jax.jit(jax.value_and_grad(rival))(model)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6)
    jax.tree.map(close, nnx.state(of_rival, nnx.Param), nnx.state(gradient, nnx.Param))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["encoder, post-norm", "encoder-decoder"])
def test_memory_is_flat_in_depth_and_the_rivals_is_not(name):
    config = dataclasses.replace(CONFIGS[name], d_model=64, dtype="bfloat16", coupling="near-residual:4")
    if isinstance(config, EncoderDecoderConfig):
        config = dataclasses.replace(config, num_decoder_layers=None)
    if isinstance(config, EncoderConfig):
        config = dataclasses.replace(config, max_length=128)
    exact = dataclasses.replace(config, coupling="revnet", norm_placement="pre")
    shallow, deep = (activation_memory(dataclasses.replace(exact, num_layers=n), 4, 128) for n in (4, 48))
    assert deep["reversible"] <= 1.02 * shallow["reversible"]
    assert deep["checkpoint"] > 1.5 * shallow["checkpoint"]
    assert deep["stored"] > 3 * shallow["stored"]


# Encoder


@pytest.mark.parametrize("name", ["encoder", "encoder, post-norm"])
def test_a_token_of_an_encoder_sees_both_sides_of_its_segment_and_nothing_else(name):
    model = make(CONFIGS[name])
    segment_ids = jnp.array([[0] * 6 + [1] * 7] * 2)
    hidden = jax.jit(model.hidden)
    first, last = TOKENS.at[:, 0].add(1), TOKENS.at[:, 12].add(1)
    plain, apart = hidden(TOKENS), hidden(TOKENS, segment_ids=segment_ids)
    assert jnp.all(jnp.any(plain != hidden(first), -1)) and jnp.all(jnp.any(plain != hidden(last), -1))
    changed = jnp.any(apart != hidden(first, segment_ids=segment_ids), -1)
    np.testing.assert_array_equal(changed, segment_ids == 0)


def test_padding_changes_nothing_for_an_encoder():
    model = without_grid("encoder")
    is_text = jnp.arange(13)[None] < jnp.array([[13], [9]])
    padded = jnp.where(is_text, TOKENS, 7)
    vectors = model.sentence_embedding(padded, is_text)
    np.testing.assert_allclose(vectors[1:], model.sentence_embedding(TOKENS[1:, :9]), atol=1e-5)
    assert vectors.shape == (2, 16)


def test_kinds_and_pooler():
    model = make(CONFIGS["encoder"])
    assert jnp.any(model.hidden(TOKENS) != model.hidden(TOKENS, kinds_BT=jnp.ones_like(TOKENS)))
    pooled = make(CONFIGS["encoder, post-norm"])
    hidden = pooled.hidden(TOKENS)
    kernel, bias = pooled.pooler.kernel[...], pooled.pooler.bias[...]
    np.testing.assert_allclose(pooled.pooled(hidden), jnp.tanh(hidden[:, 0] @ kernel + bias[None]), rtol=1e-5)
    for call, message in [
        (lambda: model.pooled(hidden), "no pooler: build it with pooler=True"),
        (lambda: pooled.hidden(TOKENS, kinds_BT=TOKENS), "knows one kind of tokens"),
        (lambda: make(dataclasses.replace(CONFIGS["encoder"], head=False))(TOKENS), "no head"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


def test_the_loss_of_an_encoder_is_that_of_the_hidden_tokens():
    config = dataclasses.replace(CONFIGS["encoder"], mask_rate=0.3)
    model = make(config)
    total, count = model.loss(TOKENS)
    hidden, places = mask_tokens(TOKENS, jax.random.key(0), rate=0.3, mask_token=39, vocab_size=40)
    pick = lambda x: jnp.take_along_axis(x, places, axis=1)
    logits = jnp.take_along_axis(model(hidden), places[..., None], axis=1)
    expected = optax.softmax_cross_entropy_with_integer_labels(logits, pick(TOKENS)).sum()
    assert count == 2 * 4
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    assert model.loss(TOKENS)[0] == total != model.loss(TOKENS, key=jax.random.key(5))[0]


def test_masks_hide_what_they_should():
    tokens = jnp.broadcast_to(jnp.arange(1000) % 50, (8, 1000))
    hidden, places = mask_tokens(tokens, jax.random.key(1), rate=0.5, mask_token=99, vocab_size=50)
    assert places.shape == (8, 500) and all(len(set(row.tolist())) == 500 for row in places)
    there, now = (jnp.take_along_axis(x, places, axis=1) for x in (tokens, hidden))
    shares = [float(jnp.mean(x)) for x in (now == 99, (now != 99) & (now != there), now == there)]
    np.testing.assert_allclose(shares, [0.8, 0.1 * 49 / 50, 0.1 + 0.1 / 50], atol=0.03)
    others = jnp.ones((8, 1000), bool).at[jnp.arange(8)[:, None], places].set(False)
    assert jnp.all(jnp.where(others, hidden == tokens, True))
    assert len({tuple(row.tolist()) for row in places}) == 8  # each row its own
    assert mask_tokens(tokens[:, :2], jax.random.key(1), rate=0.1, mask_token=9, vocab_size=9)[1].shape == (8, 1)


# Vision


def test_patches_are_those_of_a_convolution_row_by_row():
    config = CONFIGS["vision"]
    model = make(config)
    images = jax.random.normal(jax.random.key(3), (2, 8, 8, 3))
    kernel, bias = model.patches.kernel[...], model.patches.bias[...]
    dimensions = jax.lax.conv_dimension_numbers(images.shape, kernel.shape, ("NHWC", "HWIO", "NHWC"))
    expected = jax.lax.conv_general_dilated(images, kernel, (4, 4), "VALID", dimension_numbers=dimensions)
    expected = (expected + bias[None, None, None]).reshape(2, 4, 16) + model.positions.table[...][None, 1:]
    np.testing.assert_allclose(model._embed(images)[:, 1:], expected, atol=1e-5)


def test_images_of_bytes_are_scaled_and_the_loss_is_that_of_the_logits():
    more = dict(image_mean=(0.4, 0.5, 0.6), image_std=(0.2,), label_smoothing=0.1, exact=False)
    config = dataclasses.replace(CONFIGS["vision"], **more)
    model = make(config)
    batch = batch_of(config)
    floats = (np.asarray(batch["images"], np.float32) / 255 - np.array([0.4, 0.5, 0.6])) / 0.2
    logits = model(batch["images"])
    np.testing.assert_allclose(logits, model(jnp.asarray(floats, jnp.float32)), atol=1e-5)
    total, count, more = model.loss(batch["images"], batch["labels"], z_loss=0.01)
    labels = optax.smooth_labels(jax.nn.one_hot(batch["labels"], 5), 0.1)
    expected = optax.softmax_cross_entropy(logits, labels) + 0.01 * jax.nn.logsumexp(logits, -1) ** 2
    np.testing.assert_allclose(total, expected.sum(), rtol=1e-5)
    assert count == 2 and more["accuracy"] == jnp.sum(jnp.argmax(logits, -1) == batch["labels"])
    weighted, count, _ = model.loss(batch["images"], batch["labels"], jnp.array([0, 1]), z_loss=0.01)
    assert count == 1
    np.testing.assert_allclose(weighted, expected[1], rtol=1e-5)


@pytest.mark.parametrize("pooling, num_tokens", [("class", 5), ("mean", 4)])
def test_what_the_head_of_a_vision_transformer_reads(pooling, num_tokens):
    config = dataclasses.replace(CONFIGS["vision"], pooling=pooling)
    model = make(config)
    images = jax.random.normal(jax.random.key(3), (2, 8, 8, 3))
    hidden = model.hidden(images)
    assert config.num_tokens == hidden.shape[1] == num_tokens
    read = hidden[:, 0] if pooling == "class" else hidden.mean(1)
    np.testing.assert_allclose(model(images), read @ model.head.kernel[...], atol=1e-5)


@pytest.mark.parametrize(
    "images, error, message",
    [
        (jnp.zeros((2, 9, 8, 3)), ValueError, r"must have the shape \(B, 8, 8, 3\), channels last"),
        (jnp.zeros((2, 3, 8, 8)), ValueError, r"channels last, but got \(2, 3, 8, 8\)"),
        (jnp.zeros((8, 8, 3)), ValueError, r"but got \(8, 8, 3\)"),
        (jnp.zeros((2, 8, 8, 3), jnp.int32), TypeError, "must be bytes .* or scaled floats, but got int32"),
    ],
)
def test_what_is_no_image_of_the_model_is_refused(images, error, message):
    with pytest.raises(error, match=message):
        make(CONFIGS["vision"])(images)


def test_labels_that_are_none_are_refused_or_make_the_loss_no_number():
    model, images = make(CONFIGS["vision"]), jnp.zeros((2, 8, 8, 3))
    loss = lambda *labels: model.loss(images, *map(jnp.asarray, labels))[0]
    assert jnp.isnan(loss([0, model.config.num_classes])) and jnp.isnan(loss([-1, 0]))
    assert loss([3, -1], [1, 0]) == loss([3, 1], [1, 0])
    for labels, error, message in [
        (([0, 1, 2],), ValueError, r"labels_B must be one number for each image, \(2,\), but got \(3,\)"),
        (([0, 1], [1.0]), ValueError, r"weights_B must be one number for each image"),
        (([0.0, 1.0],), TypeError, "labels_B must be integers, but got float32"),
    ]:
        with pytest.raises(error, match=message):
            loss(*labels)


# Encoder-decoder


@pytest.mark.parametrize("name", by_time(["encoder-decoder", "encoder-decoder, relative"]))
def test_a_target_sees_all_of_the_source_and_its_own_past(name):
    model = make(CONFIGS[name])
    source, target = TOKENS, TOKENS[:, :9]
    run = jax.jit(model)
    out = run(source, target)
    assert out.shape == (2, 9, 40)
    assert jnp.all(jnp.any(out != run(source.at[:, 12].add(1), target), -1))
    later = run(source, target.at[:, 5].add(1))
    np.testing.assert_array_equal(jnp.any(out != later, -1)[0], jnp.arange(9) >= 5)
    is_text = jnp.broadcast_to(jnp.arange(13) < 10, (2, 13)).astype(jnp.int32)
    floats = without_grid(name)
    padded = floats(jnp.where(is_text > 0, source, 3), target, source_segment_ids=is_text)
    np.testing.assert_allclose(padded, floats(source[:, :10], target), atol=1e-5)


def test_packed_pairs_do_not_see_each_other():
    model = without_grid("encoder-decoder, relative")
    segments = jnp.array([[0] * 7 + [1] * 6] * 2)
    given = {"source_segment_ids": segments, "target_segment_ids": segments}
    packed = model(TOKENS, TOKENS, **given)
    np.testing.assert_allclose(packed[:, 7:], model(TOKENS[:, 7:], TOKENS[:, 7:]), atol=1e-5)


def test_the_loss_of_an_encoder_decoder_is_that_of_the_target_behind_the_start():
    config = dataclasses.replace(CONFIGS["encoder-decoder"], logit_scale=0.5, tie_embeddings=False)
    model = make(config)
    target = TOKENS[:, :9]
    seen = jnp.concatenate([jnp.full((2, 1), 39), target[:, :-1]], axis=1)
    expected = optax.softmax_cross_entropy_with_integer_labels(model(TOKENS, seen), target)
    total, count = model.loss(TOKENS, target)
    np.testing.assert_allclose(total, expected.sum(), rtol=1e-5)
    assert count == 18
    hidden, _ = mask_tokens(TOKENS, jax.random.key(0), rate=0.3, mask_token=38, vocab_size=40)
    assert model.denoising_loss(TOKENS)[0] == model.loss(hidden, TOKENS)[0]


# All


def test_streams_of_post_norm_layers_stay_bounded_or_are_refused():
    """Of f(x) = norm(x + g(x)) - x, the streams of a RevNet grow by 1.6 with every f."""
    assert [round(post_norm_growth(revjax.parse_coupling(c)), 2) for c in ("revnet", "residual")] == [1.62, 0.0]
    couplings = ("near-residual:1", "near-residual:2", "near-residual:4", "bdia:1", "bdia:4", "momentum:0.5")
    growth = {c: post_norm_growth(revjax.parse_coupling(c)) for c in couplings}
    assert growth["near-residual:1"] == pytest.approx(1) and growth["bdia:1"] == pytest.approx(1.366, abs=1e-3)
    assert [c for c in couplings if growth[c] < 1] == ["near-residual:2", "near-residual:4", "bdia:4", "momentum:0.5"]
    deep = dataclasses.replace(CONFIGS["encoder, post-norm"], num_layers=24)
    _, report = jax.jit(lambda m: revjax.value_and_grad(loss_on_batch(deep))(m)[0])(make(deep))
    assert report.max_abs < 20 and report.canary == 0
    with pytest.raises(ValueError, match="post makes streams of the coupling 'revnet' grow by 1.6 with every f"):
        dataclasses.replace(deep, coupling="revnet")
    x = np.zeros((2, 48))  # x[l+1] = x[l-1] - x[l] + bounded
    x[:, 1] = 1
    for l in range(1, 47):
        x[0, l + 1] = x[0, l - 1] - x[0, l]
        x[1, l + 1] = x[1, l] + (x[1, l - 1] - x[1, l]) / 16 - x[1, l]
    assert abs(x[0, -1]) > 1e8 and abs(x[1, -1]) < 1e-6


@pytest.mark.parametrize(
    "make_config, message",
    [
        (lambda: EncoderConfig(vocab_size=1), "vocab_size must be at least 2"),
        (lambda: EncoderConfig(mask_rate=0.0), "mask_rate must be above 0"),
        (lambda: EncoderConfig(mask_token=257), "mask_token must be a token of the vocabulary, 0 to 256"),
        (lambda: EncoderConfig(token_kinds=-1), "token_kinds must be at least 0"),
        (lambda: VisionConfig(image_size=30), "patch_size must divide image_size"),
        (lambda: VisionConfig(num_classes=0), "num_classes must be at least 1"),
        (lambda: VisionConfig(image_mean=(0.1, 0.2)), "one for each of 3 channels"),
        (lambda: VisionConfig(image_std=(0.0,)), "image_std must be above 0"),
        (lambda: VisionConfig(label_smoothing=1.0), "label_smoothing must be"),
        (lambda: EncoderDecoderConfig(vocab_size=2), "a token, a mask and a start"),
        (lambda: EncoderDecoderConfig(window=8), "has no windows"),
        (lambda: EncoderDecoderConfig(start_token=258), "start_token must be a token, 0 to 257"),
        (lambda: EncoderDecoderConfig(logit_scale=0.0), "logit_scale must be above 0"),
        (lambda: EncoderDecoderConfig(num_decoder_layers=-1), "num_decoder_layers must be at least 1"),
    ],
)
def test_impossible_shapes_of_other_families_are_refused(make_config, message):
    with pytest.raises(ValueError, match=message):
        make_config()


def test_flops_of_other_families_are_counted():
    d, t = 16, 100
    encoder = CONFIGS["encoder, blocks"]
    layer = 4 * d * d + 2 * d * encoder.mlp_width
    assert num_params(make(encoder).stack) >= 2 * layer
    head = 0.15 * (2 * 40 * d + 2 * d * d)
    assert flops_per_token(encoder, t) == pytest.approx(3 * (2 * (2 * layer + 4 * d * t) + head))
    again = 2 * (2 * layer + 4 * d * t)
    assert hardware_flops_per_token(encoder, t, "nothing") == pytest.approx(flops_per_token(encoder, t) + again)
    both = CONFIGS["encoder-decoder"]
    layer = 4 * d * d + 3 * d * both.mlp_width
    weights = 5 * layer + 3 * 4 * d * d
    kernel = 4 * d * t * (2 + 3 / 2 + 3)
    assert flops_per_token(both, t) == pytest.approx(3 * (2 * weights + 2 * 40 * d) + 3 * kernel)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_parts_of_a_summary_are_the_whole(name):
    model = nnx.eval_shape(lambda: make(CONFIGS[name], "nothing"))
    *parts, total = summary(model).splitlines()
    count = lambda row: int(row.split()[-1].replace(",", ""))
    assert sum(map(count, parts)) == count(total) == num_params(model)


def test_models_are_public():
    assert (revjax.Encoder, revjax.VisionTransformer, revjax.EncoderDecoder) == (
        Encoder,
        VisionTransformer,
        EncoderDecoder,
    )
