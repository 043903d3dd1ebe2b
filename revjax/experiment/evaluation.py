"""The loss of a model on texts."""

import dataclasses
import math
import os
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax

from ..data import Part, load_corpus, validation_batches
from ..errors import DataError
from ..training import bits_per_byte, make_eval_step, mean_loss, split
from .program import next_token_loss
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
    loss: float  # nats per token
    bits_per_byte: float
    num_tokens: int  # predicted
    num_tokens_of_text: int  # more than these: rows that fill no batch, or are above max_batches, are left out

    @property
    def perplexity(self) -> float:
        """Of a token."""
        return math.exp(self.loss)


def losses(
    eval_step: Callable[[Any, Any], tuple[Any, Any]],
    params: Any,
    parts: Sequence[Part],
    *,
    stop: Callable[[], bool] = lambda: False,
    **how: Any,
) -> dict[str, Any] | None:
    """{loss, bits_per_byte, perplexity}: means of the `parts` by weight; where there are more, `texts` has each.

    None once `stop()` is true. `how` is for `validation_batches`.
    """
    texts = {}
    for part in parts:
        found = mean_loss(eval_step, params, validation_batches(part.text, **how), stop=stop)
        if found is None:
            return None
        loss, _ = found
        texts[part.name] = {"loss": loss, "bits_per_byte": bits_per_byte(loss, part.text.bytes_per_token)}
    mean = lambda name: sum(part.weight * texts[part.name][name] for part in parts)
    found = {name: mean(name) for name in ("loss", "bits_per_byte")} | {"perplexity": math.exp(min(mean("loss"), 700))}
    return found | ({"texts": texts} if len(texts) > 1 else {})


def evaluate(folder: str | os.PathLike, options: EvaluateConfig) -> list[Evaluation]:
    """The loss of the model of the latest checkpoint in the run's `folder`, without dropout, on rows in order.

    One for each text that the run held out or names in data.validation, or the one for `options.source`. Raises a
    `RevjaxError` where there is no run, no checkpoint, or no text.
    """
    trained = load_run(folder)
    data = dataclasses.replace(trained.data, sequence_length=options.sequence_length or trained.data.sequence_length)
    if options.source is None:
        parts = load_corpus(data).validation
        if not parts:
            raise DataError("The run held no text out (data.validation_fraction=0). Set --source=PATH.")
    else:
        text_field = options.text_field or data.text_field
        data = dataclasses.replace(data, text_field=text_field)
        data_of = dataclasses.replace(data, source=options.source, validation={}, validation_fraction=0.0)
        try:
            parts = load_corpus(data_of).train
        except DataError as e:  # about settings that have other names here
            raise DataError(re.sub(rf"(--)?data\.({'|'.join(_OPTIONS)})\b", r"--\2", str(e))) from None
    skeleton, params = split(trained.model)
    eval_step = jax.jit(make_eval_step(skeleton, next_token_loss))
    evaluations = []
    for part in parts:
        batches = validation_batches(
            part.text,
            batch_size=options.batch_size or data.batch_size,
            sequence_length=data.sequence_length,
            separate_documents=data.separate_documents,
            max_batches=options.max_batches,
        )
        found = mean_loss(eval_step, params, batches)
        assert found is not None  # nothing stops it
        loss, num_tokens = found
        name = part.name if options.source or not part.weight else f"{part.name}, held out"
        bits = bits_per_byte(loss, part.text.bytes_per_token)
        evaluations.append(Evaluation(name, loss, bits, int(num_tokens), part.text.num_tokens))
    return evaluations
