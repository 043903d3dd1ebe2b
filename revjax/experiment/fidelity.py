"""How far a converted model is from the pretrained one, step by step, so that no error hides behind another.

    source      the ordinary network here (float streams, float32) beside that of transformers
    rounding    the ordinary network on integer streams beside it
    coupling    the reversible network, in float32, beside the ordinary one
    dtype       the reversible network as it will run beside the same in float32

    packed      the ordinary network on two texts in one row beside each alone
    padded      the ordinary network with padding beside without: of a decoder before a text, and with a cache, as it
                generates; else after it

and then whether it is exact: the canary, elements that did not fit, gradients beside those of the stored run.
"""

import argparse
import dataclasses
import importlib.util
import math
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ..core import parse_coupling
from ..data import Tokenizer
from ..memory import activation_memory
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
from .plan_report import in_bytes

_IMAGES, _ROWS, _LENGTH = 4, 2, 600  # short prompts hide mistakes in rotary positions
_PADDING = 37  # tokens
_PROBE = pathlib.Path(argparse.__file__)  # a text that is on every machine


@dataclasses.dataclass(frozen=True)
class Distance:
    """Between the logits of two networks on the same tokens, or images.

    Attributes:
      largest: difference of a logit, as a part of the largest logit.
      kl: KL divergence of the distributions of a token (of an image: its class), nats each.
      top1: share of them for which both have the same one as the likeliest.
    """

    largest: float
    kl: float
    top1: float


@dataclasses.dataclass(frozen=True)
class Fidelity:
    """What `measure` found; distances are those that the module's docstring names.

    Attributes:
      tokens: that were compared; or images.
      loss, plain_loss: of the reversible and of the ordinary network, nats a token (an image: of its first class).
      no_source: why there is no distance to the source.
      largest_x: the largest |x| of the streams before each f.
      gradient_error: relative distance of the gradients from those of the stored run; None without an inverse.
      bytes: temporary bytes of the gradient: reversible, checkpoint, stored.
    """

    tokens: int
    distances: dict[str, Distance]
    no_source: str | None
    loss: float
    plain_loss: float
    canary: int
    unsafe: int
    largest_x: list[float]
    gradient_error: float | None
    bytes: dict[str, int]


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


def measure(
    config: ModelConfig, params: dict[str, Any], x: np.ndarray, source: np.ndarray | None, no_source: str | None
) -> Fidelity:
    """Compares the networks that `params` are, on `x`: see `probe`.

    Args:
      config: of the reversible network.
      params: nested, of numpy's arrays.
      source: the logits of transformers, if there are any.
    """
    plain = _plain(config)
    logits = {
        "plain": _logits(plain, params, x),
        "rounding": _logits(dataclasses.replace(plain, exact=True), params, x),
        "coupling": _logits(dataclasses.replace(config, dtype="float32"), params, x),
        "dtype": _logits(config, params, x),
    }
    beside = {"rounding": "plain", "coupling": "plain", "dtype": "coupling"}
    distances = {} if source is None else {"source": distance(logits["plain"], source)}
    distances |= {name: distance(logits[name], logits[other]) for name, other in beside.items()}
    if not isinstance(plain, VisionConfig):
        distances["packed"] = distance(_packed_logits(plain, params, x), logits["plain"])
        alone = x[:1, : x.shape[1] - _PADDING]
        distances["padded"] = distance(_padded_logits(plain, params, x), _logits(plain, params, alone))
    reversible = parse_coupling(config.coupling).reversible
    plan = "nothing" if reversible else "inputs"
    report, grads = _gradients(config, plan, params, x)
    error = _distance_of(grads, _gradients(config, "all", params, x)[1]) if reversible else None
    return Fidelity(
        tokens=len(x) if isinstance(config, VisionConfig) else x.size,
        distances=distances,
        no_source=no_source,
        loss=_loss(config, params, x),
        plain_loss=_loss(plain, params, x),
        canary=int(report.canary),
        unsafe=int(report.unsafe),
        largest_x=[float(x) for x in np.concatenate([np.asarray(s)[:, 2] for s in report.stacks.values()])],
        gradient_error=error,
        bytes=activation_memory(config, len(x), x.shape[1], plan=plan),
    )


@dataclasses.dataclass(frozen=True)
class Departure:
    """What a reversible network becomes by going out as the ordinary one: of logits in float32, and of the loss."""

    tokens: int
    distance: Distance
    loss: float  # of the network that was trained, nats a token
    stock_loss: float  # of the ordinary network, with parameters of the dtype that they go out in


def departure(config: ModelConfig, params: dict[str, Any], x: np.ndarray, dtype: str) -> Departure:
    """Compares the network of `config` with what goes out: b = 0, and parameters rounded to `dtype`."""
    rounded = jax.tree.map(lambda p: p.astype(jnp.dtype(dtype)).astype(p.dtype), params)
    trained, plain = dataclasses.replace(config, dtype="float32"), _plain(config)
    apart = distance(_logits(plain, rounded, x), _logits(trained, params, x))
    size = len(x) if isinstance(config, VisionConfig) else x.size
    return Departure(size, apart, _loss(trained, params, x), _loss(plain, rounded, x))


def describe_departure(found: Departure) -> str:
    """In two lines."""
    d = found.distance
    apart = f"of logits: largest difference {d.largest:.1e}, KL {d.kl:.1e}, top-1 {d.top1:.2%}"
    lines = {
        "as trained": f"{found.loss:.4f} nats a token, on {found.tokens:,} tokens of text",
        "as it leaves": f"{found.stock_loss:.4f} nats a token; {apart}",
    }
    return "\n".join(f"{name:<12} {text}" for name, text in lines.items())


def _plain(config: ModelConfig) -> ModelConfig:
    """The ordinary network of the same parameters, in float32."""
    return dataclasses.replace(config, coupling="residual", readout="auto", exact=False, dtype="float32")


def fitting_fraction_bits(config: ModelConfig, largest_x: float) -> int:
    """Fraction bits with which streams hold eight times `largest_x`; those of `config` where they do."""
    room = 31 - 3 - math.ceil(math.log2(max(largest_x, 1.0)))
    return max(min(config.fraction_bits, room), 1)


def distance(a: np.ndarray, b: np.ndarray) -> Distance:
    """Between logits (B, ..., V); the divergence is KL(b || a)."""
    p, q = _log_softmax(b), _log_softmax(a)
    return Distance(
        largest=float(np.abs(a - b).max() / np.abs(b).max()),
        kl=float(np.sum(np.exp(p) * (p - q), axis=-1).mean()),
        top1=float((a.argmax(-1) == b.argmax(-1)).mean()),
    )


def describe_fidelity(found: Fidelity) -> str:
    """A table, and what it needs."""
    names = {
        "source": "float32 here beside transformers",
        "rounding": "integer streams beside float streams",
        "coupling": "reversible beside the ordinary network",
        "dtype": "as it will run beside float32",
        "packed": "two texts in a row beside each alone",
        "padded": "with padding (a decoder: and a cache) beside",
    }
    rows = [f"{'':<40} {'largest':>9} {'KL':>9} {'top-1':>7}"]
    for name, what in names.items():
        if name in found.distances:
            d = found.distances[name]
            rows.append(f"{what:<40} {d.largest:>9.1e} {d.kl:>9.1e} {d.top1:>7.2%}")
        elif name == "source":
            rows.append(f"{what:<40} not measured: {found.no_source}")
    exact = f"canary {found.canary}, unsafe {found.unsafe}, largest |x| {max(found.largest_x):.3g}"
    if found.gradient_error is not None:
        exact += f", gradients beside the stored run's {found.gradient_error:.1e}"
    memory = ", ".join(
        f"{in_bytes(found.bytes[how])} {what}"
        for how, what in [("reversible", "here"), ("checkpoint", "with jax.checkpoint"), ("stored", "stored")]
    )
    lines = {
        "distance": f"of logits, on {found.tokens:,} tokens of text (largest: as a part of the largest logit)",
        "loss": f"{found.loss:.4f} nats a token; the ordinary network {found.plain_loss:.4f}",
        "exact": exact,
        "memory": f"{memory} (temporary bytes of the gradient on these tokens)",
    }
    text = [f"{name:<12} {line}" for name, line in lines.items()]
    return "\n".join([text[0], *(f"{'':<12} {row}" for row in rows), *text[1:]])


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


def _logits(config: ModelConfig, params: dict[str, Any], x: np.ndarray) -> np.ndarray:
    plan = "nothing" if parse_coupling(config.coupling).reversible else "inputs"
    model = _model(config, plan, params)
    run = jax.jit(lambda model, inputs: model(*inputs))
    return np.concatenate([np.asarray(run(model, _inputs(config, row[None]))) for row in x])  # a row of logits at once


def _packed_logits(config: ModelConfig, params: dict[str, Any], tokens: np.ndarray) -> np.ndarray:
    """All rows as texts of one row."""
    rows, length = tokens.shape
    segment_ids, positions = np.divmod(np.arange(tokens.size, dtype=np.int32)[None], length)
    given = {"segment_ids": segment_ids, "positions": positions}
    if isinstance(config, EncoderDecoderConfig):
        given = {"source_segment_ids": segment_ids, "target_segment_ids": segment_ids}
    run = jax.jit(lambda model, inputs: model(*inputs, **given))
    inputs = tuple(x.reshape(1, -1) for x in _inputs(config, tokens))
    return np.asarray(run(_model(config, "inputs", params), inputs)).reshape(rows, length, -1)


def _padded_logits(config: ModelConfig, params: dict[str, Any], tokens: np.ndarray) -> np.ndarray:
    """Of the first row without its last tokens, with as much padding instead, in a batch with a row that has none."""
    length = tokens.shape[1]
    model = _model(config, "inputs", params)
    if not isinstance(config, DecoderConfig):
        is_text = np.ones((2, length), np.int32)
        is_text[0, length - _PADDING :] = 0
        batch = np.where(is_text > 0, tokens[:2], 0)
        named = "source_segment_ids" if isinstance(config, EncoderDecoderConfig) else "segment_ids"
        run = jax.jit(lambda model, inputs: model(*inputs, **{named: is_text})[:1, : length - _PADDING])
        if isinstance(config, EncoderDecoderConfig):
            alone = _inputs(config, tokens[:1, : length - _PADDING])
            of_target = jnp.concatenate([jnp.repeat(alone[1], 2, 0), jnp.zeros((2, _PADDING), jnp.int32)], axis=1)
            return np.asarray(run(model, (jnp.asarray(batch), of_target)))
        return np.asarray(run(model, (jnp.asarray(batch),)))
    padded = np.where(np.arange(length) < _PADDING, 0, np.roll(tokens, _PADDING, axis=1))
    batch, padding_B = np.stack([padded[0], tokens[-1]]), jnp.array([_PADDING, 0], jnp.int32)

    def run_decoder(model, batch):
        return model.decode(batch, model.init_cache(2, batch.shape[1], padding_B))[0][:1, _PADDING:]

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


def _gradients(config: ModelConfig, plan: str, params: dict[str, Any], x: np.ndarray):
    loss = lambda model, x, key: _mean_loss(config, x)(model, key)
    step = jax.jit(value_and_grad(loss))
    (_, report), grads = step(_model(config, plan, params), jnp.asarray(x), jax.random.key(0))
    return report, grads


def _loss(config: ModelConfig, params: dict[str, Any], x: np.ndarray) -> float:
    plan = "nothing" if parse_coupling(config.coupling).reversible else "inputs"
    run = jax.jit(lambda model, x: _mean_loss(config, x)(model, None))
    return float(run(_model(config, plan, params), jnp.asarray(x)))


def _distance_of(a: Any, b: Any) -> float:
    squares = lambda tree: sum(float(jnp.sum(jnp.square(x.astype(jnp.float32)))) for x in jax.tree.leaves(tree))
    difference = jax.tree.map(lambda x, y: x.astype(jnp.float32) - y.astype(jnp.float32), a, b)
    return math.sqrt(squares(difference) / max(squares(b), 1e-30))


def _log_softmax(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64) - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))
