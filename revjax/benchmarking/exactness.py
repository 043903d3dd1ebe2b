"""Is every stream rebuilt to the bit? For each coupling, after training, beside float streams and unpinned ones.

Branches are scaled until |x| reaches a few tens, dropout is on, and the compiler has its default flags:
errors that float streams show only after training show at once.
"""

import contextlib
import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from ..core import trace
from ..memory import activation_memory
from ..models import (
    Decoder,
    DecoderConfig,
    EncoderConfig,
    EncoderDecoderConfig,
    ModelConfig,
    VisionConfig,
    example_batch,
    loss_of,
    make_model,
    stacks_of,
    value_and_grad,
)
from ..nn import RopeScaling

EXACT_COUPLINGS = (
    "revnet",
    "midpoint:0.5",
    "leapfrog:0.5",
    "momentum:0.5",
    "momentum:0.25",
    "momentum:0.0625",
) + tuple(f"{name}:{shift}" for name in ("near-residual", "bdia") for shift in (1, 2, 4))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExactnessConfig:
    """One coupling at one shape. `drift` also asks float streams and unpinned ones, in the same table."""

    coupling: str
    num_layers: int
    d_model: int
    sequence_length: int
    batch_size: int
    steps: int = 1
    drift: bool = True
    dtype: str = "bfloat16"
    num_heads: int | None = None  # d_model / 32
    qk_norm: bool = False
    scale_to: float = 20.0  # |x| that branches are scaled to reach
    learning_rate: float = 1e-4

    def model(self) -> ModelConfig:
        return DecoderConfig(
            num_layers=self.num_layers,
            d_model=self.d_model,
            num_heads=self.num_heads or self.d_model // 32,
            qk_norm=self.qk_norm,
            dropout=0.1,
            coupling=self.coupling,
            dtype=self.dtype,  # pyright: ignore[reportArgumentType]
        )


_GEMMA: dict[str, Any] = dict(norm_offset=1.0, post_norm=True, activation="gelu", window=24, embedding_scale=8.0)
FAMILIES: dict[str, dict[str, Any]] = {  # what each family of pretrained models has that Llama has not
    "gpt2": dict(norm="layer", use_bias=True, gated=False, positions="learned", activation="gelu"),
    "llama": dict(num_kv_heads=2, rope_scaling=RopeScaling(kind="llama3", factor=8.0, original_max_length=32)),
    "mistral": dict(num_kv_heads=2, window=24, tie_embeddings=False),
    "qwen2": dict(qkv_bias=True, window=24, layer_pattern=("global", "local")),
    "qwen3": dict(
        num_kv_heads=2, qk_norm=True, rope_scaling=RopeScaling(kind="yarn", factor=4.0, original_max_length=32)
    ),
    "gemma2": _GEMMA | dict(layer_pattern=("local", "global"), attention_softcap=50.0, logit_softcap=30.0),
    "gemma3": _GEMMA
    | dict(layer_pattern=("local",) * 5 + ("global",), qk_norm=True, local_rope_base=1e4, rope_base=1e6),
    "bert": dict(norm_placement="post", positions="learned", token_kinds=2),
    "vit": dict(image_size=32, patch_size=4),
    "t5": dict(positions="relative", attention_scale=1.0, gated=False, activation="relu"),
}
OTHER_FAMILIES = ("encoder", "vision", "encoder-decoder")  # as they are trained from scratch
_OTHERS: dict[str, type[ModelConfig]] = {
    **{"bert": EncoderConfig, "vit": VisionConfig, "t5": EncoderDecoderConfig},
    **dict(zip(OTHER_FAMILIES, (EncoderConfig, VisionConfig, EncoderDecoderConfig), strict=True)),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class FamilyConfig(ExactnessConfig):
    """A family of pretrained models, with a coupling that comes near to the ordinary network."""

    family: str
    stochastic_depth: float = 0.1

    def model(self) -> ModelConfig:
        return _OTHERS.get(self.family, DecoderConfig)(
            num_layers=self.num_layers,
            d_model=self.d_model,
            num_heads=4,
            dropout=0.1,
            stochastic_depth=self.stochastic_depth,
            coupling=self.coupling,
            dtype=self.dtype,  # pyright: ignore[reportArgumentType]
            **FAMILIES.get(self.family, {}),
        )


def family_memory(config: FamilyConfig) -> dict[str, int | str]:
    """Temporary bytes of the gradient by "reversible", "checkpoint" and "stored", without dropout."""
    found = activation_memory(config.model(), config.batch_size, config.sequence_length)
    return dataclasses.asdict(config) | found


def exactness(config: ExactnessConfig) -> dict[str, float | str]:
    """Trains for `steps` updates and returns, over all of them, rows rebuilt wrong, unsafe elements, the largest |x|.

    With `drift`, also how many rows come back wrong without pinning (one step), and how far float32 streams are
    off when the whole stack is inverted, relative to the largest |x|.
    """
    model = make_model(config.model(), plan="nothing", rngs=nnx.Rngs(0))
    batch = random_batch(config.model(), config.batch_size, config.sequence_length)
    model = scaled_until(model, batch, config.scale_to)
    row = dataclasses.asdict(config) | _train(model, batch, config.steps, config.learning_rate)
    if config.drift:
        assert isinstance(model, Decoder)
        key = jax.random.key(2)
        with unpinned():
            row["unpinned_rows_wrong"] = float(jax.jit(lambda m: _gradient(m, batch, key)[0][1].canary)(model))
        model.stack.exact = False
        x = model.embedding.encode(batch["tokens"][:, :-1])
        error = float(model.stack.reconstruction_error(x, key=key).max()) / row["max_abs"]
        row["float_error"] = error if math.isfinite(error) else None  # JSON has no infinity
    return row


def random_batch(config: ModelConfig, rows: int, length: int) -> dict[str, jax.Array]:
    """What `loss_of(config)` takes, of random numbers."""
    below = {"labels": config.num_classes, "images": 256} if isinstance(config, VisionConfig) else {}
    draw = lambda name, x: jax.random.randint(
        jax.random.key(1), x.shape, 0, below.get(name) or getattr(config, "vocab_size", 0)
    ).astype(x.dtype)
    return {name: draw(name, x) for name, x in example_batch(config, rows, length).items()}


@contextlib.contextmanager
def unpinned():
    """For measuring what pinning is for: inside, f's are run as they are."""
    pinned, trace.evaluate_pinned = trace.evaluate_pinned, lambda closed, args, zero: trace.evaluate(closed, args)
    try:
        yield
    finally:
        trace.evaluate_pinned = pinned


def scaled_until(model: Any, batch: dict[str, jax.Array], target: float) -> Any:
    """The model with what ends a branch (a projection, or a norm) multiplied until the largest |x| passes `target`."""
    step = jax.jit(lambda model: _gradient(model, batch, jax.random.key(2))[0][1].max_abs)
    offset, ends_in_norm = model.config.norm_offset, model.config.norm_placement == "post"

    def grown(path, a):
        name = jax.tree_util.keystr(path)
        if "post_norm" in name or (ends_in_norm and "'norm'" in name):
            return (a + offset) * 1.5 - offset
        return a * 1.5 if _is_output(path) else a

    for _ in range(12):
        if float(step(model)) >= target:
            return model
        for stack in stacks_of(model).values():
            nnx.update(stack, jax.tree_util.tree_map_with_path(grown, nnx.state(stack, nnx.Param)))
    raise ValueError(f"No scale of the branches brought |x| to {target}.")


def _is_output(path) -> bool:
    return any(f"'{name}'" in str(key) for key in path for name in ("out", "down"))


def _gradient(model, batch, key):
    loss = lambda model: jnp.divide(*loss_of(model.config)(model, batch, key)[:2])
    return value_and_grad(loss)(model)


def _train(model: Any, batch: dict[str, jax.Array], steps: int, learning_rate: float) -> dict[str, float]:
    optimizer = optax.adamw(learning_rate)
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    @jax.jit
    def step(params, opt_state, rest, key):
        (loss, report), grads = _gradient(nnx.merge(graphdef, params, rest), batch, key)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, (loss, report.canary, report.unsafe, report.max_abs)

    opt_state, seen = optimizer.init(params), []
    for i in range(steps):
        params, opt_state, metrics = step(params, opt_state, rest, jax.random.fold_in(jax.random.key(3), i))
        seen.append([float(m) for m in metrics])
    loss, canary, unsafe, max_abs = np.array(seen).T
    return {
        "rows_wrong_first_step": float(canary[0]),
        "rows_wrong": float(canary.sum()),
        "unsafe": float(unsafe.sum()),
        "max_abs": float(max_abs.max()),
        "first_loss": float(loss[0]),
        "last_loss": float(loss[-1]),
    }
