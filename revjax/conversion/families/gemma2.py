"""Gemma 2: norms around both branches, soft caps, every other layer with a sliding window.

Scales of norms are stored as their distance from 1, and the vectors of tokens are multiplied by sqrt(d_model).
"""

import math
from typing import Any

from ...models import DecoderConfig
from ..fields import Fields
from ..rope import read_rope, write_rope
from .base import Family, Tensor
from .llama import LLAMA, attention_bias, biases, read_kinds, read_sizes, write_kinds, write_sizes

TENSORS = dict(LLAMA.tensors) | {
    "attention.post_norm.scale": Tensor("model.layers.{}.post_attention_layernorm.weight"),
    "mlp.norm.scale": Tensor("model.layers.{}.pre_feedforward_layernorm.weight"),
    "mlp.post_norm.scale": Tensor("model.layers.{}.post_feedforward_layernorm.weight"),
}


def read_gemma(fields: Fields, softcaps: tuple[float | None, float | None]) -> dict[str, Any]:
    """What Gemma 2 and 3 have in common; `softcaps`: of scores and of logits, where the config says none."""
    sizes = {"head_dim": 256} | {k: v for k, v in read_sizes(fields, activation="hidden_activation").items() if v}
    fields.only("hidden_act", *("gelu_pytorch_tanh", "gelu_new", "gelu"))  # of old configs, and not used
    fields.only("use_bidirectional_attention", False)
    bias = fields.take("attention_bias", bool, False)
    return (
        sizes
        | biases(bias, bias)
        | {
            "norm_offset": 1.0,
            "post_norm": True,
            "embedding_scale": math.sqrt(sizes["d_model"]),
            "attention_scale": fields.take("query_pre_attn_scalar", float, 256.0) ** -0.5,
            "attention_softcap": fields.take("attn_logit_softcapping", float, softcaps[0], or_null=True),
            "logit_softcap": fields.take("final_logit_softcapping", float, softcaps[1], or_null=True),
            "tie_embeddings": fields.take("tie_word_embeddings", bool, True),
        }
    )


def write_gemma(config: DecoderConfig) -> dict[str, Any]:
    """What `read_gemma` reads."""
    scale = config.head_size**-0.5 if config.attention_scale is None else config.attention_scale
    scalar = scale**-2
    return write_sizes(config, activation="hidden_activation") | {
        "attention_bias": attention_bias(config),
        "query_pre_attn_scalar": round(scalar) if abs(scalar - round(scalar)) < 1e-6 * scalar else scalar,
        "attn_logit_softcapping": config.attention_softcap,
        "final_logit_softcapping": config.logit_softcap,
        "sliding_window": config.window,
        "layer_types": write_kinds(config),
    }


def _read(fields: Fields) -> dict[str, Any]:
    common = read_gemma(fields, (50.0, 30.0))
    default = [("sliding_attention", "full_attention")[i % 2] for i in range(common["num_layers"])]
    window = fields.take("sliding_window", int, 4096, or_null=True)
    kinds = fields.take("layer_types", list, default)
    return common | read_rope(fields, common["max_length"]) | read_kinds(kinds, window, fields)


def _write(config: DecoderConfig) -> dict[str, Any]:
    return write_gemma(config) | write_rope(config.rope_base, config.rope_scaling)


GEMMA2 = Family("gemma2", "Gemma2ForCausalLM", _read, _write, TENSORS, LLAMA.prefix, LLAMA.ignored)
