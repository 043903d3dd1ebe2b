"""How far a converted model is from the pretrained one, step by step, so that no error hides behind another.

    source      the ordinary network here (float streams, float32) beside that of transformers
    rounding    the ordinary network on integer streams beside it
    coupling    the reversible network, in float32, beside the ordinary one
    dtype       the reversible network as it will run beside the same in float32

    packed      the ordinary network on two texts in one row beside each alone
    padded      the ordinary network with a cache and padding before a text, as it generates, beside without

and then whether it is exact: the canary, elements that did not fit, gradients beside those of the stored run.
"""

import argparse
import dataclasses
import importlib.util
import math
import pathlib
import typing
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ..core import parse_coupling
from ..data import Tokenizer
from ..memory import activation_memory
from ..models import Decoder, DecoderConfig, value_and_grad
from ..training import split_abstract
from .plan_report import in_bytes

_ROWS, _LENGTH = 2, 600  # short prompts hide mistakes in rotary positions
_PADDING = 37  # tokens
_PROBE = pathlib.Path(argparse.__file__)  # a text that is on every machine


@dataclasses.dataclass(frozen=True)
class Distance:
    """Between the logits of two networks on the same tokens.

    Attributes:
      largest: difference of a logit, as a part of the largest logit.
      kl: KL divergence of the next token's distributions, nats a token.
      top1: share of tokens for which both have the same one as the likeliest.
    """

    largest: float
    kl: float
    top1: float


@dataclasses.dataclass(frozen=True)
class Fidelity:
    """What `measure` found; distances are those that the module's docstring names.

    Attributes:
      loss, plain_loss: cross-entropy of the reversible and of the ordinary network, nats a token.
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


def probe(tokenizer: Tokenizer, config: DecoderConfig) -> np.ndarray:
    """Tokens to compare on, (rows, T): text (random ones where the tokenizer has none of its words), in long rows."""
    length = min(_LENGTH, config.max_length) if config.positions == "learned" else _LENGTH
    tokens = tokenizer.encode(_PROBE.read_text(encoding="utf-8", errors="replace"))
    if len(set(tokens.tolist())) < _LENGTH // 10:  # it has no words for such a text
        tokens = np.random.default_rng(0).integers(0, tokenizer.vocab_size, _ROWS * length, dtype=np.int32)
    rows = np.resize(tokens, (_ROWS, length))
    rows[:, : len(tokenizer.begin)] = tokenizer.begin
    return rows


def source_logits(folder: pathlib.Path, tokens: np.ndarray) -> tuple[np.ndarray | None, str | None]:
    """Logits of the model in `folder` as transformers computes them in float32; or None, and why."""
    missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    if missing:
        return None, f"{' and '.join(missing)} not installed: pip install torch transformers"
    torch, transformers = (importlib.import_module(name) for name in ("torch", "transformers"))
    transformers.utils.logging.disable_progress_bar()
    options = {"dtype": torch.float32, "attn_implementation": "eager", "local_files_only": True}
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(str(folder), **options).eval()
        with torch.no_grad():
            rows = [model(torch.from_numpy(row[None].astype(np.int64))).logits[0].numpy() for row in tokens]
    except Exception as e:  # whatever it finds wrong: ours to report, not to die of
        return None, f"transformers cannot run it ({type(e).__name__}: {e})"
    return np.stack(rows), None


def measure(
    config: DecoderConfig, params: dict[str, Any], tokens: np.ndarray, source: np.ndarray | None, no_source: str | None
) -> Fidelity:
    """Compares the networks that `params` are, on `tokens`.

    Args:
      config: of the reversible network.
      params: nested, of numpy's arrays.
      source: the logits of transformers, if there are any.
    """
    plain = _plain(config)
    logits = {
        "plain": _logits(plain, params, tokens),
        "rounding": _logits(dataclasses.replace(plain, exact=True), params, tokens),
        "coupling": _logits(dataclasses.replace(config, dtype="float32"), params, tokens),
        "dtype": _logits(config, params, tokens),
    }
    beside = {"rounding": "plain", "coupling": "plain", "dtype": "coupling"}
    distances = {} if source is None else {"source": distance(logits["plain"], source)}
    distances |= {name: distance(logits[name], logits[other]) for name, other in beside.items()}
    distances["packed"] = distance(_packed_logits(plain, params, tokens), logits["plain"])
    padded = _padded_logits(plain, params, tokens)
    distances["padded"] = distance(padded, logits["plain"][:1, : padded.shape[1]])
    reversible = parse_coupling(config.coupling).reversible
    plan = "nothing" if reversible else "inputs"
    report, grads = _gradients(config, plan, params, tokens)
    error = _distance_of(grads, _gradients(config, "all", params, tokens)[1]) if reversible else None
    return Fidelity(
        tokens=tokens.size,
        distances=distances,
        no_source=no_source,
        loss=_loss(logits["dtype"], tokens),
        plain_loss=_loss(logits["plain"], tokens),
        canary=int(report.canary),
        unsafe=int(report.unsafe),
        largest_x=[float(x) for x in np.concatenate([np.asarray(s)[:, 2] for s in report.stacks.values()])],
        gradient_error=error,
        bytes=activation_memory(config, len(tokens), tokens.shape[1], plan=plan),
    )


@dataclasses.dataclass(frozen=True)
class Departure:
    """What a reversible network becomes by going out as the ordinary one: of logits in float32, and of the loss."""

    tokens: int
    distance: Distance
    loss: float  # of the network that was trained, nats a token
    stock_loss: float  # of the ordinary network, with parameters of the dtype that they go out in


def departure(config: DecoderConfig, params: dict[str, Any], tokens: np.ndarray, dtype: str) -> Departure:
    """Compares the network of `config` with what goes out: b = 0, and parameters rounded to `dtype`."""
    rounded = jax.tree.map(lambda p: p.astype(jnp.dtype(dtype)).astype(p.dtype), params)
    before = _logits(dataclasses.replace(config, dtype="float32"), params, tokens)
    after = _logits(_plain(config), rounded, tokens)
    return Departure(tokens.size, distance(after, before), _loss(before, tokens), _loss(after, tokens))


def describe_departure(found: Departure) -> str:
    """In two lines."""
    d = found.distance
    apart = f"of logits: largest difference {d.largest:.1e}, KL {d.kl:.1e}, top-1 {d.top1:.2%}"
    lines = {
        "as trained": f"{found.loss:.4f} nats a token, on {found.tokens:,} tokens of text",
        "as it leaves": f"{found.stock_loss:.4f} nats a token; {apart}",
    }
    return "\n".join(f"{name:<12} {text}" for name, text in lines.items())


def _plain(config: DecoderConfig) -> DecoderConfig:
    """The ordinary network of the same parameters, in float32."""
    return dataclasses.replace(config, coupling="residual", readout="auto", exact=False, dtype="float32")


def fitting_fraction_bits(config: DecoderConfig, largest_x: float) -> int:
    """Fraction bits with which streams hold eight times `largest_x`; those of `config` where they do."""
    room = 31 - 3 - math.ceil(math.log2(max(largest_x, 1.0)))
    return max(min(config.fraction_bits, room), 1)


def distance(a: np.ndarray, b: np.ndarray) -> Distance:
    """Between logits (B, T, V); the divergence is KL(b || a)."""
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
        "padded": "with a cache and padding beside without",
    }
    rows = [f"{'':<40} {'largest':>9} {'KL':>9} {'top-1':>7}"]
    for name, what in names.items():
        if name in found.distances:
            d = found.distances[name]
            rows.append(f"{what:<40} {d.largest:>9.1e} {d.kl:>9.1e} {d.top1:>7.2%}")
        else:
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


def _decoder(config: DecoderConfig, plan: str, params: dict[str, Any]) -> Decoder:
    skeleton, shapes = split_abstract(lambda: Decoder(config, plan=plan, rngs=nnx.Rngs(0)))
    params = jax.tree.map(lambda shape, x: jnp.asarray(x, shape.dtype), shapes, params)
    return typing.cast(Decoder, skeleton.merge(params))


def _logits(config: DecoderConfig, params: dict[str, Any], tokens: np.ndarray) -> np.ndarray:
    plan = "nothing" if parse_coupling(config.coupling).reversible else "inputs"
    model = _decoder(config, plan, params)
    run = jax.jit(lambda model, tokens: model(tokens))
    return np.concatenate([np.asarray(run(model, jnp.asarray(row[None]))) for row in tokens])  # a row of logits at once


def _packed_logits(config: DecoderConfig, params: dict[str, Any], tokens: np.ndarray) -> np.ndarray:
    """All rows as texts of one row."""
    rows, length = tokens.shape
    segment_ids, positions = np.divmod(np.arange(tokens.size, dtype=np.int32)[None], length)
    run = jax.jit(lambda model, tokens: model(tokens, segment_ids=segment_ids, positions=positions))
    found = run(_decoder(config, "inputs", params), jnp.asarray(tokens.reshape(1, -1)))
    return np.asarray(found).reshape(rows, length, -1)


def _padded_logits(config: DecoderConfig, params: dict[str, Any], tokens: np.ndarray) -> np.ndarray:
    """Of the first row's beginning, after padding, in a batch with a row that has none."""
    padded = np.where(np.arange(tokens.shape[1]) < _PADDING, 0, np.roll(tokens, _PADDING, axis=1))
    batch, padding_B = np.stack([padded[0], tokens[-1]]), jnp.array([_PADDING, 0], jnp.int32)

    def run(model, batch):
        return model.decode(batch, model.init_cache(2, batch.shape[1], padding_B))[0][:1, _PADDING:]

    return np.asarray(jax.jit(run)(_decoder(config, "inputs", params), jnp.asarray(batch)))


def _gradients(config: DecoderConfig, plan: str, params: dict[str, Any], tokens: np.ndarray):
    def loss_fn(model, tokens, key):
        total, count = model.loss(tokens[:, :-1], tokens[:, 1:], key=key)
        return total / count

    step = jax.jit(value_and_grad(loss_fn))
    (_, report), grads = step(_decoder(config, plan, params), jnp.asarray(tokens), jax.random.key(0))
    return report, grads


def _distance_of(a: Any, b: Any) -> float:
    squares = lambda tree: sum(float(jnp.sum(jnp.square(x.astype(jnp.float32)))) for x in jax.tree.leaves(tree))
    difference = jax.tree.map(lambda x, y: x.astype(jnp.float32) - y.astype(jnp.float32), a, b)
    return math.sqrt(squares(difference) / max(squares(b), 1e-30))


def _loss(logits: np.ndarray, tokens: np.ndarray) -> float:
    log_p = _log_softmax(logits)[:, :-1]
    return float(-np.take_along_axis(log_p, tokens[:, 1:, None].astype(np.int64), axis=-1).mean())


def _log_softmax(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64) - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))
