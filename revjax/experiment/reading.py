"""What a run reads: text or images. Looked at before any work, loaded later, and dealt out in batches."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import jax

from ..data import (
    Batches,
    Corpus,
    DataConfig,
    ImageBatches,
    Images,
    ImagesConfig,
    RowBatches,
    Tokenizer,
    batch_shapes,
    find_images,
    find_texts,
    image_batches,
    load_corpus,
    load_images,
    load_template,
    load_tokenizer,
    make_augment,
    validation_batches,
)
from ..errors import ConfigError, DataError
from ..generation.decode import check_prompt
from ..models import DecoderConfig, Loss, ModelConfig, VisionConfig, example_batch, loss_of
from .config import RunConfig


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """A text, or images, to evaluate on.

    Attributes:
      weight: in the mean of several; they add up to 1.
      batches: the same ones at every call.
      size: tokens that there are, or images.
      bytes_per_token: where it is text that is predicted.
    """

    name: str
    weight: float
    batches: Callable[[], Iterator[Any]]
    size: int
    bytes_per_token: float | None


class TextReading:
    """The text of a run. Making it finds what is wrong with its settings; raises a `RevjaxError` for that."""

    def __init__(self, config: RunConfig):
        assert isinstance(config.data, DataConfig)
        self.config, self.data = config, config.data
        self.tokenizer: Tokenizer | None = _tokenizer(config, self.data)
        self.files = find_texts(self.data)
        load_template(self.data)

    def load(self) -> Corpus:
        return load_corpus(self.data, self.tokenizer, self.files)

    def batches(self, found: Corpus) -> RowBatches:
        return Batches(
            found,
            batch_size=self.data.batch_size,
            sequence_length=self.data.sequence_length,
            separate_documents=self.data.separate_documents,
            seed=self.config.training.seed,
        )


class ImageReading:
    """The images of a run, likewise."""

    def __init__(self, config: RunConfig):
        assert isinstance(config.data, ImagesConfig) and isinstance(config.model, VisionConfig)
        self.config, self.data, self.model = config, config.data, config.model
        self.tokenizer: Tokenizer | None = None
        find_images(self.data)
        make_augment(self.data)

    def load(self) -> Images:
        return images_for(self.data, self.model)

    def batches(self, found: Images) -> RowBatches:
        size, seed = self.data.batch_size, self.config.training.seed
        if len(found.train) < size:
            raise DataError(
                f"{found.source} has {len(found.train)} images to train on, fewer than data.batch_size={size}. Set "
                f"--data.batch_size={len(found.train)} or smaller."
            )
        return ImageBatches(found, batch_size=size, num_tokens=self.model.num_tokens, seed=seed)


class Reading(Protocol):
    """What `build` asks of what a run reads."""

    tokenizer: Tokenizer | None

    def load(self) -> Any:
        """All of it."""
        ...

    def batches(self, found: Any) -> RowBatches:
        """The training batches of what was loaded."""
        ...


def reading_of(config: RunConfig) -> Reading:
    """What the run of `config` reads."""
    return ImageReading(config) if isinstance(config.data, ImagesConfig) else TextReading(config)


def images_for(data: ImagesConfig, model: VisionConfig) -> Images:
    """The images of `data`, as `model` takes them."""
    return load_images(data, size=model.image_size, channels=model.channels, num_classes=model.num_classes)


def batch_of(config: RunConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """The shape of each array of a batch."""
    rows = config.data.batch_size
    if isinstance(config.data, ImagesConfig):
        return example_batch(config.model, rows, config.row_length)
    shapes = batch_shapes(
        rows,
        config.data.sequence_length,
        separate_documents=config.data.separate_documents,
        weights=config.data.chat_template is not None,
    )
    return {name: jax.ShapeDtypeStruct(shape, "int32") for name, shape in shapes.items()}


def training_loss(config: RunConfig) -> Loss:
    """What the model of `config` learns from a batch: `(model, batch, key)`."""
    options: dict[str, Any] = {"z_loss": config.training.z_loss}
    if isinstance(config.data, ImagesConfig):
        options["augment"] = make_augment(config.data)
    return functools.partial(loss_of(config.model), **options)


def held_out(config: RunConfig, found: Corpus | Images, max_batches: int | None) -> list[HeldOut]:
    """What there is to evaluate on."""
    rows = config.data.batch_size
    if isinstance(found, Images):
        if not len(found.held_out):
            return []
        batches = functools.partial(image_batches, found.held_out, batch_size=rows, max_batches=max_batches)
        return [HeldOut(found.source, 1.0, batches, len(found.held_out), None)]
    assert isinstance(config.data, DataConfig)
    how = {"batch_size": rows, "sequence_length": config.data.sequence_length, "max_batches": max_batches}
    how |= {"separate_documents": config.data.separate_documents}
    predicts = isinstance(config.model, DecoderConfig)
    return [
        HeldOut(
            part.name,
            part.weight,
            functools.partial(validation_batches, part.text, **how),
            part.text.num_tokens,
            part.text.bytes_per_token if predicts else None,
        )
        for part in found.validation
    ]


def _tokenizer(config: RunConfig, data: DataConfig) -> Tokenizer:
    """That of `data`; raises a `RevjaxError` where the model's vocabulary, or the prompt, does not fit it."""
    tokenizer, model = load_tokenizer(data), config.model
    assert not isinstance(model, VisionConfig)
    needed = tokenizer.vocab_size + _own_tokens(model)
    if needed > model.vocab_size:
        own = "" if needed == tokenizer.vocab_size else f", and {needed - tokenizer.vocab_size} of its own beside them"
        raise DataError(
            f"The tokenizer {data.tokenizer!r} has {tokenizer.vocab_size} tokens, but the model knows "
            f"{model.vocab_size}{own}. Set --model.vocab_size={needed}."
        )
    if config.sample_prompt:
        try:
            prompt = tokenizer.encode(config.sample_prompt)
            assert isinstance(model, DecoderConfig)
            check_prompt(prompt[None], config.training.sample_tokens, model)
        except ValueError as e:
            raise ConfigError(f"training.sample_prompt {config.training.sample_prompt!r}: {e}") from None
    return tokenizer


def _own_tokens(model: ModelConfig) -> int:
    """How many tokens a model needs beside those of text: those of its mask and its start that are left open."""
    names = ("mask_token", "start_token")
    return sum(hasattr(model, name) and getattr(model, name) is None for name in names)
