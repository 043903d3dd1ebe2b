"""A bidirectional encoder of text, with a masked-language-model head (BERT, arXiv:1810.04805).

x = norm(embed(tokens) + positions + kinds)        the norm where `embedding_norm`
h = read-out of the layers                          every token sees every other of its segment
logits = norm(act(h W)) . embed^T + bias            of the masked tokens
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from ..core.plan import Plan
from ..nn import Embedding, LearnedPositions, Linear, cross_entropy
from ..nn.mlp import ACTIVATIONS
from .branches import layers_of, make_norm
from .lora import add_adapters
from .masking import mask_tokens
from .tower import Tower, both_streams, cast_parameters
from .transformer_config import TransformerConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderConfig(TransformerConfig):
    """The shape of an encoder. Sizes count elements; `None` is filled in as said."""

    family: Literal["encoder"] = "encoder"
    vocab_size: int = 257
    activation: Literal["gelu", "gelu_exact", "silu", "relu"] = "gelu"
    gated: bool = False
    use_bias: bool = True
    norm: Literal["rms", "layer"] = "layer"
    positions: Literal["rotary", "learned"] = "rotary"
    max_length: int = 512  # for learned positions only
    token_kinds: int = 0  # how many kinds of tokens there are (of BERT 2: first and second sentence); 0: one
    embedding_norm: bool = True  # what the first layer gets is normed
    head: bool = True  # of the masked language model; without it, `hidden` is what the model is for
    pooler: bool = False  # a layer for the first token of a row, as BERT has for whole texts
    mask_rate: float = 0.15  # share of the tokens that are to be guessed
    mask_token: int | None = None  # what stands in their places; null is the last of the vocabulary
    loss_tile: int = 256  # tokens that have logits at one time

    def __post_init__(self):
        super().__post_init__()
        for name in ("max_length", "loss_tile"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, but got {getattr(self, name)}.")
        if self.vocab_size < 2:
            raise ValueError(f"vocab_size must be at least 2, a token and its mask, but got {self.vocab_size}.")
        if self.token_kinds < 0:
            raise ValueError(f"token_kinds must be at least 0, but got {self.token_kinds}.")
        if not 0 < self.mask_rate <= 1:
            raise ValueError(f"mask_rate must be above 0 and at most 1, but got {self.mask_rate}.")
        if self.mask_token is not None and not 0 <= self.mask_token < self.vocab_size:
            raise ValueError(
                f"mask_token must be a token of the vocabulary, 0 to {self.vocab_size - 1}, but got {self.mask_token}."
            )

    @property
    def mask(self) -> int:
        """The token that hides others."""
        return self.vocab_size - 1 if self.mask_token is None else self.mask_token


class Encoder(Tower):
    """A bidirectional encoder on a reversible stack.

    Args:
      config: its shape.
      plan, constrain, gather, rngs: as of `Decoder`.

    Example:
      >>> model = Encoder(EncoderConfig(num_layers=4), rngs=nnx.Rngs(0))
      >>> model.hidden(jnp.zeros((2, 16), jnp.int32)).shape
      (2, 16, 128)
    """

    def __init__(
        self,
        config: EncoderConfig,
        *,
        plan: Plan = "nothing",
        constrain: Callable[[jax.Array], jax.Array] | None = None,
        gather: Callable[[Any], Any] | None = None,
        rngs: nnx.Rngs,
    ):
        self.config = config
        dtype, d_model = jnp.dtype(config.dtype), config.d_model
        wide = jnp.promote_types(dtype, jnp.float32)
        self.embedding = Embedding(config.vocab_size, d_model, dtype=dtype, rngs=rngs)
        placed = config.positions == "learned"
        self.positions = LearnedPositions(config.max_length, d_model, rngs=rngs) if placed else None
        self.kinds = Embedding(config.token_kinds, d_model, rngs=rngs) if config.token_kinds else None
        self.embedding_norm = make_norm(config, dtype=wide, rngs=rngs) if config.embedding_norm else None
        super().__init__(
            config, layers_of(config, causal=False), plan=plan, constrain=constrain, gather=gather, rngs=rngs
        )
        dense = lambda: Linear(d_model, d_model, use_bias=True, dtype=dtype, rngs=rngs)
        self.head_dense = dense() if config.head else None
        self.head_norm = make_norm(config, rngs=rngs) if config.head else None
        self.head_bias = nnx.Param(jnp.zeros(config.vocab_size)) if config.head else None
        self.pooler = dense() if config.pooler else None
        own = config.second_stream == "own"
        self.second_embedding = Embedding(config.vocab_size, d_model, dtype=dtype, rngs=rngs) if own else None
        cast_parameters(self, config.param_dtype)
        if config.lora is not None:
            add_adapters(self, config.lora, rngs=rngs)

    def __call__(self, tokens_BT: jax.Array, **inputs) -> jax.Array:
        """Returns logits_BTV of every token, fp32. `inputs` as for `hidden`."""
        x_BTD = self._transformed(self.hidden(tokens_BT, **inputs))
        wide = jnp.promote_types(x_BTD.dtype, jnp.float32)
        kernel_DV = self.embedding.head_kernel.astype(x_BTD.dtype)
        logits_BTV = jnp.einsum("BTD,DV->BTV", x_BTD, kernel_DV, preferred_element_type=wide)
        return logits_BTV + self._bias[None, None].astype(wide)

    def hidden(self, tokens_BT, *, key=None, positions=None, segment_ids=None, kinds_BT=None) -> jax.Array:
        """A vector for each token, (B, T, D).

        Args:
          tokens_BT: integers in [0, vocab_size).
          key: for dropout and other randomness of this step; None is evaluation.
          positions: (B, T) or (1, T) integers, where packed texts start anew; None counts from 0.
          segment_ids: (B, T) integers; a token sees its own segment only: packed texts, or 1 for text and 0 for
            padding.
          kinds_BT: integers in [0, token_kinds); None is 0 everywhere.
        """
        x_BTD = self._embed(tokens_BT, positions, kinds_BT)
        given = {"positions": positions} if self.positions is None else {}
        if self.second_embedding is not None:
            streams = self.second_embedding.encode(tokens_BT), x_BTD
        else:
            streams = both_streams(x_BTD, self.config.second_stream)
        return self.read_out(*self.stack.scan(streams, key=key, segment_ids=segment_ids, **given).streams)

    def pooled(self, hidden_BTD: jax.Array) -> jax.Array:
        """(B, D): the first token of each row, through the pooler, as BERT describes whole texts."""
        if self.pooler is None:
            raise ValueError("This encoder has no pooler: build it with pooler=True, or take `sentence_embedding`.")
        return jnp.tanh(self.pooler(hidden_BTD[:, 0]))

    def sentence_embedding(self, tokens_BT: jax.Array, mask_BT: jax.Array | None = None, **inputs) -> jax.Array:
        """(B, D), fp32: the mean of the vectors of a text.

        Args:
          mask_BT: true where a row has text, false where it has padding; None is text everywhere.
          inputs: as for `hidden`.
        """
        if mask_BT is None:
            return jnp.mean(self.hidden(tokens_BT, **inputs).astype(jnp.float32), axis=1)
        segment_ids = mask_BT.astype(jnp.int32)
        x_BTD = self.hidden(tokens_BT, segment_ids=segment_ids, **inputs).astype(jnp.float32)
        weight_BT = mask_BT.astype(jnp.float32)
        return jnp.einsum("BTD,BT->BD", x_BTD, weight_BT) / jnp.maximum(jnp.sum(weight_BT, 1), 1)[:, None]

    def loss(
        self, tokens_BT: jax.Array, *, key: jax.Array | None = None, z_loss: float = 0.0, **inputs
    ) -> tuple[jax.Array, jax.Array]:
        """Returns (sum of cross-entropies of the hidden tokens in nats, their number), fp32 scalars.

        Which tokens are hidden is drawn from `key`; where that is None (evaluation), always the same places are.
        """
        masks, key = (jax.random.key(0), None) if key is None else jax.random.split(key)
        config = self.config
        hidden_BT, places_BM = mask_tokens(
            tokens_BT, masks, rate=config.mask_rate, mask_token=config.mask, vocab_size=config.vocab_size
        )
        x_BTD = self.hidden(hidden_BT, key=key, **inputs)
        x_BMD = jnp.take_along_axis(x_BTD, places_BM[..., None], axis=1)
        return cross_entropy(
            self._transformed(x_BMD),
            self.embedding.head_kernel,
            jnp.take_along_axis(tokens_BT, places_BM, axis=1),
            bias_V=self._bias,
            tile_tokens=config.loss_tile,
            z_loss=z_loss,
            dtype=jnp.dtype(config.dtype),
        )

    @property
    def _bias(self) -> jax.Array:
        if self.head_bias is None:
            raise ValueError("This encoder has no head: build it with head=True, or use `hidden`.")
        return self.head_bias[...]

    def _transformed(self, x_BTD):
        """What the table of the embedding is multiplied by."""
        if self.head_dense is None or self.head_norm is None:
            raise ValueError("This encoder has no head: build it with head=True, or use `hidden`.")
        return self.head_norm(ACTIVATIONS[self.config.activation](self.head_dense(x_BTD)))

    def _embed(self, tokens_BT, positions_BT, kinds_BT) -> jax.Array:
        x_BTD = self.embedding.encode(tokens_BT)
        if self.kinds is not None:
            x_BTD = x_BTD + self.kinds.encode(jnp.zeros_like(tokens_BT) if kinds_BT is None else kinds_BT)
        elif kinds_BT is not None:
            raise ValueError(
                "This encoder knows one kind of tokens: build it with token_kinds=2, or leave out kinds_BT."
            )
        if self.positions is not None:
            if positions_BT is None:
                positions_BT = jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)[None]
            x_BTD = x_BTD + jnp.broadcast_to(self.positions(positions_BT), x_BTD.shape)
        return x_BTD if self.embedding_norm is None else self.embedding_norm(x_BTD)
