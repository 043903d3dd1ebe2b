"""A vision transformer that classifies images (ViT, arXiv:2010.11929).

x = [class token, patches W] + positions        without a class token where pooling is "mean"
h = read-out of the layers                       every patch sees every other
logits = h[class token] W + bias                 or of the mean of all patches
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from ..core.plan import Plan
from ..nn import LearnedPositions, Linear
from ..nn.cross_entropy import checked_weights
from .branches import layers_of
from .lora import add_adapters
from .tower import Tower, both_streams, cast_parameters
from .transformer_config import TransformerConfig

_STD = 0.5  # of positions and of the class token, at the start


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionConfig(TransformerConfig):
    """The shape of a vision transformer. Sizes count elements; `None` is filled in as said."""

    family: Literal["vision"] = "vision"
    image_size: int = 32  # height and width, in pixels
    patch_size: int = 4  # height and width, in pixels
    channels: int = 3
    num_classes: int = 10
    pooling: Literal["class", "mean"] = "class"  # what the head reads
    image_mean: tuple[float, ...] = (0.5,)  # of pixels from 0 to 1, of all channels or of each: what scales bytes
    image_std: tuple[float, ...] = (0.5,)
    label_smoothing: float = 0.0  # share of each label that is spread over all classes
    activation: Literal["gelu", "gelu_exact", "silu", "relu"] = "gelu"
    gated: bool = False
    use_bias: bool = True
    norm: Literal["rms", "layer"] = "layer"
    positions: Literal["learned"] = "learned"
    second_stream: Literal["copy", "zero"] = "copy"  # begins as the first, or as 0

    def __post_init__(self):
        super().__post_init__()
        for name in ("image_size", "patch_size", "channels", "num_classes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, but got {getattr(self, name)}.")
        if self.image_size % self.patch_size:
            raise ValueError(
                f"patch_size must divide image_size, but got patch_size={self.patch_size} and "
                f"image_size={self.image_size}."
            )
        for name in ("image_mean", "image_std"):
            if len(values := getattr(self, name)) not in (1, self.channels):
                raise ValueError(f"{name} must have a number, or one for each of {self.channels} channels: {values}.")
        if not all(std > 0 for std in self.image_std):
            raise ValueError(f"image_std must be above 0, but got {self.image_std}.")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing must be at least 0 and below 1, but got {self.label_smoothing}.")

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @property
    def num_tokens(self) -> int:
        """Of an image: patches, and the class token."""
        return self.num_patches + (self.pooling == "class")


class VisionTransformer(Tower):
    """A classifier of images on a reversible stack.

    Args:
      config: its shape.
      plan, constrain, gather, rngs: as of `Decoder`.

    Example:
      >>> model = VisionTransformer(VisionConfig(num_layers=4), rngs=nnx.Rngs(0))
      >>> model(jnp.zeros((2, 32, 32, 3))).shape
      (2, 10)
    """

    def __init__(
        self,
        config: VisionConfig,
        *,
        plan: Plan = "nothing",
        constrain: Callable[[jax.Array], jax.Array] | None = None,
        gather: Callable[[Any], Any] | None = None,
        rngs: nnx.Rngs,
    ):
        self.config = config
        dtype, size = jnp.dtype(config.dtype), config.patch_size
        self.patches = Linear((size, size, config.channels), config.d_model, use_bias=True, dtype=dtype, rngs=rngs)
        # As large as what comes of patches: beside that, 0.02 (as in text) would hide where a patch is for long.
        self.positions = LearnedPositions(config.num_tokens, config.d_model, init_std=_STD, rngs=rngs)
        is_class = config.pooling == "class"
        self.class_token = nnx.Param(_STD * jax.random.normal(rngs.params(), (config.d_model,))) if is_class else None
        super().__init__(
            config, layers_of(config, causal=False), plan=plan, constrain=constrain, gather=gather, rngs=rngs
        )
        # Small, so that every class is about as likely at first; not 0, or nothing below it would have a gradient.
        self.head = Linear(config.d_model, config.num_classes, init_std=0.02, use_bias=True, dtype=dtype, rngs=rngs)
        cast_parameters(self, config.param_dtype)
        if config.lora is not None:
            add_adapters(self, config.lora, rngs=rngs)

    def __call__(self, images_BHWC: jax.Array, *, key: jax.Array | None = None) -> jax.Array:
        """Returns logits, (B, num_classes), fp32. Arguments as for `hidden`."""
        x_BTD = self.hidden(images_BHWC, key=key)
        x_BD = x_BTD[:, 0] if self.class_token is not None else jnp.mean(x_BTD, axis=1)
        return self.head(x_BD).astype(jnp.promote_types(x_BD.dtype, jnp.float32))

    def hidden(self, images_BHWC: jax.Array, *, key: jax.Array | None = None) -> jax.Array:
        """A vector for the class token, if there is one, and for each patch, row by row: (B, T, D).

        Args:
          images_BHWC: of the size that the model was built for: bytes (uint8), or floats that are scaled already, as
            `scaled` scales bytes.
          key: for dropout and other randomness of this step; None is evaluation.
        """
        x_BTD = self._embed(images_BHWC)
        return self.read_out(*self.stack.scan(both_streams(x_BTD, self.config.second_stream), key=key).streams)

    def scaled(self, images_BHWC: jax.Array) -> jax.Array:
        """Images of bytes as the floats that the model reads, fp32: (byte / 255 - image_mean) / image_std."""
        mean, std = (jnp.array(x)[None, None, None] for x in (self.config.image_mean, self.config.image_std))
        return (images_BHWC.astype(jnp.float32) / 255 - mean) / std

    def loss(
        self,
        images_BHWC: jax.Array,
        labels_B: jax.Array,
        weights_B: jax.Array | None = None,
        *,
        key: jax.Array | None = None,
        z_loss: float = 0.0,
    ) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
        """Returns (sum of cross-entropies in nats, sum of weights, {"accuracy": sum of weights of the right ones}).

        Args:
          labels_B: integers in [0, num_classes). Any other makes the loss NaN, unless its weight is 0.
          weights_B: None counts every image once; 0 leaves one out.
        """
        for name, x in (("labels_B", labels_B), ("weights_B", weights_B)):
            if x is not None and x.shape != images_BHWC.shape[:1]:
                raise ValueError(
                    f"{name} must be one number for each image, {images_BHWC.shape[:1]}, but got {x.shape}."
                )
        if not jnp.issubdtype(labels_B.dtype, jnp.integer):
            raise TypeError(f"labels_B must be integers, but got {labels_B.dtype}.")
        logits_BC = self(images_BHWC, key=key)
        weights_B = checked_weights(labels_B, weights_B, self.config.num_classes)
        log_p_BC = jax.nn.log_softmax(logits_BC)
        losses_B = -jnp.take_along_axis(log_p_BC, labels_B[:, None], axis=1, mode="clip")[:, 0]
        if share := self.config.label_smoothing:
            losses_B = (1 - share) * losses_B - share * jnp.mean(log_p_BC, axis=1)
        losses_B = losses_B + z_loss * jnp.square(jax.nn.logsumexp(logits_BC, axis=1)) if z_loss else losses_B
        right_B = (jnp.argmax(logits_BC, axis=1) == labels_B).astype(jnp.float32)
        return jnp.sum(weights_B * losses_B), jnp.sum(weights_B), {"accuracy": jnp.sum(weights_B * right_B)}

    def _embed(self, images_BHWC) -> jax.Array:
        config, size = self.config, self.config.patch_size
        wanted = (config.image_size, config.image_size, config.channels)
        if images_BHWC.ndim != 4 or images_BHWC.shape[1:] != wanted:
            raise ValueError(
                f"Images must have the shape (B, {', '.join(map(str, wanted))}), channels last, but got "
                f"{images_BHWC.shape}."
            )
        if images_BHWC.dtype == jnp.uint8:
            images_BHWC = self.scaled(images_BHWC)
        if not jnp.issubdtype(images_BHWC.dtype, jnp.floating):
            raise TypeError(f"Images must be bytes (uint8) or scaled floats, but got {images_BHWC.dtype}.")
        batch, side = images_BHWC.shape[0], config.image_size // size
        patches = images_BHWC.reshape(batch, side, size, side, size, config.channels).swapaxes(2, 3)
        x_BTD = self.patches(patches.reshape(batch, side * side, size, size, config.channels))
        x_BTD = x_BTD.astype(jnp.promote_types(x_BTD.dtype, jnp.float32))
        if self.class_token is not None:
            first = jnp.broadcast_to(self.class_token[...].astype(x_BTD.dtype), (batch, 1, config.d_model))
            x_BTD = jnp.concatenate([first, x_BTD], axis=1)
        positions_1T = jnp.arange(config.num_tokens, dtype=jnp.int32)[None]
        return x_BTD + jnp.broadcast_to(self.positions(positions_1T).astype(x_BTD.dtype), x_BTD.shape)
