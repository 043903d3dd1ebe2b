"""Gemma 3, its text model: Gemma 2 with norms of queries and keys for soft caps, and other rotary positions in the
layers with a sliding window, which are five of six.
"""

from typing import Any

from ...models import DecoderConfig
from ..fields import Fields
from ..rope import read_rope, write_rope
from .base import Family
from .gemma2 import GEMMA2, read_gemma, write_gemma
from .llama import LLAMA, read_kinds
from .qwen3 import QK_NORMS


def _read(fields: Fields) -> dict[str, Any]:
    fields.only("attn_logit_softcapping", None)  # transformers takes it, and computes without
    common = read_gemma(fields, (None, None)) | {"qk_norm": True}
    pattern = fields.take("sliding_window_pattern", int, 6)
    default = ["sliding_attention" if (i + 1) % pattern else "full_attention" for i in range(common["num_layers"])]
    window = fields.take("sliding_window", int, 4096, or_null=True)
    kinds = fields.take("layer_types", list, default)
    rope = read_rope(fields, common["max_length"], base=1_000_000.0, local_base=10_000.0)
    return common | rope | read_kinds(kinds, window, fields)


def _write(config: DecoderConfig) -> dict[str, Any]:
    local = config.rope_base if config.local_rope_base is None else config.local_rope_base
    more = {"rope_local_base_freq": local}
    return write_gemma(config) | write_rope(config.rope_base, config.rope_scaling) | more


GEMMA3 = Family(
    "gemma3_text", "Gemma3ForCausalLM", _read, _write, dict(GEMMA2.tensors) | QK_NORMS, LLAMA.prefix, LLAMA.ignored
)
