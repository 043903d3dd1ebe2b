"""The loss of a trained model on any text."""

import dataclasses
import math
import os
import pathlib

import jax
import numpy as np
from flax import nnx

from ..data import DataConfig, load_corpus, validation_batches
from ..errors import DataError
from ..training import make_eval_step, mean_loss, split
from ..training.folder import read_config
from .build import next_byte_loss
from .config import RunConfig
from .samples import load_model


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """What to evaluate on."""

    source: str | None = None  # a file, a folder or a glob, all of it; null is the text that the run held out
    sequence_length: int | None = None  # tokens of a row; null is the run's
    batch_size: int | None = None  # rows at a time; null is the run's
    max_batches: int | None = None  # null is everything

    def __post_init__(self):
        for name in ("sequence_length", "batch_size", "max_batches"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, or null, but got {getattr(self, name)}.")


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """A loss, and what it is a mean of."""

    loss: float  # nats per token
    num_tokens: int  # predicted
    source: str

    @property
    def bits_per_byte(self) -> float:
        return self.loss / math.log(2)

    @property
    def perplexity(self) -> float:
        """Of a token, which is a byte."""
        return math.exp(self.loss)


def evaluate(folder: str | os.PathLike, options: EvaluateConfig) -> Evaluation:
    """The loss of the model of the latest checkpoint in the run's `folder`, without dropout, on rows in order.

    Raises a `RevjaxError` where there is no run, no checkpoint, or no text.
    """
    config = read_config(pathlib.Path(folder).expanduser(), RunConfig)
    sizes = {
        "batch_size": options.batch_size or config.data.batch_size,
        "sequence_length": options.sequence_length or config.data.sequence_length,
    }
    if options.source is None:
        tokens, source = load_corpus(config.data).validation, f"{config.data.source}, held out"
        if not len(tokens):
            raise DataError("The run held no text out (data.validation_fraction=0). Set --source=PATH.")
    else:
        data = DataConfig(source=options.source, validation_fraction=0.0, sequence_length=sizes["sequence_length"])
        tokens, source = load_corpus(data).train, options.source
    model = load_model(folder)
    if int(tokens.max()) >= config.model.vocab_size:
        raise DataError(
            f"The text has the byte {tokens.max()}, but the model knows 0 to {config.model.vocab_size - 1}."
        )
    skeleton, params = split(nnx.clone(model))
    rows = list(validation_batches(tokens, **sizes, max_batches=options.max_batches))
    loss = mean_loss(jax.jit(make_eval_step(skeleton, next_byte_loss)), params, rows)
    assert loss is not None  # nothing stops it
    return Evaluation(loss, int(np.sum([batch[:, 1:].size for batch in rows])), source)
