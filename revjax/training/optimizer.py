"""How parameters follow their gradients: optax, with the choices that language models are trained with.

g <- g min(1, clip_norm / |g|)        w <- w - lr(t) (direction(g) + weight_decay w)        decay: matrices only

adamw      m / (sqrt(v) + eps)                              (arXiv:1711.05101)
lion       sign(b1 m + (1 - b1) g)                          (arXiv:2302.06675)
adafactor  g / sqrt(v), v kept as a row and a column        (arXiv:1804.04235)
muon       m made orthogonal, 0.2 the size of its longer side to the power 1/2, so that learning rates and
           decay are AdamW's; it is for the matrices inside the network, the rest has AdamW
           (kellerjordan.github.io/posts/muon, arXiv:2502.16982)
sgd        m, the heavy-ball sum of gradients
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from ..config import import_function
from ..errors import ConfigError
from .norms import clip_by_global_norm

PyTree = Any
ELEMENTWISE = ("adamw", "lion", "sgd")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """How parameters follow their gradients."""

    name: str = "adamw"  # adamw, lion, adafactor, muon, sgd, or a function of your own: package.module:function
    learning_rate: float = 1e-3  # at its peak, after the warm-up
    schedule: str = "cosine"  # cosine, linear, wsd, constant, or a function of your own: package.module:function
    warmup_steps: int = 100  # updates from 0 to the peak
    warmup_tokens: int | None = None  # instead of warmup_steps
    decay_steps: int | None = None  # of wsd: the last updates, in which the rate falls; null is a tenth of all
    decay_tokens: int | None = None  # instead of decay_steps
    final_fraction: float = 0.1  # of the peak, where the schedule ends
    weight_decay: float = 0.1  # of matrices; norms, biases and embeddings have none
    clip_norm: float | None = 1.0  # largest norm of the gradient; null does not clip
    b1: float = 0.9  # memory of the mean gradient (adamw, lion)
    b2: float = 0.95  # memory of the mean square (adamw), of the mean gradient between updates (lion)
    momentum: float = 0.95  # memory of the mean gradient (muon, sgd)
    eps: float = 1e-8
    moment_dtype: Literal["float32", "bfloat16"] = "float32"  # in which mean gradients are kept
    # Update each layer in the backward pass, so that gradients need next to no memory: one_sweep clips each branch of
    # each layer by itself; two_sweeps by the norm of all, in twice the time. Null updates after it.
    in_backward: Literal["one_sweep", "two_sweeps"] | None = None

    def __post_init__(self):
        for name in ("learning_rate", "eps"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a number above 0, but got {getattr(self, name)}.")
        for name in ("warmup_steps", "weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be at least 0, but got {getattr(self, name)}.")
        for name in ("warmup_tokens", "decay_steps", "decay_tokens"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, or null, but got {getattr(self, name)}.")
        if not 0 <= self.final_fraction <= 1:
            raise ValueError(f"final_fraction must be in [0, 1], but got {self.final_fraction}.")
        for name in ("b1", "b2", "momentum"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), but got {getattr(self, name)}.")
        if self.in_backward is not None and self.name not in ELEMENTWISE:
            raise ValueError(
                f"in_backward needs an optimizer that treats each element by itself ({', '.join(ELEMENTWISE)}), but "
                f"got {self.name!r}."
            )
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ValueError(f"clip_norm must be above 0, or null for none, but got {self.clip_norm}.")

    def in_steps(self, tokens_per_step: int) -> "OptimizerConfig":
        """This configuration with what it says in tokens said in updates, rounded up."""
        steps = {
            f"{name}_steps": -(-tokens // tokens_per_step)
            for name in ("warmup", "decay")
            if (tokens := getattr(self, f"{name}_tokens")) is not None
        }
        return dataclasses.replace(self, **steps)


def make_optimizer(config: OptimizerConfig, schedule: Callable[[Any], jax.Array]) -> optax.GradientTransformation:
    """Returns the optimizer of `config` for a pytree of parameters, after clipping.

    `config.name` may name a function of the user's own: it gets `(config, schedule)` and returns an optax
    transformation, learning rate and all. Raises `ConfigError` where there is none of that name.
    """
    clip = optax.identity() if config.clip_norm is None else clip_by_global_norm(config.clip_norm)
    if config.name not in DIRECTIONS:
        make = import_function(config.name, what="optimizer", known=DIRECTIONS, takes=("config", "schedule"))
        own = make(config, schedule)
        if not isinstance(own, optax.GradientTransformation):
            raise ConfigError(
                f"The optimizer {config.name!r} must return an optax transformation, but got {type(own).__name__}."
            )
        return optax.chain(clip, own)
    return optax.chain(
        clip,
        DIRECTIONS[config.name](config),
        optax.add_decayed_weights(config.weight_decay, mask=is_decayed),
        optax.scale_by_learning_rate(schedule),
    )


def _adam(config: OptimizerConfig) -> optax.GradientTransformation:
    return optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps, mu_dtype=config.moment_dtype)


def _adafactor(config: OptimizerConfig) -> optax.GradientTransformation:
    # Without optax's scaling by the size of the parameters, so that learning rates mean what they do elsewhere.
    return optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0))


def _muon(config: OptimizerConfig) -> optax.GradientTransformation:
    axes = lambda params: jax.tree.map_with_path(lambda path, x: MuonDimensionNumbers(*_sides(path, x)), params)

    def rescale(path, update):
        longer = max(math.prod(update.shape[i] for i in side) for side in _sides(path, update))
        return 0.2 * math.sqrt(longer) * update

    muon = optax.chain(
        scale_by_muon(beta=config.momentum, mu_dtype=config.moment_dtype, weight_dimension_numbers=axes),
        optax.stateless(lambda updates, params: jax.tree.map_with_path(rescale, updates)),
    )
    labels = lambda params: jax.tree.map_with_path(lambda path, x: "muon" if _sides(path, x) else "adam", params)
    return optax.partition({"muon": muon, "adam": _adam(config)}, labels)


DIRECTIONS: dict[str, Callable[[OptimizerConfig], optax.GradientTransformation]] = {
    "adamw": _adam,
    "lion": lambda config: optax.scale_by_lion(b1=config.b1, b2=config.b2, mu_dtype=config.moment_dtype),
    "adafactor": _adafactor,
    "muon": _muon,
    "sgd": lambda config: optax.trace(config.momentum, accumulator_dtype=jnp.dtype(config.moment_dtype)),
}


def is_decayed(params: PyTree) -> PyTree:
    """Returns a bool for each parameter: whether weight decay pulls at it.

    Parameters are named by their path: whatever has "norm", "bias", "scale" or an embedding "table" in it is
    not decayed, and neither is a vector. (Stacked layers make matrices of vectors, so shapes alone do not tell.)
    """
    return jax.tree.map_with_path(_is_matrix, params)


def _is_matrix(path, x) -> bool:
    name = jax.tree_util.keystr(path).lower()
    return x.ndim >= 2 and not any(word in name for word in ("norm", "bias", "scale", "table", "embedding"))


def _sides(path, x) -> tuple[tuple[int, ...], ...]:
    """Which axes of a parameter are a matrix's inputs, and which its outputs; () where it is no matrix of the inside.

    Inputs are all axes but the last, as of a convolution or of an attention's output; queries, keys and values have
    one axis of inputs, and heads and channels as outputs. In a stack, the first axis counts layers.
    """
    names = [str(getattr(k, "key", getattr(k, "idx", getattr(k, "name", "")))) for k in path]
    axes = tuple(range(x.ndim))[1 if "runs" in names else 0 :]
    if not _is_matrix(path, x) or len(axes) < 2 or "head" in names:
        return ()
    inputs = 1 if {"query", "key", "value"} & set(names) else len(axes) - 1
    return axes[:inputs], axes[inputs:]
