"""Qwen 3: Qwen 2 with norms of queries and keys, and mostly without biases."""

from typing import Any

from ...models import DecoderConfig
from ..fields import Fields
from ..rope import read_rope, write_rope
from .base import Family, Tensor
from .llama import LLAMA, attention_bias, biases, read_sizes, write_sizes
from .qwen2 import read_windows, write_windows

QK_NORMS = {
    "attention.attention.query_norm.scale": Tensor("model.layers.{}.self_attn.q_norm.weight"),
    "attention.attention.key_norm.scale": Tensor("model.layers.{}.self_attn.k_norm.weight"),
}


def _read(fields: Fields) -> dict[str, Any]:
    sizes = {"head_dim": 128} | {k: v for k, v in read_sizes(fields).items() if v is not None}
    bias = fields.take("attention_bias", bool, False)
    more = {"qk_norm": True, "tie_embeddings": fields.take("tie_word_embeddings", bool, False)}
    rope = read_rope(fields, sizes["max_length"])
    return sizes | rope | read_windows(fields, sizes["num_layers"]) | biases(bias, bias) | more


def _write(config: DecoderConfig) -> dict[str, Any]:
    more = write_windows(config) | {"attention_bias": attention_bias(config)}
    return write_sizes(config) | write_rope(config.rope_base, config.rope_scaling) | more


QWEN3 = Family("qwen3", "Qwen3ForCausalLM", _read, _write, LLAMA.tensors | QK_NORMS, LLAMA.prefix, LLAMA.ignored)  # pyright: ignore[reportOperatorIssue]
