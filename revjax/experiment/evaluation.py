"""The loss of a model on texts, or images."""

import dataclasses
import math
import os
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax

from ..data import DataConfig, ImagesConfig, find_images, load_corpus
from ..errors import ConfigError, DataError
from ..models import VisionConfig, loss_of
from ..training import bits_per_byte, make_eval_step, means, split
from .config import RunConfig
from .reading import HeldOut, held_out, images_for
from .trained import load_run


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """What to evaluate on."""

    source: str | None = None  # a file, a folder or a glob, all of it; null is the text that the run held out
    text_field: str | None = None  # of each row of .jsonl, .parquet and datasets that holds the text; null: the run's
    sequence_length: int | None = None  # tokens of a row; null is the run's
    batch_size: int | None = None  # rows at a time; null is the run's
    max_batches: int | None = None  # null is everything

    def __post_init__(self):
        for name in ("sequence_length", "batch_size", "max_batches"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, or null, but got {getattr(self, name)}.")


_OPTIONS = [field.name for field in dataclasses.fields(EvaluateConfig)]


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """A loss, and what it is a mean of."""

    source: str
    loss: float  # nats per token that is predicted, or per image
    bits_per_byte: float | None  # of text that is predicted
    accuracy: float | None  # of images
    count: int  # tokens that were predicted, or images
    size: int  # tokens or images that there are: rows that fill no batch, or are above max_batches, are left out

    @property
    def perplexity(self) -> float:
        """Of a token."""
        return math.exp(min(self.loss, 700))


def losses(
    eval_step: Callable[[Any, Any], tuple],
    params: Any,
    parts: Sequence[HeldOut],
    *,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, Any] | None:
    """{loss, and of text bits_per_byte and perplexity, of images accuracy}: means of the `parts` by weight.

    Where there are more parts, `texts` has each. None once `stop()` is true.
    """
    texts = {}
    for part in parts:
        found = means(eval_step, params, part.batches(), stop=stop)
        if found is None:
            return None
        texts[part.name], _ = found
        if part.bytes_per_token is not None:
            texts[part.name]["bits_per_byte"] = bits_per_byte(found[0]["loss"], part.bytes_per_token)
    first = next(iter(texts.values()))
    mean = {name: sum(part.weight * texts[part.name][name] for part in parts) for name in first}
    perplexity = {"perplexity": math.exp(min(mean["loss"], 700))} if "bits_per_byte" in mean else {}
    return mean | perplexity | ({"texts": texts} if len(texts) > 1 else {})


def evaluate(folder: str | os.PathLike, options: EvaluateConfig) -> list[Evaluation]:
    """The loss of the model of the latest checkpoint in the run's `folder`, without dropout, on rows in order.

    One for each text that the run held out or names in data.validation, or the one for `options.source`. Raises a
    `RevjaxError` where there is no run, no checkpoint, or no text.
    """
    trained = load_run(folder)
    config = dataclasses.replace(trained.config, data=_data(trained.data, options))
    parts = _parts(config, options)
    if not parts:
        raise DataError("The run held nothing out (data.validation_fraction=0). Set --source=PATH.")
    skeleton, params = split(trained.model)
    eval_step = jax.jit(make_eval_step(skeleton, loss_of(config.model)))
    evaluations = []
    for part in parts:
        found = means(eval_step, params, part.batches())
        assert found is not None  # nothing stops it
        mean, count = found
        name = part.name if options.source or not part.weight else f"{part.name}, held out"
        bits = None if part.bytes_per_token is None else bits_per_byte(mean["loss"], part.bytes_per_token)
        evaluations.append(Evaluation(name, mean["loss"], bits, mean.get("accuracy"), int(count), part.size))
    return evaluations


def _data(data: DataConfig | ImagesConfig, options: EvaluateConfig) -> DataConfig | ImagesConfig:
    """The run's data, in rows as `options` has them."""
    data = dataclasses.replace(data, batch_size=options.batch_size or data.batch_size)
    if isinstance(data, ImagesConfig):
        for name in ("text_field", "sequence_length"):
            if getattr(options, name) is not None:
                raise ConfigError(f"{name} is of text, and the run reads images: leave it out.")
        return data
    return dataclasses.replace(data, sequence_length=options.sequence_length or data.sequence_length)


def _parts(config: RunConfig, options: EvaluateConfig) -> list[HeldOut]:
    data = config.data
    if isinstance(data, ImagesConfig):
        assert isinstance(config.model, VisionConfig)
        if options.source is not None:  # all of it
            data = dataclasses.replace(data, source=options.source, validation=None, validation_fraction=0.0)
        find_images(data)
        images = images_for(data, config.model)
        if options.source is not None:
            images = dataclasses.replace(images, held_out=images.train)
        return held_out(config, images, options.max_batches)
    if options.source is None:
        return held_out(config, load_corpus(data), options.max_batches)
    data = dataclasses.replace(data, text_field=options.text_field or data.text_field)
    try:
        corpus = load_corpus(dataclasses.replace(data, source=options.source, validation={}, validation_fraction=0.0))
    except DataError as e:  # about settings that have other names here
        raise DataError(re.sub(rf"(--)?data\.({'|'.join(_OPTIONS)})\b", r"--\2", str(e))) from None
    return held_out(config, dataclasses.replace(corpus, validation=corpus.train), options.max_batches)
