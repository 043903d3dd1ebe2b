"""What the layers of every family of transformers have in common, checked as a whole before anything is built."""

import dataclasses
import math
from typing import Literal

import jax

from ..core import BDIA, AbstractCoupling, LinearCoupling, parse_coupling
from ..core.coupling import COUPLINGS
from ..errors import ConfigError, nearest
from ..nn import RopeScaling
from .lora import LoRAConfig

LayerKind = Literal["local", "global"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """The shape of the layers, and how they join the streams. Sizes count elements; `None` is filled in as said."""

    family: Literal["decoder", "encoder", "vision", "encoder-decoder"] = "decoder"
    d_model: int = 128
    num_layers: int = 6
    num_heads: int = 4
    num_kv_heads: int | None = None  # one per query head
    head_dim: int | None = None  # d_model / num_heads
    d_ff: int | None = None  # 4 d_model; gated: 8/3 d_model, rounded up to a multiple of 32
    activation: Literal["gelu", "gelu_exact", "silu", "relu"] = "silu"  # gelu: its tanh approximation
    gated: bool = True
    use_bias: bool = False
    qkv_bias: bool | None = None  # of queries, keys and values; null as use_bias
    out_bias: bool | None = None  # of attention's output; null as use_bias
    mlp_bias: bool | None = None  # null as use_bias
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float | None = None  # 1e-6 for rms, 1e-5 for layer
    norm_offset: float = 0.0  # of rms: what is added to the scale (Gemma: 1)
    # pre norms what a branch reads; post norms the sum of x and what the branch returns, as in BERT
    norm_placement: Literal["pre", "post"] = "pre"
    post_norm: bool = False  # what a branch returns is normed as well (Gemma 2)
    qk_norm: bool = False
    positions: Literal["rotary", "learned", "relative"] = "rotary"
    rope_base: float = 10_000.0
    local_rope_base: float | None = None  # of local layers, which then have no rope_scaling; null as rope_base
    rope_scaling: RopeScaling | None = None  # for contexts longer than those of the first training
    window: int | None = None  # sliding window of attention, in tokens; None is all
    layer_pattern: tuple[LayerKind, ...] = ()  # repeated over the layers: global ones have no window; () is all local
    attention_scale: float | None = None  # of scores; null is 1 / sqrt(head_dim)
    attention_softcap: float | None = None  # scores stay below it; null is none
    dropout: float = 0.0  # on the increment of every branch
    attention_dropout: float = 0.0
    stochastic_depth: float = 0.0  # probability of skipping a branch, per sample
    dtype: Literal["bfloat16", "float16", "float32", "float64"] = "bfloat16"  # of the computation
    param_dtype: Literal["float32", "bfloat16"] = "float32"  # of parameters, and of their gradients
    coupling: str = "revnet"  # "near-residual:1", ...: see revjax.parse_coupling
    granularity: Literal["branch", "block"] = "branch"  # what one f is
    readout: Literal["auto", "mean", "last", "learned", "concat"] = "auto"  # of the streams; auto: see resolved_readout
    second_stream: Literal["copy", "zero", "own"] = "copy"  # begins as the first, as 0, or as an embedding of its own
    lora: LoRAConfig | None = None  # train small adapters, and freeze everything else; null trains everything
    layer_scale: float | None = None  # start of a learned factor for each channel of every increment; null is none
    exact: bool = True  # integer streams
    fraction_bits: int = 16
    mlp_chunk: int | None = None  # tokens of each row that have a hidden layer of the MLP at one time; null is all

    def __post_init__(self):
        for name in ("d_model", "num_layers", "num_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, but got {getattr(self, name)}.")
        for name in ("norm_eps", "attention_scale", "attention_softcap", "local_rope_base"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name} must be positive, or null, but got {value}.")
        if "local" in self.layer_pattern and self.window is None:
            raise ValueError("layer_pattern has local layers, so window must say how far they see, but got null.")
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
        self._check_coupling(_coupling(self.coupling))

    def _check_coupling(self, coupling: AbstractCoupling) -> None:
        if self.exact and not coupling.has_exact:
            raise ValueError(
                f"The coupling {self.coupling!r} has no exact arithmetic: momentum needs 0.5, 0.25, 0.0625 or "
                "0.00390625. Use one of these, or exact: false."
            )
        if coupling.for_step(None).order == 1 and (
            self.readout not in ("auto", "last") or self.second_stream != "copy"
        ):
            raise ValueError(
                f"With the coupling {self.coupling!r} a model is evaluated as the ordinary network, which has one "
                f"stream: readout must be auto or last, and second_stream copy, but got {self.readout} and "
                f"{self.second_stream}."
            )
        if self.mlp_chunk is not None and self.granularity == "block":
            raise ValueError(
                "mlp_chunk needs granularity: branch, since a block's attention cannot be cut into tokens."
            )
        kept_bits = coupling.kept_bits
        if self.exact and kept_bits and self.d_model * kept_bits % 8:
            raise ValueError(
                f"The coupling {self.coupling!r} keeps {kept_bits} bits for each element, which must fill whole bytes: "
                f"d_model must be a multiple of {8 // math.gcd(8, kept_bits)}, but got {self.d_model}."
            )
        if self.norm_placement == "post" and (growth := post_norm_growth(coupling)) >= 1:
            raise ValueError(
                f"norm_placement post makes streams of the coupling {self.coupling!r} grow by {growth:.2g} with every "
                "f. Take near-residual:4, bdia:4 or residual, or norm_placement: pre."
            )

    @property
    def resolved_readout(self) -> Literal["mean", "last", "learned", "concat"]:
        """`readout`; for "auto" the best measured, concat, and last where a head of the ordinary network is to fit."""
        if self.readout != "auto":
            return self.readout
        near = self.coupling.partition(":")[0] == "near-residual" or _coupling(self.coupling).readout == "last"
        return "last" if near else "concat"

    @property
    def kv_heads(self) -> int:
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def head_size(self) -> int:
        return self.d_model // self.num_heads if self.head_dim is None else self.head_dim

    @property
    def eps(self) -> float:
        """What norms add to the mean square."""
        return {"rms": 1e-6, "layer": 1e-5}[self.norm] if self.norm_eps is None else self.norm_eps

    @property
    def period(self) -> tuple[LayerKind, ...]:
        """The kinds of layers that repeat."""
        return self.layer_pattern or ("local",)

    @property
    def run_lengths(self) -> tuple[int, ...]:
        """How often the stack's periods repeat: of whole ones, and of what remains."""
        repeats, rest = divmod(self.num_layers, len(self.period))
        return tuple(n for n in (repeats, 1 if rest else 0) if n)

    @property
    def mlp_width(self) -> int:
        if self.d_ff is not None:
            return self.d_ff
        return -(-8 * self.d_model // 3 // 32) * 32 if self.gated else 4 * self.d_model


def post_norm_growth(coupling: AbstractCoupling) -> float:
    """By how much streams grow with every f of a network that norms x + g(x); below 1 they stay bounded.

    There f(x) = norm(x + g(x)) - x, and norms have bounded results, so that what is left to the streams themselves is

        x[l+1] = (1 - b - h) x[l] + b x[l-1] + bounded        r^2 = (1 - b - h) r + b

    of which this is the larger |r|; with random signs, of the worse one. RevNet: 1.62. near-residual:1: 1; 2: 0.64.
    0 for a coupling of one's own, whose b and h are not known.
    """
    if isinstance(coupling, BDIA):
        pairs = [(b, 1 + b) for b in (-(2.0**-coupling.shift), 2.0**-coupling.shift)]
    elif isinstance(coupling, LinearCoupling) and not any(
        isinstance(n, jax.Array) for n in (coupling.sign, coupling.h)
    ):
        pairs = [(float(coupling.sign * 2.0**-coupling.shift), float(coupling.h))]
    else:
        pairs = []
    sizes = [0.0]
    for b, h in pairs:
        half = (1 - b - h) / 2
        root = complex(half * half + b) ** 0.5
        sizes += [abs(half + root), abs(half - root)]
    return max(sizes)


def _coupling(text: str) -> AbstractCoupling:
    """`parse_coupling`, whose error also names the field and the nearest coupling."""
    try:
        return parse_coupling(text)
    except ConfigError:  # of a function of one's own
        raise
    except ValueError as e:
        name = text.partition(":")[0]
        raise ValueError(f"coupling: {e}{'' if name in COUPLINGS else nearest(name, COUPLINGS)}") from None


def _divisor_near(n: int, wanted: int) -> int:
    return min((d for d in range(1, n + 1) if n % d == 0), key=lambda d: abs(d - wanted))
