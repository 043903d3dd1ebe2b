"""Networks of every family on what they are compared on: here with any parameters, and by transformers."""

import argparse
import importlib.util
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ..core import parse_coupling
from ..data import Tokenizer
from ..models import (
    DecoderConfig,
    EncoderConfig,
    EncoderDecoderConfig,
    ModelConfig,
    VisionConfig,
    loss_of,
    make_model,
    value_and_grad,
)
from ..training import split_abstract

_IMAGES, _ROWS, _LENGTH = 4, 2, 600  # short prompts hide mistakes in rotary positions
PADDING = 37  # tokens, of `padded_logits_on`
_PROBE = pathlib.Path(argparse.__file__)  # a text that is on every machine


def probe(tokenizer: Tokenizer | None, config: ModelConfig) -> np.ndarray:
    """What to compare on: tokens (rows, T), or images (rows, H, W, C) of noise.

    Tokens are text (random ones where the tokenizer has none of its words), in long rows.
    """
    if isinstance(config, VisionConfig):
        size = (_IMAGES, config.image_size, config.image_size, config.channels)
        return np.random.default_rng(0).normal(size=size).astype(np.float32)
    assert tokenizer is not None
    length = _LENGTH
    if isinstance(config, DecoderConfig | EncoderConfig) and config.positions == "learned":
        length = min(_LENGTH, config.max_length)
    tokens = tokenizer.encode(_PROBE.read_text(encoding="utf-8", errors="replace"))
    if len(set(tokens.tolist())) < _LENGTH // 10:  # it has no words for such a text
        tokens = np.random.default_rng(0).integers(0, tokenizer.vocab_size, _ROWS * length, dtype=np.int32)
    rows = np.resize(tokens, (_ROWS, length))
    rows[:, : len(tokenizer.begin)] = tokenizer.begin
    return rows


_AUTO = {
    "decoder": "AutoModelForCausalLM",
    "encoder": "AutoModelForMaskedLM",
    "vision": "AutoModelForImageClassification",
    "encoder-decoder": "AutoModelForSeq2SeqLM",
}


def source_logits(folder: pathlib.Path, x: np.ndarray, config: ModelConfig) -> tuple[np.ndarray | None, str | None]:
    """Logits of the model in `folder` as transformers computes them in float32; or None, and why."""
    missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    if missing:
        return None, f"{' and '.join(missing)} not installed: pip install torch transformers"
    torch, transformers = (importlib.import_module(name) for name in ("torch", "transformers"))
    transformers.utils.logging.disable_progress_bar()
    options = {"dtype": torch.float32, "attn_implementation": "eager", "local_files_only": True}

    def inputs(row: np.ndarray) -> dict[str, Any]:
        if isinstance(config, VisionConfig):
            return {"pixel_values": torch.from_numpy(row[None].transpose(0, 3, 1, 2).copy())}
        tokens = torch.from_numpy(row[None].astype(np.int64))
        if not isinstance(config, EncoderDecoderConfig):
            return {"input_ids": tokens}
        target = torch.from_numpy(_behind_start(config, row[None]).astype(np.int64))
        return {"input_ids": tokens, "decoder_input_ids": target}

    try:
        model = getattr(transformers, _AUTO[config.family]).from_pretrained(str(folder), **options).eval()
        with torch.no_grad():
            rows = [model(**inputs(row)).logits[0].numpy() for row in x]
    except Exception as e:  # whatever it finds wrong: ours to report, not to die of
        return None, f"transformers cannot run it ({type(e).__name__}: {e})"
    return np.stack(rows), None


def _model(config: ModelConfig, plan: str, params: dict[str, Any]) -> Any:
    skeleton, shapes = split_abstract(lambda: make_model(config, plan=plan, rngs=nnx.Rngs(0)))
    return skeleton.merge(jax.tree.map(lambda shape, x: jnp.asarray(x, shape.dtype), shapes, params))


def _behind_start(config: EncoderDecoderConfig, tokens: np.ndarray) -> np.ndarray:
    """What a decoder sees of a target."""
    return np.concatenate([np.full_like(tokens[:, :1], config.start), tokens[:, :-1]], axis=1)


def _inputs(config: ModelConfig, x: np.ndarray) -> tuple[jax.Array, ...]:
    """What a model is called with; an encoder-decoder tells a text again."""
    of_target = [_behind_start(config, x)] if isinstance(config, EncoderDecoderConfig) else []
    return tuple(map(jnp.asarray, [x, *of_target]))


def logits_on(config: ModelConfig, params: dict[str, Any], x: np.ndarray) -> np.ndarray:
    """Of nested parameters, numpy's arrays, on what `probe` gave, a row at once."""
    plan = "nothing" if parse_coupling(config.coupling).reversible else "inputs"
    model = _model(config, plan, params)
    run = jax.jit(lambda model, inputs: model(*inputs))
    return np.concatenate([np.asarray(run(model, _inputs(config, row[None]))) for row in x])


def packed_logits_on(config: ModelConfig, params: dict[str, Any], tokens: np.ndarray) -> np.ndarray:
    """All rows as texts of one row."""
    rows, length = tokens.shape
    segment_ids, positions = np.divmod(np.arange(tokens.size, dtype=np.int32)[None], length)
    given = {"segment_ids": segment_ids, "positions": positions}
    if isinstance(config, EncoderDecoderConfig):
        given = {"source_segment_ids": segment_ids, "target_segment_ids": segment_ids}
    run = jax.jit(lambda model, inputs: model(*inputs, **given))
    inputs = tuple(x.reshape(1, -1) for x in _inputs(config, tokens))
    return np.asarray(run(_model(config, "inputs", params), inputs)).reshape(rows, length, -1)


def padded_logits_on(config: ModelConfig, params: dict[str, Any], tokens: np.ndarray) -> np.ndarray:
    """Of the first row without its last tokens, with as much padding instead, in a batch with a row that has none."""
    length = tokens.shape[1]
    model = _model(config, "inputs", params)
    if not isinstance(config, DecoderConfig):
        is_text = np.ones((2, length), np.int32)
        is_text[0, length - PADDING :] = 0
        batch = np.where(is_text > 0, tokens[:2], 0)
        named = "source_segment_ids" if isinstance(config, EncoderDecoderConfig) else "segment_ids"
        run = jax.jit(lambda model, inputs: model(*inputs, **{named: is_text})[:1, : length - PADDING])
        if isinstance(config, EncoderDecoderConfig):
            alone = _inputs(config, tokens[:1, : length - PADDING])
            of_target = jnp.concatenate([jnp.repeat(alone[1], 2, 0), jnp.zeros((2, PADDING), jnp.int32)], axis=1)
            return np.asarray(run(model, (jnp.asarray(batch), of_target)))
        return np.asarray(run(model, (jnp.asarray(batch),)))
    padded = np.where(np.arange(length) < PADDING, 0, np.roll(tokens, PADDING, axis=1))
    batch, padding_B = np.stack([padded[0], tokens[-1]]), jnp.array([PADDING, 0], jnp.int32)

    def run_decoder(model, batch):
        return model.decode(batch, model.init_cache(2, batch.shape[1], padding_B))[0][:1, PADDING:]

    return np.asarray(jax.jit(run_decoder)(model, jnp.asarray(batch)))


def _mean_loss(config: ModelConfig, x: Any) -> Any:
    """What the model learns, on `x`, as a function of the model and a key."""
    if isinstance(config, VisionConfig):
        batch = {"images": x, "labels": jnp.zeros(len(x), jnp.int32)}
    elif isinstance(config, DecoderConfig):
        batch = {"tokens": x}
    else:  # the last token of a row is not seen
        batch = {"tokens": jnp.pad(x, ((0, 0), (0, 1)))}
    return lambda model, key: jnp.divide(*loss_of(config)(model, batch, key)[:2])


def gradients_on(config: ModelConfig, plan: str, params: dict[str, Any], x: np.ndarray):
    """The report of the streams, and the gradients."""
    loss = lambda model, x, key: _mean_loss(config, x)(model, key)
    step = jax.jit(value_and_grad(loss))
    (_, report), grads = step(_model(config, plan, params), jnp.asarray(x), jax.random.key(0))
    return report, grads


def loss_on(config: ModelConfig, params: dict[str, Any], x: np.ndarray) -> float:
    """Nats a token, or an image."""
    plan = "nothing" if parse_coupling(config.coupling).reversible else "inputs"
    run = jax.jit(lambda model, x: _mean_loss(config, x)(model, None))
    return float(run(_model(config, plan, params), jnp.asarray(x)))
