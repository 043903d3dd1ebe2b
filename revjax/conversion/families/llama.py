"""Llama 2 and 3, and what the families after it have in common with it.

RMS norms before each branch, rotary positions, gated MLPs, grouped-query attention.
"""

from typing import Any

from ...models import DecoderConfig
from ..fields import Fields
from ..rope import read_rope, write_rope
from .base import Family, Tensor

ACTIVATIONS = {  # theirs: ours
    "silu": "silu",
    "gelu_pytorch_tanh": "gelu",
    "gelu_new": "gelu",
    "gelu": "gelu_exact",
    "relu": "relu",
}
ACTIVATION_NAMES = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}

TENSORS = {
    "embedding.table": Tensor("model.embed_tokens.weight", "table"),
    "norm.scale": Tensor("model.norm.weight"),
    "head.kernel": Tensor("lm_head.weight", "linear"),
    "attention.norm.scale": Tensor("model.layers.{}.input_layernorm.weight"),
    "attention.attention.query.kernel": Tensor("model.layers.{}.self_attn.q_proj.weight", "linear"),
    "attention.attention.query.bias": Tensor("model.layers.{}.self_attn.q_proj.bias"),
    "attention.attention.key.kernel": Tensor("model.layers.{}.self_attn.k_proj.weight", "linear"),
    "attention.attention.key.bias": Tensor("model.layers.{}.self_attn.k_proj.bias"),
    "attention.attention.value.kernel": Tensor("model.layers.{}.self_attn.v_proj.weight", "linear"),
    "attention.attention.value.bias": Tensor("model.layers.{}.self_attn.v_proj.bias"),
    "attention.attention.out.kernel": Tensor("model.layers.{}.self_attn.o_proj.weight", "linear"),
    "attention.attention.out.bias": Tensor("model.layers.{}.self_attn.o_proj.bias"),
    "mlp.norm.scale": Tensor("model.layers.{}.post_attention_layernorm.weight"),
    "mlp.mlp.gate.kernel": Tensor("model.layers.{}.mlp.gate_proj.weight", "linear"),
    "mlp.mlp.gate.bias": Tensor("model.layers.{}.mlp.gate_proj.bias"),
    "mlp.mlp.up.kernel": Tensor("model.layers.{}.mlp.up_proj.weight", "linear"),
    "mlp.mlp.up.bias": Tensor("model.layers.{}.mlp.up_proj.bias"),
    "mlp.mlp.down.kernel": Tensor("model.layers.{}.mlp.down_proj.weight", "linear"),
    "mlp.mlp.down.bias": Tensor("model.layers.{}.mlp.down_proj.bias"),
}


def read_sizes(fields: Fields, *, activation: str = "hidden_act") -> dict[str, Any]:
    """The sizes, the activation and the norms, which all these families say alike."""
    usual = "silu" if activation == "hidden_act" else "gelu_pytorch_tanh"
    return {
        "vocab_size": fields.take("vocab_size", int),
        "d_model": fields.take("hidden_size", int),
        "num_layers": fields.take("num_hidden_layers", int),
        "num_heads": fields.take("num_attention_heads", int),
        "num_kv_heads": fields.take("num_key_value_heads", int, None),
        "head_dim": fields.take("head_dim", int, None),
        "d_ff": fields.take("intermediate_size", int),
        "activation": fields.choose(activation, ACTIVATIONS, usual),
        "gated": True,
        "norm": "rms",
        "norm_eps": fields.take("rms_norm_eps", float, 1e-6),
        "max_length": fields.take("max_position_embeddings", int, 2048),
    }


def write_sizes(config: DecoderConfig, *, activation: str = "hidden_act") -> dict[str, Any]:
    """What `read_sizes` reads."""
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_size,
        "intermediate_size": config.mlp_width,
        activation: ACTIVATION_NAMES[config.activation],
        "rms_norm_eps": config.eps,
        "max_position_embeddings": config.max_length,
        "tie_word_embeddings": config.tie_embeddings,
    }


def biases(attention: bool, out: bool, mlp: bool = False) -> dict[str, bool]:
    return {"use_bias": False, "qkv_bias": attention, "out_bias": out, "mlp_bias": mlp}


def attention_bias(config: DecoderConfig) -> bool:
    """Whether queries, keys and values have a bias."""
    return config.use_bias if config.qkv_bias is None else config.qkv_bias


def read_kinds(kinds: list[str], window: int | None, where: Fields) -> dict[str, Any]:
    """window and layer_pattern, from the kinds of all layers."""
    names = {"sliding_attention": "local", "full_attention": "global"}
    for kind in kinds:
        if kind not in names:
            where.choose("layer_types", names, kind)
    ours = tuple(names[kind] for kind in kinds)
    if "local" not in ours:
        return {"window": None, "layer_pattern": ()}
    if "global" not in ours:
        return {"window": window, "layer_pattern": ()}
    period = next(n for n in range(1, len(ours) + 1) if all(ours[i] == ours[i % n] for i in range(len(ours))))
    return {"window": window, "layer_pattern": ours[:period]}


def write_kinds(config: DecoderConfig) -> list[str]:
    """The kinds of all layers."""
    local = "sliding_attention" if config.window is not None else "full_attention"
    period = [local if kind == "local" else "full_attention" for kind in config.period]
    return [period[i % len(period)] for i in range(config.num_layers)]


def _read(fields: Fields) -> dict[str, Any]:
    sizes = read_sizes(fields)
    bias, mlp_bias = fields.take("attention_bias", bool, False), fields.take("mlp_bias", bool, False)
    tie = {"tie_embeddings": fields.take("tie_word_embeddings", bool, False)}
    return sizes | read_rope(fields, sizes["max_length"]) | biases(bias, bias, mlp_bias) | tie


def _write(config: DecoderConfig) -> dict[str, Any]:
    mlp_bias = config.use_bias if config.mlp_bias is None else config.mlp_bias
    more = {"attention_bias": attention_bias(config), "mlp_bias": mlp_bias}
    return write_sizes(config) | write_rope(config.rope_base, config.rope_scaling) | more


LLAMA = Family("llama", "LlamaForCausalLM", _read, _write, TENSORS, "model.", r".*rotary_emb\.inv_freq")
