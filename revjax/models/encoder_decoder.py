"""An encoder and a decoder that attends to it (T5, arXiv:1910.10683; the encoder is a differentiated context).

    c = encoder(embed(source))                          every token sees every other
    logits = decoder(embed(target), c) . head           for each layer: self-attention, attention to c, MLP

Positions are rotary, or `relative`: a bias of attention's scores, from a table that all layers of a tower share. Such
a bias needs all scores of a layer at once, so memory grows with the square of the length then, though not with depth.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from ..core.plan import Plan
from ..nn import Embedding, Linear, cross_entropy
from .branches import AttentionBranch, CrossAttentionBranch, MLPBranch, RelativeAttentionBranch
from .lora import add_adapters
from .masking import mask_tokens
from .tower import Tower, both_streams, cast_parameters
from .transformer_config import TransformerConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderDecoderConfig(TransformerConfig):
    """The shape of an encoder-decoder. Sizes count elements; `None` is filled in as said."""

    family: Literal["encoder-decoder"] = "encoder-decoder"
    vocab_size: int = 258
    num_decoder_layers: int | None = None  # as num_layers, which are the encoder's
    positions: Literal["rotary", "relative"] = "rotary"
    relative_buckets: int = 32  # of relative positions: how many distances are told apart
    relative_max_distance: int = 128  # from which on all are the same
    granularity: Literal["branch"] = "branch"
    second_stream: Literal["copy", "zero"] = "copy"  # begins as the first, or as 0
    embedding_scale: float = 1.0  # tokens' vectors are multiplied by it
    logit_scale: float | None = None  # of what the head reads (T5 with a tied head: 1 / sqrt(d_model)); null is 1
    tie_embeddings: bool = True
    start_token: int | None = None  # what a target begins with; null is the last of the vocabulary
    mask_token: int | None = None  # what hides tokens of a source in training; null is the last but one
    mask_rate: float = 0.3  # share of the source's tokens that are hidden
    loss_tile: int = 256  # tokens that have logits at one time

    def __post_init__(self):
        super().__post_init__()
        for name in ("num_decoder_layers", "loss_tile"):
            if (getattr(self, name) or 1) < 1:
                raise ValueError(f"{name} must be at least 1, but got {getattr(self, name)}.")
        if self.vocab_size < 3:
            raise ValueError(f"vocab_size must be at least 3: a token, a mask and a start; but got {self.vocab_size}.")
        if self.layer_pattern or self.window is not None:
            raise ValueError("An encoder-decoder has no windows: leave out window and layer_pattern.")
        if not 0 < self.mask_rate <= 1:
            raise ValueError(f"mask_rate must be above 0 and at most 1, but got {self.mask_rate}.")
        for name in ("start_token", "mask_token"):
            token = getattr(self, name)
            if token is not None and not 0 <= token < self.vocab_size:
                raise ValueError(f"{name} must be a token, 0 to {self.vocab_size - 1}, or null, but got {token}.")
        for name in ("embedding_scale", "logit_scale"):
            if (scale := getattr(self, name)) is not None and not 0 < scale < float("inf"):
                raise ValueError(f"{name} must be above 0, but got {scale}.")

    @property
    def decoder_layers(self) -> int:
        return self.num_layers if self.num_decoder_layers is None else self.num_decoder_layers

    @property
    def start(self) -> int:
        """The token that a target begins with."""
        return self.vocab_size - 1 if self.start_token is None else self.start_token

    @property
    def mask(self) -> int:
        """The token that hides others."""
        return self.vocab_size - 2 if self.mask_token is None else self.mask_token


class EncoderDecoder(nnx.Module):
    """A sequence-to-sequence model on two reversible stacks.

    Args:
      config: its shape.
      plan, constrain, gather, rngs: as of `Decoder`; the plan is that of both stacks.

    Example:
      >>> model = EncoderDecoder(EncoderDecoderConfig(num_layers=4), rngs=nnx.Rngs(0))
      >>> model(jnp.zeros((2, 16), jnp.int32), jnp.zeros((2, 8), jnp.int32)).shape
      (2, 8, 258)
    """

    def __init__(
        self,
        config: EncoderDecoderConfig,
        *,
        plan: Plan = "nothing",
        constrain: Callable[[jax.Array], jax.Array] | None = None,
        gather: Callable[[Any], Any] | None = None,
        rngs: nnx.Rngs,
    ):
        self.config = config
        dtype = jnp.dtype(config.dtype)
        options: dict[str, Any] = dict(plan=plan, constrain=constrain, gather=gather, rngs=rngs)
        self.embedding = Embedding(config.vocab_size, config.d_model, dtype=dtype, rngs=rngs)
        deep = dataclasses.replace(config, num_layers=config.decoder_layers)
        self.encoder = Tower(config, [functools.partial(_encoder_layer, config)], **options)
        self.decoder = Tower(deep, [functools.partial(_decoder_layer, deep)], **options)
        table = (config.relative_buckets, config.num_heads)
        bias = lambda: nnx.Param(0.02 * jax.random.normal(rngs.params(), table))
        self.encoder_bias = bias() if config.positions == "relative" else None
        self.decoder_bias = bias() if config.positions == "relative" else None
        tied = config.tie_embeddings
        self.head = None if tied else Linear(config.d_model, config.vocab_size, dtype=dtype, rngs=rngs)
        cast_parameters(self, config.param_dtype)
        if config.lora is not None:
            add_adapters(self, config.lora, rngs=rngs)

    def __call__(self, source_BS: jax.Array, target_BT: jax.Array, **inputs) -> jax.Array:
        """Returns logits_BTV, fp32: after each token of the target, the next one. `inputs` as for `hidden`."""
        x_BTD = self.hidden(source_BS, target_BT, **inputs)
        kernel_DV = self.head_kernel.astype(x_BTD.dtype)
        wide = jnp.promote_types(x_BTD.dtype, jnp.float32)
        return jnp.einsum("BTD,DV->BTV", x_BTD, kernel_DV, preferred_element_type=wide)

    def encode(self, source_BS: jax.Array, *, key=None, source_segment_ids=None) -> jax.Array:
        """(B, S, D): what the decoder attends to. Arguments as for `hidden`."""
        context = None if self.encoder_bias is None else {"bias": self.encoder_bias[...]}
        streams = both_streams(self._embed(source_BS), self.config.second_stream)
        found = self.encoder.stack.scan(streams, key=key, context=context, segment_ids=source_segment_ids)
        return self.encoder.read_out(*found.streams)

    def hidden(
        self,
        source_BS: jax.Array,
        target_BT: jax.Array,
        *,
        key: jax.Array | None = None,
        source_segment_ids: jax.Array | None = None,
        target_segment_ids: jax.Array | None = None,
    ) -> jax.Array:
        """What the head reads, (B, T, D).

        Args:
          source_BS, target_BT: integers in [0, vocab_size); the target begins with the start token.
          key: for dropout and other randomness of this step; None is evaluation.
          source_segment_ids, target_segment_ids: (B, S) and (B, T) integers: a token sees its own segment only, of
            either. Without those of the target, the source has 1 for text and 0 for padding.
        """
        first, second = (None, None) if key is None else jax.random.split(key)
        encoded = self.encode(source_BS, key=first, source_segment_ids=source_segment_ids)
        context = {"encoded": encoded}
        if self.decoder_bias is not None:
            context["bias"] = self.decoder_bias[...]
        streams = both_streams(self._embed(target_BT), self.config.second_stream)
        segments: dict[str, Any] = {"segment_ids": target_segment_ids, "context_segment_ids": source_segment_ids}
        found = self.decoder.stack.scan(streams, key=second, context=context, **segments)
        x_BTD = self.decoder.read_out(*found.streams)
        return x_BTD if self.config.logit_scale is None else x_BTD * self.config.logit_scale

    def loss(
        self,
        source_BS: jax.Array,
        target_BT: jax.Array,
        weights_BT: jax.Array | None = None,
        *,
        key: jax.Array | None = None,
        z_loss: float = 0.0,
        **segments: jax.Array | None,
    ) -> tuple[jax.Array, jax.Array]:
        """Returns (sum of weighted cross-entropies of the target in nats, sum of weights), fp32 scalars.

        The decoder sees the target one place later, behind the start token. `segments` as for `hidden`.
        """
        start = jnp.full_like(target_BT[:, :1], self.config.start)
        seen_BT = jnp.concatenate([start, target_BT[:, :-1]], axis=1)
        return cross_entropy(
            self.hidden(source_BS, seen_BT, key=key, **segments),
            self.head_kernel,
            target_BT,
            weights_BT,
            tile_tokens=self.config.loss_tile,
            z_loss=z_loss,
            dtype=jnp.dtype(self.config.dtype),
        )

    def denoising_loss(
        self, tokens_BT: jax.Array, *, key: jax.Array | None = None, z_loss: float = 0.0, segment_ids=None
    ) -> tuple[jax.Array, jax.Array]:
        """As `loss`, of telling a text again of which the source hides some tokens (BART's, arXiv:1910.13461).

        Which ones is drawn from `key`; where that is None (evaluation), always the same places are.
        """
        masks, key = (jax.random.key(0), None) if key is None else jax.random.split(key)
        config = self.config
        source_BT, _ = mask_tokens(
            tokens_BT, masks, rate=config.mask_rate, mask_token=config.mask, vocab_size=config.vocab_size
        )
        segments = {"source_segment_ids": segment_ids, "target_segment_ids": segment_ids}
        return self.loss(source_BT, tokens_BT, key=key, z_loss=z_loss, **segments)

    @property
    def head_kernel(self) -> jax.Array:
        """(D, V): the output projection; the embedding's own table where tied."""
        return self.embedding.head_kernel if self.head is None else self.head.kernel[...]

    def _embed(self, tokens):
        x = self.embedding.encode(tokens)
        return x if self.config.embedding_scale == 1 else x * self.config.embedding_scale


def _encoder_layer(config, rngs):
    return [_self_attention(config, False, rngs), MLPBranch(config, rngs=rngs)]


def _decoder_layer(config, rngs):
    return [_self_attention(config, True, rngs), CrossAttentionBranch(config, rngs=rngs), MLPBranch(config, rngs=rngs)]


def _self_attention(config, causal, rngs):
    if config.positions == "rotary":
        return AttentionBranch(config, causal=causal, rngs=rngs)
    distance = config.relative_max_distance
    return RelativeAttentionBranch(config, causal=causal, max_distance=distance, rngs=rngs)
