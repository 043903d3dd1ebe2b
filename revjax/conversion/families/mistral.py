"""Mistral: Llama with a sliding window, and without biases."""

from typing import Any

from ...models import DecoderConfig
from ..fields import Fields
from ..rope import read_rope, write_rope
from .base import Family
from .llama import LLAMA, biases, read_sizes, write_sizes


def _read(fields: Fields) -> dict[str, Any]:
    sizes = read_sizes(fields)
    more = {
        "window": fields.take("sliding_window", int, 4096, or_null=True),
        "tie_embeddings": fields.take("tie_word_embeddings", bool, False),
    }
    return sizes | read_rope(fields, sizes["max_length"]) | biases(False, False) | more


def _write(config: DecoderConfig) -> dict[str, Any]:
    return write_sizes(config) | write_rope(config.rope_base, config.rope_scaling) | {"sliding_window": config.window}


MISTRAL = Family("mistral", "MistralForCausalLM", _read, _write, LLAMA.tensors, LLAMA.prefix, LLAMA.ignored)
