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

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..core import parse_coupling
from ..memory import activation_memory
from ..models import ModelConfig, VisionConfig
from .plan_report import in_bytes
from .probing import PADDING, gradients_on, logits_on, loss_on, packed_logits_on, padded_logits_on


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
        "plain": logits_on(plain, params, x),
        "rounding": logits_on(dataclasses.replace(plain, exact=True), params, x),
        "coupling": logits_on(dataclasses.replace(config, dtype="float32"), params, x),
        "dtype": logits_on(config, params, x),
    }
    beside = {"rounding": "plain", "coupling": "plain", "dtype": "coupling"}
    distances = {} if source is None else {"source": distance(logits["plain"], source)}
    distances |= {name: distance(logits[name], logits[other]) for name, other in beside.items()}
    if not isinstance(plain, VisionConfig):
        distances["packed"] = distance(packed_logits_on(plain, params, x), logits["plain"])
        alone = x[:1, : x.shape[1] - PADDING]
        distances["padded"] = distance(padded_logits_on(plain, params, x), logits_on(plain, params, alone))
    reversible = parse_coupling(config.coupling).reversible
    plan = "nothing" if reversible else "inputs"
    report, grads = gradients_on(config, plan, params, x)
    error = _distance_of(grads, gradients_on(config, "all", params, x)[1]) if reversible else None
    return Fidelity(
        tokens=len(x) if isinstance(config, VisionConfig) else x.size,
        distances=distances,
        no_source=no_source,
        loss=loss_on(config, params, x),
        plain_loss=loss_on(plain, params, x),
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
    apart = distance(logits_on(plain, rounded, x), logits_on(trained, params, x))
    size = len(x) if isinstance(config, VisionConfig) else x.size
    return Departure(size, apart, loss_on(trained, params, x), loss_on(plain, rounded, x))


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
        "padded": "with padding beside without",
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


def _distance_of(a: Any, b: Any) -> float:
    squares = lambda tree: sum(float(jnp.sum(jnp.square(x.astype(jnp.float32)))) for x in jax.tree.leaves(tree))
    difference = jax.tree.map(lambda x, y: x.astype(jnp.float32) - y.astype(jnp.float32), a, b)
    return math.sqrt(squares(difference) / max(squares(b), 1e-30))


def _log_softmax(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64) - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))
