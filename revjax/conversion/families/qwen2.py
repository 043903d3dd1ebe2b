"""Qwen 2 and 2.5: Llama with biases of queries, keys and values; some of its layers may have a sliding window."""

from typing import Any

from ...models import DecoderConfig
from ..fields import Fields
from ..rope import read_rope, write_rope
from .base import Family
from .llama import LLAMA, biases, read_kinds, read_sizes, write_kinds, write_sizes


def read_windows(fields: Fields, num_layers: int) -> dict[str, Any]:
    """window and layer_pattern: layers from max_window_layers on slide, or those that layer_types names."""
    slides = fields.take("use_sliding_window", bool, False)
    window = fields.take("sliding_window", int, 4096, or_null=True)
    slides = slides and window is not None
    first = fields.take("max_window_layers", int, 28)
    default = ["sliding_attention" if slides and i >= first else "full_attention" for i in range(num_layers)]
    return read_kinds(fields.take("layer_types", list, default), window if slides else None, fields)


def write_windows(config: DecoderConfig) -> dict[str, Any]:
    """What `read_windows` reads."""
    kinds = write_kinds(config)
    slides = "sliding_attention" in kinds
    first = kinds.index("sliding_attention") if slides else config.num_layers
    return {
        "use_sliding_window": slides,
        "sliding_window": config.window if slides else None,
        "max_window_layers": first,
        "layer_types": kinds,
    }


def _read(fields: Fields) -> dict[str, Any]:
    sizes = read_sizes(fields)
    tie = {"tie_embeddings": fields.take("tie_word_embeddings", bool, False)}
    rope = read_rope(fields, sizes["max_length"])
    return sizes | rope | read_windows(fields, sizes["num_layers"]) | biases(True, False) | tie


def _write(config: DecoderConfig) -> dict[str, Any]:
    return write_sizes(config) | write_rope(config.rope_base, config.rope_scaling) | write_windows(config)


QWEN2 = Family("qwen2", "Qwen2ForCausalLM", _read, _write, LLAMA.tensors, LLAMA.prefix, LLAMA.ignored)
