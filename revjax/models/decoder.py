"""A decoder-only language model over any coupling and plan.

    x = embed(tokens)        for each layer: f = attention(norm(x)), then f = mlp(norm(x))
    logits = head(read-out of the two streams)        see `tower`

Each f is an increment that the coupling adds to the streams; with `granularity: block`, attention and MLP
together are one f.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ..core.plan import Plan
from ..nn import Embedding, KVCache, LearnedPositions, Linear, cross_entropy
from .branches import MLPBranch, layers_of
from .decoder_config import DecoderConfig
from .lora import add_adapters
from .tower import Tower, both_streams, cast_parameters

PyTree = Any


class Decoder(Tower):
    """A causal language model on a reversible stack.

    Args:
      config: its shape.
      plan: what the backward pass finds kept: "nothing", "attention", "inputs:K", "host:K" or "all".
      constrain, gather: for the streams, and for the parameters of a layer, where devices share them (see
        `revjax.sharding.constrain_rows` and `gather_layer`).
      rngs: for the parameters.

    Example:
      >>> model = Decoder(DecoderConfig(num_layers=48), rngs=nnx.Rngs(0))
      >>> model(jnp.zeros((2, 16), jnp.int32)).shape
      (2, 16, 256)
    """

    def __init__(
        self,
        config: DecoderConfig,
        *,
        plan: Plan = "nothing",
        constrain: Callable[[jax.Array], jax.Array] | None = None,
        gather: Callable[[PyTree], PyTree] | None = None,
        rngs: nnx.Rngs,
    ):
        self.config = config
        dtype = jnp.dtype(config.dtype)
        self.embedding = Embedding(config.vocab_size, config.d_model, dtype=dtype, rngs=rngs)
        placed = config.positions == "learned"
        self.positions = LearnedPositions(config.max_length, config.d_model, rngs=rngs) if placed else None
        super().__init__(
            config, layers_of(config, causal=True), plan=plan, constrain=constrain, gather=gather, rngs=rngs
        )
        tied = config.tie_embeddings
        self.head = None if tied else Linear(config.d_model, config.vocab_size, dtype=dtype, rngs=rngs)
        own = config.second_stream == "own"
        self.second_embedding = Embedding(config.vocab_size, config.d_model, dtype=dtype, rngs=rngs) if own else None
        cast_parameters(self, config.param_dtype)
        if config.lora is not None:
            add_adapters(self, config.lora, rngs=rngs)

    def __call__(self, tokens_BT: jax.Array, **inputs) -> jax.Array:
        """Returns logits_BTV, fp32. `inputs` as for `hidden`."""
        return self._logits(self.hidden(tokens_BT, **inputs))

    def hidden(self, tokens_BT, *, key=None, positions=None, segment_ids=None) -> jax.Array:
        """What the head reads, (B, T, D).

        Args:
          tokens_BT: integers in [0, vocab_size).
          key: for dropout and other randomness of this step; None is evaluation.
          positions: (B, T) or (1, T) integers, where packed documents start anew; None counts from 0.
          segment_ids: (B, T) integers; a token attends to its own segment only.
        """
        given = {"positions": positions} if self.positions is None else {}
        streams = self._embed(tokens_BT, positions)
        return self.read_out(*self.stack.scan(streams, key=key, segment_ids=segment_ids, **given).streams)

    def loss(
        self, tokens_BT, targets_BT, weights_BT=None, *, key=None, z_loss: float = 0.0, **inputs
    ) -> tuple[jax.Array, jax.Array]:
        """Returns (sum of weighted cross-entropies in nats, sum of weights), fp32 scalars. No logits are stored.

        `z_loss` times the square of the logits' log-sum-exp is added to each token's.
        """
        return cross_entropy(
            self.hidden(tokens_BT, key=key, **inputs),
            self.head_kernel,
            targets_BT,
            weights_BT,
            tile_tokens=self.config.loss_tile,
            z_loss=z_loss,
            softcap=self.config.logit_softcap,
            dtype=jnp.dtype(self.config.dtype),
        )

    @property
    def head_kernel(self) -> jax.Array:
        """(D, V): the output projection; the embedding's own table where tied."""
        return self.embedding.head_kernel if self.head is None else self.head.kernel[...]

    def init_cache(self, batch: int, max_length: int, padding_B: jax.Array | None = None) -> PyTree:
        """Empty caches for `max_length` tokens, for each run of the stack, for each branch.

        `padding_B`, int32, says how many tokens before each text are padding: nothing sees them, nor are they counted.
        """
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        one = KVCache.zeros(batch, max_length, config.kv_heads, config.head_size, dtype, padding_B=padding_B)
        stacked = lambda length: jax.tree.map(lambda a: jnp.broadcast_to(a, (length, *a.shape)), one)
        caches = lambda branches, length: tuple(None if isinstance(b, MLPBranch) else stacked(length) for b in branches)
        return tuple(caches(*run) for run in zip(self.stack.runs, self.stack.lengths, strict=True))

    def decode(self, tokens_BT: jax.Array, cache: PyTree) -> tuple[jax.Array, PyTree]:
        """Returns logits_BTV for tokens that follow those in the cache, and the longer cache. No gradients."""
        first = jax.tree.map(lambda x: x[0], jax.tree.leaves(cache, is_leaf=_is_cache)[0])  # of the layers
        streams = self._embed(tokens_BT, jnp.maximum(first.positions(tokens_BT.shape[1]), 0))
        result = self.stack.scan(streams, cache=cache)
        return self._logits(self.read_out(*result.streams)), result.cache

    def _embed(self, tokens_BT, positions_BT) -> tuple[jax.Array, jax.Array]:
        """The two streams to start from."""
        x_BTD = self.embedding.encode(tokens_BT)
        if self.config.embedding_scale != 1:
            x_BTD = x_BTD * self.config.embedding_scale
        if self.positions is not None:
            if positions_BT is None:
                positions_BT = jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)[None]
            x_BTD = x_BTD + jnp.broadcast_to(self.positions(positions_BT), x_BTD.shape)
        if self.second_embedding is not None:
            return self.second_embedding.encode(tokens_BT), x_BTD
        return both_streams(x_BTD, self.config.second_stream)

    def _logits(self, x_BTD):
        kernel_DV = self.head_kernel.astype(x_BTD.dtype)
        wide = jnp.promote_types(x_BTD.dtype, jnp.float32)
        logits_BTV = jnp.einsum("BTD,DV->BTV", x_BTD, kernel_DV, preferred_element_type=wide)
        cap = self.config.logit_softcap
        return logits_BTV if cap is None else cap * jnp.tanh(logits_BTV / cap)


def _is_cache(x) -> bool:
    return isinstance(x, KVCache)
