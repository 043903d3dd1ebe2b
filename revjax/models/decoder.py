"""A decoder-only language model over any coupling and plan.

    x = embed(tokens)        for each layer: f = attention(norm(x)), then f = mlp(norm(x))
    logits = head(norm(mean of the two streams))

Each f is an increment that the coupling adds to the streams; with `granularity: block`, attention and MLP
together are one f. Projections back into the stream start smaller by sqrt(2 layers) (GPT-2), so that deep
stacks begin near the identity.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from ..core import parse_coupling
from ..core.plan import Plan
from ..nn import (
    MLP,
    Attention,
    Embedding,
    KVCache,
    LayerNorm,
    LearnedPositions,
    Linear,
    RMSNorm,
    Rotary,
    cross_entropy,
    dropout,
    stochastic_depth,
)
from .stack import ReversibleStack

PyTree = Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """The shape of a decoder. Sizes count elements; `None` is filled in as said."""

    vocab_size: int = 256
    d_model: int = 128
    num_layers: int = 6
    num_heads: int = 4
    num_kv_heads: int | None = None  # one per query head
    head_dim: int | None = None  # d_model / num_heads
    d_ff: int | None = None  # 4 d_model; gated: 8/3 d_model, rounded up to a multiple of 32
    activation: Literal["gelu", "silu", "relu"] = "silu"
    gated: bool = True
    use_bias: bool = False
    norm: Literal["rms", "layer"] = "rms"
    qk_norm: bool = False
    positions: Literal["rotary", "learned"] = "rotary"
    rope_base: float = 10_000.0
    max_length: int = 1024  # for learned positions only
    window: int | None = None  # sliding window of attention, in tokens; None is all
    tie_embeddings: bool = True
    dropout: float = 0.0  # on the increment of every branch
    attention_dropout: float = 0.0
    stochastic_depth: float = 0.0  # probability of skipping a branch, per sample
    dtype: Literal["bfloat16", "float16", "float32", "float64"] = "bfloat16"  # of the computation
    param_dtype: Literal["float32", "bfloat16"] = "float32"  # of parameters, and of their gradients
    coupling: str = "revnet"  # "near-residual:1", ...: see revjax.parse_coupling
    granularity: Literal["branch", "block"] = "branch"  # what one f is
    exact: bool = True  # integer streams
    fraction_bits: int = 16
    loss_tile: int = 1024  # tokens that have logits at one time
    mlp_chunk: int | None = None  # tokens of each row that have a hidden layer of the MLP at one time; null is all

    def __post_init__(self):
        for name in ("vocab_size", "d_model", "num_layers", "num_heads", "max_length", "loss_tile"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, but got {getattr(self, name)}.")
        for name in ("num_kv_heads", "head_dim", "d_ff", "window", "mlp_chunk"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, or null for its default, but got {value}.")
        for name in ("dropout", "attention_dropout", "stochastic_depth"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 0 and below 1, but got {getattr(self, name)}.")
        if self.head_dim is None and self.d_model % self.num_heads:
            raise ValueError(
                f"num_heads must divide d_model, but got num_heads={self.num_heads} and d_model={self.d_model}. "
                f"Try num_heads={_divisor_near(self.d_model, self.num_heads)}, or say head_dim."
            )
        if self.num_heads % self.kv_heads:
            raise ValueError(
                "num_kv_heads must divide num_heads, but got "
                f"num_kv_heads={self.kv_heads} and num_heads={self.num_heads}. "
                f"Try num_kv_heads={_divisor_near(self.num_heads, self.kv_heads)}."
            )
        if self.positions == "rotary" and self.head_size % 2:
            raise ValueError(f"Rotary positions pair up channels, so head_dim must be even, but got {self.head_size}.")
        coupling = parse_coupling(self.coupling)
        if self.exact and not coupling.has_exact:
            raise ValueError(
                f"The coupling {self.coupling!r} has no exact arithmetic: momentum needs 0.5, 0.25, 0.0625 or "
                "0.00390625. Use one of these, or exact: false."
            )
        if self.mlp_chunk is not None and self.granularity == "block":
            raise ValueError(
                "mlp_chunk needs granularity: branch, since a block's attention cannot be cut into tokens."
            )
        kept_bits = getattr(coupling, "shift", 0)
        if self.exact and kept_bits and self.d_model * kept_bits % 8:
            raise ValueError(
                f"The coupling {self.coupling!r} keeps {kept_bits} bits for each element, which must fill whole bytes: "
                f"d_model must be a multiple of {8 // math.gcd(8, kept_bits)}, but got {self.d_model}."
            )

    @property
    def kv_heads(self) -> int:
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def head_size(self) -> int:
        return self.d_model // self.num_heads if self.head_dim is None else self.head_dim

    @property
    def mlp_width(self) -> int:
        if self.d_ff is not None:
            return self.d_ff
        return -(-8 * self.d_model // 3 // 32) * 32 if self.gated else 4 * self.d_model


class AttentionBranch(nnx.Module):
    """attention(norm(x)), an increment."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        self.norm = make_norm(config, rngs=rngs)
        self.attention = Attention(
            config.d_model,
            config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            window=config.window,
            qk_norm=config.qk_norm,
            rotary=Rotary(base=config.rope_base) if config.positions == "rotary" else None,
            use_bias=config.use_bias,
            dropout=config.attention_dropout,
            out_init_scale=1 / math.sqrt(2 * config.num_layers),
            dtype=jnp.dtype(config.dtype),
            rngs=rngs,
        )
        self.dropout, self.stochastic_depth = config.dropout, config.stochastic_depth

    def __call__(self, x_BTD, *, key=None, positions=None, segment_ids=None, cache=None) -> Any:
        inside, outside = _two_keys(key)
        y_BTD = self.attention(self.norm(x_BTD), positions=positions, segment_ids=segment_ids, cache=cache, key=inside)
        y_BTD, *extras = y_BTD if cache is not None else (y_BTD,)
        y_BTD = _drop(y_BTD, self.dropout, self.stochastic_depth, outside)
        return (y_BTD, *extras) if extras else y_BTD


class MLPBranch(nnx.Module):
    """mlp(norm(x)), an increment."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        self.norm = make_norm(config, rngs=rngs)
        self.mlp = MLP(
            config.d_model,
            config.mlp_width,
            activation=config.activation,
            gated=config.gated,
            use_bias=config.use_bias,
            out_init_scale=1 / math.sqrt(2 * config.num_layers),
            dtype=jnp.dtype(config.dtype),
            rngs=rngs,
        )
        self.dropout, self.stochastic_depth = config.dropout, config.stochastic_depth
        self.chunk_tokens = config.mlp_chunk

    def __call__(self, x_BTD, *, key=None):
        return _drop(self.mlp(self.norm(x_BTD)), self.dropout, self.stochastic_depth, key)


class Block(nnx.Module):
    """Attention and MLP of an ordinary block as one increment: a(x) + m(x + a(x))."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        self.attention = AttentionBranch(config, rngs=rngs)
        self.mlp = MLPBranch(config, rngs=rngs)

    def __call__(self, x_BTD, *, key=None, positions=None, segment_ids=None, cache=None) -> Any:
        first, second = _two_keys(key)
        a_BTD = self.attention(x_BTD, key=first, positions=positions, segment_ids=segment_ids, cache=cache)
        a_BTD, *extras = a_BTD if cache is not None else (a_BTD,)
        y_BTD = a_BTD + self.mlp(x_BTD + a_BTD.astype(x_BTD.dtype), key=second)
        return (y_BTD, *extras) if extras else y_BTD


class Decoder(nnx.Module):
    """A causal language model on a reversible stack.

    Args:
      config: its shape.
      plan: what the backward pass finds kept: "nothing", "inputs:K" or "all".
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
        learned = config.positions == "learned"
        self.positions = LearnedPositions(config.max_length, config.d_model, rngs=rngs) if learned else None
        self.stack = ReversibleStack(
            lambda rngs: make_branches(config, rngs=rngs),
            num_layers=config.num_layers,
            coupling=parse_coupling(config.coupling),
            plan=plan,
            exact=config.exact,
            fraction_bits=config.fraction_bits,
            constrain=constrain,
            gather=gather,
            rngs=rngs,
        )
        self.norm = make_norm(config, rngs=rngs)
        tied = config.tie_embeddings
        self.head = None if tied else Linear(config.d_model, config.vocab_size, dtype=dtype, rngs=rngs)
        if config.param_dtype != "float32":
            cast = lambda p: p.astype(config.param_dtype)
            nnx.update(self, jax.tree.map(cast, nnx.state(self, nnx.Param)))

    def __call__(self, tokens_BT: jax.Array, **inputs) -> jax.Array:
        """Returns logits_BTV, fp32. `inputs` as for `hidden`."""
        return self._logits(self.hidden(tokens_BT, **inputs))

    def hidden(self, tokens_BT, *, key=None, positions=None, segment_ids=None) -> jax.Array:
        """What the head reads: the normed mean of the last two streams, (B, T, D).

        Args:
          tokens_BT: integers in [0, vocab_size).
          key: for dropout and other randomness of this step; None is evaluation.
          positions: (B, T) or (1, T) integers, where packed documents start anew; None counts from 0.
          segment_ids: (B, T) integers; a token attends to its own segment only.
        """
        x_BTD = self._embed(tokens_BT, positions)
        given = {"positions": positions} if self.positions is None else {}
        return self.norm(self.stack(x_BTD, key=key, segment_ids=segment_ids, **given))

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
        x_BTD = self._embed(tokens_BT, jnp.maximum(first.positions(tokens_BT.shape[1]), 0))
        result = self.stack.scan(x_BTD, cache=cache)
        return self._logits(self.norm(result.out)), result.cache

    def _embed(self, tokens_BT, positions_BT):
        x_BTD = self.embedding.encode(tokens_BT)
        if self.positions is not None:
            if positions_BT is None:
                positions_BT = jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)[None]
            x_BTD = x_BTD + jnp.broadcast_to(self.positions(positions_BT), x_BTD.shape)
        return x_BTD

    def _logits(self, x_BTD):
        kernel_DV = self.head_kernel.astype(x_BTD.dtype)
        wide = jnp.promote_types(x_BTD.dtype, jnp.float32)
        return jnp.einsum("BTD,DV->BTV", x_BTD, kernel_DV, preferred_element_type=wide)


def make_branches(config: DecoderConfig, *, rngs: nnx.Rngs) -> list[nnx.Module]:
    """One layer: attention and MLP, as two f's or as one."""
    if config.granularity == "block":
        return [Block(config, rngs=rngs)]
    return [AttentionBranch(config, rngs=rngs), MLPBranch(config, rngs=rngs)]


def make_norm(config: DecoderConfig, *, rngs: nnx.Rngs) -> nnx.Module:
    dtype = jnp.dtype(config.dtype)
    if config.norm == "rms":
        return RMSNorm(config.d_model, dtype=dtype, rngs=rngs)
    return LayerNorm(config.d_model, use_bias=config.use_bias, dtype=dtype, rngs=rngs)


def _drop(y, rate, depth_rate, key):
    if key is None or not (rate or depth_rate):
        return y
    first, second = jax.random.split(key)
    return stochastic_depth(dropout(y, rate, first), depth_rate, second)


def _two_keys(key):
    return (None, None) if key is None else tuple(jax.random.split(key))


def _is_cache(x) -> bool:
    return isinstance(x, KVCache)


def _divisor_near(n: int, wanted: int) -> int:
    return min((d for d in range(1, n + 1) if n % d == 0), key=lambda d: abs(d - wanted))
