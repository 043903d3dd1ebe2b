"""What a training step costs, counted by hand: bytes at its highest point, and time, before anything is compiled.

    bytes   state + max over moments of (what is kept by then + what the moment needs)
    time    FLOPs + balance (bytes of parameters that are read and written + moves of a kept byte x bytes kept
                             + moves of a byte that goes to the host and back x bytes kept there)

A step has four moments that may be its highest: a tile of the loss, the backward pass of one attention and of one
MLP (with all gradients), and the update. What a moment needs is counted in arrays of a few sizes, as profiles of
compiled steps show them (`revjax profile`; jax 0.10.2 on CPU). XLA packs, fuses and copies as it likes, so a count is
an estimate: the planner believes compiled programs.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from ..core import parse_coupling
from ..core.plan import All, Inputs, Keep, Reverse
from ..models import (
    DecoderConfig,
    EncoderDecoderConfig,
    ModelConfig,
    TransformerConfig,
    VisionConfig,
    hardware_flops_per_token,
    kept_layers,
)
from ..nn.blocks import choose_blocks

# FLOPs in the time that one byte takes from memory, where nothing is known of the device (see `devices.HARDWARE`).
_BALANCE = {"cpu": 10.0}
_DEFAULT_BALANCE = 250.0
# How often a byte that is kept for the backward pass is moved: written and read. On a CPU it is fresh memory too, whose
# pages the system makes first: plans of six shapes, timed in turn, cost 0 to 16 moves (bf16 more than fp32), about 6.
_MOVES = {"cpu": 6.0}
_DEFAULT_MOVES = 2.0
# The same for a byte that is kept on the host, over its link: on an H200, a step of `jax.checkpoint` whose 3.2 GB of
# layer inputs went to the host and back took 62 and 72 ms longer (docs/studies/accelerator.jsonl), 92 and 107 moves.
_HOST_MOVES = 100.0


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a step costs on one device.

    Attributes:
      state: bytes of parameters and optimizer, always there.
      moments: bytes beside the state, by moment: "loss", "attention", "MLP", "update".
      kept: bytes of these that stay from the forward to the backward pass.
      time: FLOPs, and what else takes time in FLOPs.
    """

    state: int
    moments: dict[str, int]
    kept: int
    time: float

    @property
    def highest(self) -> str:
        """The moment with the most bytes."""
        return max(self.moments, key=self.moments.__getitem__)

    @property
    def bytes(self) -> int:
        """All of them at the highest point."""
        return self.state + self.moments[self.highest]


def step_cost(
    config: ModelConfig,
    batch_size: int,
    sequence_length: int,
    *,
    plan: str = "nothing",
    accumulation: int = 1,
    num_params: int,
    num_frozen: int = 0,
    num_updated: int = 0,
    state_bytes: int,
    balance: float | None = None,
) -> Cost:
    """The cost of a step on `batch_size` rows of one device, cut into `accumulation` micro-batches.

    Args:
      num_params, num_frozen: parameters that are trained, and that are not.
      num_updated: of those that are trained, how many are updated in the backward pass, without gradients of all.
      state_bytes: of all of them, with the optimizer's arrays.
      balance: FLOPs that the device does in the time that a byte takes; None: as of the devices that are here.
    """
    flops = batch_size * sequence_length * hardware_flops_per_token(config, sequence_length, plan)
    config = _as_decoder(config)
    rows = -(-batch_size // accumulation)
    sizes = Sizes(config, rows, sequence_length)
    parts = kept_layers(config, plan)
    kept_of_parts = [_kept(sizes, keep, num_layers) for num_layers, keep in parts]
    width = jnp.dtype(config.param_dtype).itemsize if config.lora is None else 4  # adapters are in fp32
    gradients, sums = width * (num_params - num_updated), 0
    if accumulation > 1:  # in fp32, and beside them the gradients of one micro-batch, but for those of layers
        tables = 0 if config.lora is not None else 1 if config.tie_embeddings else 2
        sums = 4 * num_params
        gradients = sums + 4 * config.vocab_size * config.d_model * tables
    kept = sum(kept_of_parts)
    # Where the MLP of a layer is updated, its gradients, moments, and what becomes of them and of it.
    changing = 5 * 4 * sizes.mlp_kernels if num_updated else 0
    moments = {
        "loss": kept + sums + _loss(sizes),
        "attention": 0,
        "MLP": 0,
        "update": width * (num_params - num_updated) + sizes.largest_layer_parameter,
    }
    for i, (_, keep) in enumerate(parts):  # those after it are done, and what they kept is free
        there = sum(kept_of_parts[: i + 1]) + gradients
        moments["attention"] = max(moments["attention"], there + _attention(sizes, _manner(keep)))
        moments["MLP"] = max(moments["MLP"], there + changing + _mlp(sizes, _manner(keep)))
    moved = _moved(config, batch_size, sequence_length, plan, accumulation, num_params, num_frozen)
    balance = balance or _BALANCE.get(jax.default_backend(), _DEFAULT_BALANCE)
    moves = _MOVES.get(jax.default_backend(), _DEFAULT_MOVES)
    moved += accumulation * (moves * kept + _HOST_MOVES * sum(_kept_on_host(sizes, *part) for part in parts))
    time = flops + balance * moved
    return Cost(state_bytes, moments, kept, time)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Elements of the arrays that a micro-batch of so many rows makes in one layer."""

    config: DecoderConfig
    rows: int
    length: int

    @property
    def width(self) -> int:
        """Bytes of an element that is computed with."""
        return jnp.dtype(self.config.dtype).itemsize

    @property
    def tokens(self) -> int:
        return self.rows * self.length

    @property
    def streams(self) -> int:
        return self.tokens * self.config.d_model

    @property
    def queries(self) -> int:
        return self.tokens * self.config.num_heads * self.config.head_size

    @property
    def keys(self) -> int:
        return self.tokens * self.config.kv_heads * self.config.head_size

    @property
    def hidden(self) -> int:
        """Of the MLP, in one chunk."""
        chunk = min(self.config.mlp_chunk or self.length, self.length)
        return self.rows * chunk * self.config.mlp_width

    @property
    def blocks(self) -> tuple[int, int]:
        """How many blocks attention has, and the elements of a pair of them over all rows and heads."""
        heads = self.rows * self.config.num_heads
        block_q, block_k = choose_blocks(heads, self.length, self.length, None, None)
        return -(-self.length // block_q), heads * block_q * block_k

    @property
    def mlp_kernels(self) -> int:
        return (3 if self.config.gated else 2) * self.config.d_model * self.config.mlp_width

    @property
    def largest_layer_parameter(self) -> int:
        return 4 * self.config.d_model * self.config.mlp_width


@dataclasses.dataclass(frozen=True)
class Count:
    """How many arrays of each size are there at one moment: in fp32, and in the dtype that is computed with (`low`)."""

    streams: float = 0
    queries: float = 0
    keys: float = 0
    hidden: float = 0
    blocks: float = 0  # pairs of blocks of attention, fp32
    low_streams: float = 0
    low_queries: float = 0
    low_keys: float = 0
    low_hidden: float = 0
    mlp_kernels: float = 0  # of one layer, low

    def bytes(self, s: Sizes) -> float:
        wide, low = max(s.width, 4), s.width
        names = ("streams", "queries", "keys", "hidden")
        fp32 = sum(getattr(self, name) * getattr(s, name) for name in names) + self.blocks * s.blocks[1]
        narrow = sum(getattr(self, f"low_{name}") * getattr(s, name) for name in names)
        return wide * fp32 + low * (narrow + self.mlp_kernels * s.mlp_kernels)


# By plan: "nothing", "attention", or "stored", where a layer's activations are there (`all`; `inputs` in a segment).
_ATTENTION = {
    "low": {
        "nothing": Count(streams=6, low_streams=3, queries=2, keys=2, low_queries=4, low_keys=3, blocks=2),
        "attention": Count(streams=5, low_streams=1, queries=2, keys=1, low_queries=4, low_keys=3, blocks=3),
        "stored": Count(streams=3, low_streams=3, hidden=2, queries=2, keys=1, low_queries=3, low_keys=2),
    },
    "wide": {
        "nothing": Count(streams=8, queries=6, keys=5, blocks=2),
        "attention": Count(streams=6, queries=5, keys=5, blocks=3),
        "stored": Count(streams=6, queries=4, keys=4, hidden=2),
    },
}
_ATTENTION_IN_ONE_BLOCK = {
    "low": {
        "nothing": Count(streams=6, low_streams=3, queries=1, low_queries=3, low_keys=2, blocks=4),
        "attention": Count(streams=5, low_streams=1, low_queries=2, low_keys=2, blocks=3),
        "stored": Count(streams=5, low_streams=1, queries=1, low_queries=2, low_keys=2, blocks=2, hidden=2),
    },
    "wide": {
        "nothing": Count(streams=9, queries=2, keys=2, blocks=4),
        "attention": Count(streams=7, queries=2, keys=1, blocks=3),
        "stored": Count(streams=5, queries=2, keys=1, blocks=2, hidden=2),
    },
}
_GATED_MLP = {
    "low": {
        "nothing": Count(streams=4, low_streams=2, hidden=3, low_hidden=4, mlp_kernels=2),
        "attention": Count(streams=5, low_streams=4, hidden=3, low_hidden=4, mlp_kernels=2),
        "stored": Count(streams=2, low_streams=3, hidden=2, low_hidden=2, queries=2, keys=1, low_queries=3, low_keys=2),
    },
    "wide": {
        "nothing": Count(streams=5, hidden=8, mlp_kernels=2),
        "attention": Count(streams=7, hidden=8, mlp_kernels=2),
        "stored": Count(streams=5, hidden=4, queries=4, keys=4, mlp_kernels=1),
    },
}
_PLAIN_MLP = {  # beside a gated one
    "low": Count(hidden=-1, low_hidden=-2),
    "wide": Count(hidden=-2),
}


def _as_decoder(config: ModelConfig) -> DecoderConfig:
    """A decoder with the layers of `config` (the encoder's, of an encoder-decoder): of others, counts are estimates."""
    if isinstance(config, DecoderConfig):
        return config
    same: dict[str, Any] = {
        f.name: getattr(config, f.name) for f in dataclasses.fields(TransformerConfig) if f.name != "family"
    }
    if isinstance(config, VisionConfig):
        own: dict[str, Any] = {"vocab_size": config.num_classes}
    else:
        own = {"vocab_size": config.vocab_size, "loss_tile": config.loss_tile}
    if isinstance(config, EncoderDecoderConfig):
        own["tie_embeddings"] = config.tie_embeddings
    own["positions"] = "rotary" if config.positions == "rotary" else "learned"
    return DecoderConfig(**(same | own))


def _loss(s: Sizes) -> int:
    config, low = s.config, s.width < 4
    table = config.vocab_size * config.d_model
    tile = min(config.loss_tile, s.tokens) * config.vocab_size
    # The streams and their cotangents, and the vectors that the head reads of them; of concat, twice as wide.
    n = 9 if config.resolved_readout == "concat" else 7
    streams = Count(streams=n, low_streams=1) if low else Count(streams=n + 1)
    gradient = 0 if config.lora is not None else 4 * table
    return int(streams.bytes(s) + 2 * 4 * tile + gradient + (2 * s.width if low else 4) * table)


def _attention(s: Sizes, manner: str) -> int:
    table = _ATTENTION if s.blocks[0] > 1 else _ATTENTION_IN_ONE_BLOCK
    return int(table[_precision(s)][manner].bytes(s) + _unpacking(s, 2.5))


def _mlp(s: Sizes, manner: str) -> int:
    found = _GATED_MLP[_precision(s)][manner].bytes(s)
    if not s.config.gated:
        found += _PLAIN_MLP[_precision(s)].bytes(s)
    return int(found + _unpacking(s, 0.5))


def _unpacking(s: Sizes, streams: float) -> float:
    """A coupling that keeps bits needs more beside them."""
    return 4 * streams * s.streams if _kept_bits(s.config) else 0


def _kept(s: Sizes, keep: Keep, num_layers: int) -> int:
    """What stays of so many layers until the backward pass."""
    config, low = s.config, s.width
    fns = 2 if config.granularity == "branch" else 1
    logsumexp = 4 * s.rows * config.num_heads * s.length
    stored = 2 * 4 * s.streams + low * (2 * s.streams + 2 * s.queries + 2 * s.keys) + logsumexp
    stored += low * (3 if config.gated else 2) * s.rows * s.length * config.mlp_width
    if config.positions == "rotary":
        stored += 4 * 4 * s.length * config.head_size // 2
    if isinstance(keep, All):
        return num_layers * stored
    if isinstance(keep, Inputs):
        keyframes = 2 if keep.host else -(-num_layers // keep.every)  # on their way
        return keyframes * 2 * 4 * s.streams + min(keep.every, num_layers) * stored
    each = fns * s.streams * _kept_bits(config) // 8
    if "attention" in keep.names:
        each += low * s.queries + logsumexp
    return num_layers * each


def _kept_on_host(s: Sizes, num_layers: int, keep: Keep) -> int:
    if not isinstance(keep, Inputs) or not keep.host:
        return 0
    return -(-num_layers // keep.every) * 2 * 4 * s.streams


def _kept_bits(config: DecoderConfig) -> int:
    return parse_coupling(config.coupling).kept_bits if config.exact else 0


def _precision(s: Sizes) -> str:
    return "low" if s.width < 4 else "wide"


def _manner(keep: Keep) -> str:
    if isinstance(keep, Reverse):
        return "attention" if keep.names else "nothing"
    return "stored"


def _moved(
    config: DecoderConfig,
    batch_size: int,
    sequence_length: int,
    plan: str,
    accumulation: int,
    num_params: int,
    num_frozen: int,
) -> float:
    """The bytes of parameters and their gradients that a step moves."""
    tokens = batch_size * sequence_length
    parts = kept_layers(config, plan)
    again = sum(n for n, keep in parts if not isinstance(keep, All)) / config.num_layers
    passes = 2 + again  # over the parameters: forward, again, backward
    moved = accumulation * 4 * (num_params * (passes + (2 if accumulation > 1 else 1)) + num_frozen * passes)
    tiles = math.ceil(tokens / accumulation / config.loss_tile) * accumulation
    moved += tiles * config.vocab_size * config.d_model * (2 + 2 * 4)  # the kernel, and its gradient so far
    if config.mlp_chunk and config.mlp_chunk < sequence_length:
        chunks = math.ceil(sequence_length / config.mlp_chunk)
        kernels = (3 if config.gated else 2) * config.d_model * config.mlp_width
        moved += accumulation * config.num_layers * (chunks - 1) * kernels * (3 * 2 + 2 * 4)
    return moved
