"""What each family of models learns from a batch: (sum of losses, sum of weights), and maybe a dict of further sums.

    decoder           the next token
    encoder           the hidden tokens                           (BERT, arXiv:1810.04805)
    encoder-decoder   a text, of which tokens are hidden          (BART, arXiv:1910.13461)
    vision            the class of an image

A batch of text has tokens (B, T + 1), and where its rows hold several texts, segment_ids and positions (B, T).
"""

from collections.abc import Callable
from typing import Any

import jax

from .decoder_config import DecoderConfig
from .encoder import EncoderConfig
from .encoder_decoder import EncoderDecoderConfig
from .families import ModelConfig
from .vision import VisionConfig

Batch = dict[str, jax.Array]
Loss = Callable[..., tuple]


def next_token_loss(
    model: Any, batch: Batch, key: jax.Array | None, *, z_loss: float = 0.0
) -> tuple[jax.Array, jax.Array]:
    """(sum of losses in nats, number of tokens) of predicting each of the tokens (B, T + 1) but the first of a row.

    With weights (B, T) in `batch`, only of those whose weight is 1. `model` is a language model with a `loss`, such as
    `Decoder`; what else is in `batch` (segment_ids, positions) goes to it.
    """
    more = dict(batch)
    tokens = more.pop("tokens")
    weights = more.pop("weights", None)
    return model.loss(tokens[:, :-1], tokens[:, 1:], weights, key=key, z_loss=z_loss, **more)


def masked_token_loss(
    model: Any, batch: Batch, key: jax.Array | None, *, z_loss: float = 0.0
) -> tuple[jax.Array, jax.Array]:
    """(sum of losses in nats, number of tokens) of guessing the tokens that an `Encoder` hides, of the first T."""
    more = dict(batch)
    tokens = more.pop("tokens")
    return model.loss(tokens[:, :-1], key=key, z_loss=z_loss, **more)


def denoising_loss(
    model: Any, batch: Batch, key: jax.Array | None, *, z_loss: float = 0.0
) -> tuple[jax.Array, jax.Array]:
    """(sum of losses in nats, number of tokens) of telling the first T tokens again, of which the source hides some."""
    segment_ids = batch.get("segment_ids")  # positions are relative ones: they need not begin anew
    return model.denoising_loss(batch["tokens"][:, :-1], key=key, z_loss=z_loss, segment_ids=segment_ids)


def image_loss(
    model: Any,
    batch: Batch,
    key: jax.Array | None,
    *,
    z_loss: float = 0.0,
    augment: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
    """(sum of losses in nats, number of images, {"accuracy": how many are right}) of images (B, H, W, C) and labels.

    `augment(images, key)` returns others, of the same shape and kind; in training only, where there is a key.
    """
    images = batch["images"]
    if key is not None and augment is not None:
        first, key = jax.random.split(key)
        images = augment(images, first)
    return model.loss(images, batch["labels"], key=key, z_loss=z_loss)


_LOSSES: dict[type, Loss] = {
    DecoderConfig: next_token_loss,
    EncoderConfig: masked_token_loss,
    EncoderDecoderConfig: denoising_loss,
    VisionConfig: image_loss,
}


def loss_of(config: ModelConfig) -> Loss:
    """What a model of that configuration learns: `(model, batch, key, *, z_loss)`."""
    return _LOSSES[type(config)]


def example_batch(config: ModelConfig, rows: int, length: int) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of a batch of `rows` rows: of `length` tokens each, or images."""
    if isinstance(config, VisionConfig):
        size = (rows, config.image_size, config.image_size, config.channels)
        return {"images": jax.ShapeDtypeStruct(size, "uint8"), "labels": jax.ShapeDtypeStruct((rows,), "int32")}
    return {"tokens": jax.ShapeDtypeStruct((rows, length + 1), "int32")}
