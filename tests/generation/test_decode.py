"""Generation with a cache makes the tokens that running the whole text again at every step makes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from revjax.generation import generate, stream
from revjax.models import Decoder, DecoderConfig

CONFIG = DecoderConfig(vocab_size=64, d_model=32, num_layers=2, num_heads=2, tie_embeddings=False, dtype="float32")
PROMPT = np.array([[1, 5, 9], [60, 2, 2]])


def make(**changes):
    config = DecoderConfig(**({f: getattr(CONFIG, f) for f in CONFIG.__dataclass_fields__} | changes))
    model = nnx.jit(lambda: Decoder(config, rngs=nnx.Rngs(0)))()
    model.embedding.table[...] *= 50  # tokens that differ much, or the untrained model says the same after all of them
    return model


@pytest.fixture(scope="module")
def model():
    return make()


@pytest.mark.parametrize(
    "changes",
    [{}, {"coupling": "bdia:1", "num_kv_heads": 1, "window": 4}, {"positions": "learned", "max_length": 9}],
    ids=["revnet", "bdia, window, one kv head", "learned positions"],
)
def test_greedy_tokens_are_those_of_the_whole_text(changes):
    model = make(**changes)
    tokens = generate(model, PROMPT, max_new_tokens=6, temperature=0)
    forward, text = jax.jit(lambda model, tokens: model(tokens)), jnp.asarray(PROMPT)
    for i in range(6):
        padded = jnp.pad(text, ((0, 0), (0, 9 - text.shape[1])))  # causal: what follows changes nothing
        text = jnp.concatenate([text, jnp.argmax(forward(model, padded)[:, 2 + i : 3 + i], axis=-1)], axis=1)
    assert tokens.tolist() == text[:, 3:].tolist()
    assert len(set(tokens.ravel().tolist())) > 2


def test_one_prompt_gives_one_row(model):
    one = generate(model, PROMPT[0], max_new_tokens=4, temperature=0)
    assert one.shape == (4,) and one.dtype == np.int32
    assert one.tolist() == generate(model, PROMPT, max_new_tokens=4, temperature=0)[0].tolist()


@pytest.mark.parametrize(
    "changes, options",
    [
        ({}, {}),
        pytest.param({"window": 4, "coupling": "near-residual:1"}, {}, marks=pytest.mark.slow),
        pytest.param({"positions": "learned", "max_length": 15}, {}, marks=pytest.mark.slow),
        pytest.param({}, {"repetition_penalty": 1e6}, marks=pytest.mark.slow),
    ],
    ids=["rotary", "window", "learned positions", "repetition penalty"],
)
def test_prompts_of_unequal_lengths_are_continued_as_each_alone(changes, options):
    model, prompts = make(**changes), [np.array([1, 5, 9]), np.array([60]), np.array([7, 0, 30, 2, 2, 11, 4])]
    options = {"max_new_tokens": 8, "temperature": 0} | options
    together, alone = generate(model, prompts, **options), [generate(model, prompt, **options) for prompt in prompts]
    assert together.tolist() == np.stack(alone).tolist()
    further = {"pad_to": 7 if "max_length" in changes else 9}
    assert (
        np.concatenate(list(stream(model, prompts[:2], **further, **options)), axis=1).tolist() == together[:2].tolist()
    )


def test_padding_changes_no_logits(model):
    """To rounding: sums over keys are taken in other blocks."""
    tokens, padding = jnp.array([[0, 0, 0, 1, 5, 9]]), jnp.array([3])
    alone, _ = model.decode(tokens[:, 3:], model.init_cache(1, 10))
    padded, _ = model.decode(tokens, model.init_cache(1, 10, padding))
    np.testing.assert_allclose(padded[:, 3:], alone, rtol=1e-5, atol=1e-5)
    other, _ = model.decode(tokens.at[0, :3].set(60), model.init_cache(1, 10, padding))
    np.testing.assert_array_equal(other[:, 3:], padded[:, 3:])


def test_one_token_needs_no_loop(model):
    assert generate(model, PROMPT[0], max_new_tokens=1, temperature=0).shape == (1,)


def test_the_key_decides_and_top_k_1_is_greedy(model):
    draw = lambda seed, **options: generate(
        model, PROMPT, max_new_tokens=8, key=jax.random.key(seed), **options
    ).tolist()
    assert draw(0) == draw(0) and draw(0) != draw(1)
    assert draw(0, top_k=1) == draw(1, temperature=0)


@pytest.mark.parametrize("every", [1, 3, 7, 100])
def test_pieces_are_the_whole(model, every):
    options = {"max_new_tokens": 8, "key": jax.random.key(3), "temperature": 0.8, "repetition_penalty": 1.2}
    pieces = list(stream(model, PROMPT, every=every, **options))
    assert pieces[0].shape == (2, 1) and all(piece.shape[1] <= every for piece in pieces)
    assert np.concatenate(pieces, axis=1).tolist() == generate(model, PROMPT, **options).tolist()


def test_a_repetition_penalty_makes_every_token_new(model):
    tokens = generate(model, PROMPT, max_new_tokens=20, temperature=0, repetition_penalty=1e6)
    for prompt, row in zip(PROMPT.tolist(), tokens.tolist()):
        assert len(set(row)) == 20 and not set(row) & set(prompt)


@pytest.mark.parametrize(
    "prompt, message",
    [
        ([], "at least one token"),
        ([[]], "at least one token"),
        ([1, 64], r"holds the token 64, but this model knows 0 to 63 \(vocab_size=64\)"),
        ([-1, 3], "holds the token -1"),
        ([0.5], "float64: encode the text first"),
        ([[[1]]], r"got the shape \(1, 1, 1\)"),
        ([np.array([1, 2]), np.array([], int)], "at least one token"),
        ([np.array([1, 2]), np.array([64])], "holds the token 64"),
        ([np.array([1, 2]), np.array([[1]])], r"Each prompt of a list is \(T,\)"),
    ],
)
def test_a_bad_prompt_is_refused_in_words(model, prompt, message):
    is_list_of_rows = any(isinstance(row, np.ndarray) for row in prompt)
    with pytest.raises(ValueError, match=message):
        generate(model, prompt if is_list_of_rows else np.array(prompt), max_new_tokens=2)


def test_a_text_longer_than_the_learned_positions_is_refused():
    model = nnx.eval_shape(
        lambda: Decoder(DecoderConfig(d_model=32, num_layers=1, positions="learned", max_length=8), rngs=nnx.Rngs(0))
    )
    with pytest.raises(ValueError, match=r"prompt \(5 tokens\) and 4 new ones are 9, .* end at max_length=8"):
        generate(model, np.arange(5), max_new_tokens=4)
