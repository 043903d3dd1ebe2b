"""Documents that share a row know nothing of one another."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from revjax.data import PackedRows
from revjax.models import Decoder, DecoderConfig, next_token_loss, value_and_grad

from .data.texts import make_text

LENGTHS = [11, 5, 9, 1, 8]  # 34 tokens: a row of 33 inputs
SMALL = {"d_model": 32, "num_layers": 2, "num_heads": 2, "exact": False, "dtype": "float32"}


@pytest.fixture(scope="module")
def row():
    tokens = np.random.default_rng(0).permutation(256)[: sum(LENGTHS)]  # each of them once
    return PackedRows(make_text(tokens, LENGTHS), len(tokens) - 1, seed=None)[0]


def make_model(**changes):
    return Decoder(DecoderConfig(**SMALL | changes), rngs=nnx.Rngs(0))


def loss_of_one(model, row, segment):
    """The loss of the tokens of one document, where all of the row is read."""
    tokens, weights = row["tokens"][None], (row["segment_ids"] == segment)[None].astype("float32")
    more = {name: row[name][None] for name in ("segment_ids", "positions")}
    return model.loss(tokens[:, :-1], tokens[:, 1:], weights, **more)[0]


@pytest.mark.parametrize("changes", [{}, {"exact": True, "dtype": "bfloat16"}, {"positions": "learned"}, {"window": 4}])
def test_the_loss_of_one_document_has_no_gradient_in_another(row, changes):
    """With respect to the embeddings of the others, exactly 0; of its own, not."""
    model = make_model(**changes, tie_embeddings=False)
    compiled = jax.jit(lambda model, segment: value_and_grad(lambda m: loss_of_one(m, row, segment))(model)[1])
    for segment in range(5):
        own = row["segment_ids"] == segment
        gradient = np.asarray(compiled(model, segment)["embedding"]["table"][...])[row["tokens"][:-1]]
        assert (gradient[~own] == 0).all() and (np.abs(gradient[own]).max(axis=1) > 0).all()


def test_without_separation_a_document_does_depend_on_another(row):
    """The twin: the test above can fail."""
    model = make_model(tie_embeddings=False)
    own = row["segment_ids"] == 1
    joined = row | {"segment_ids": own.astype("int32") * 0}
    weights = own[None].astype("float32")

    def loss(model):
        more = {name: joined[name][None] for name in ("segment_ids", "positions")}
        return model.loss(row["tokens"][None, :-1], row["tokens"][None, 1:], weights, **more)[0]

    _, grads = value_and_grad(loss)(model)
    gradient = np.asarray(grads["embedding"]["table"][...])[row["tokens"][:-1]]
    assert np.abs(gradient[row["segment_ids"] == 0]).max() > 0


@pytest.mark.parametrize("changes", [{}, {"positions": "learned"}, {"coupling": "near-residual:1"}, {"window": 4}])
def test_the_logits_of_a_packed_document_are_those_of_the_document_alone(row, changes):
    model = make_model(**changes)
    more = {name: row[name][None] for name in ("segment_ids", "positions")}
    packed = jax.jit(lambda tokens, more: model(tokens, **more))(row["tokens"][None, :-1], more)[0]
    for segment in range(5):
        own = row["segment_ids"] == segment
        alone = model(jnp.asarray(row["tokens"][:-1][own])[None])[0]
        np.testing.assert_allclose(packed[own], alone, rtol=0, atol=2e-6 * float(jnp.abs(alone).max()))


def test_the_loss_of_a_batch_is_that_of_its_documents(row):
    model = make_model()
    batch = {name: jnp.asarray(x)[None] for name, x in row.items()}
    total, weight = next_token_loss(model, batch, None)
    parts = sum(float(loss_of_one(model, row, segment)) for segment in range(5))
    assert float(weight) == sum(LENGTHS) - 1 and float(total) == pytest.approx(parts, rel=1e-5)
