"""GPT-2: layer norms, learned positions, biases everywhere. Its dense layers are (in, out), and q, k, v are one."""

from typing import Any

from ...models import DecoderConfig
from ..fields import Fields
from .base import Family, Tensor
from .llama import ACTIVATION_NAMES, ACTIVATIONS

_LAYER = "transformer.h.{}."
TENSORS = {
    "embedding.table": Tensor("transformer.wte.weight", "table"),
    "positions.table": Tensor("transformer.wpe.weight", "table"),
    "norm.scale": Tensor("transformer.ln_f.weight"),
    "norm.bias": Tensor("transformer.ln_f.bias"),
    "head.kernel": Tensor("lm_head.weight", "linear"),
    "attention.norm.scale": Tensor(_LAYER + "ln_1.weight"),
    "attention.norm.bias": Tensor(_LAYER + "ln_1.bias"),
    "attention.attention.out.kernel": Tensor(_LAYER + "attn.c_proj.weight", "conv1d"),
    "attention.attention.out.bias": Tensor(_LAYER + "attn.c_proj.bias"),
    "mlp.norm.scale": Tensor(_LAYER + "ln_2.weight"),
    "mlp.norm.bias": Tensor(_LAYER + "ln_2.bias"),
    "mlp.mlp.up.kernel": Tensor(_LAYER + "mlp.c_fc.weight", "conv1d"),
    "mlp.mlp.up.bias": Tensor(_LAYER + "mlp.c_fc.bias"),
    "mlp.mlp.down.kernel": Tensor(_LAYER + "mlp.c_proj.weight", "conv1d"),
    "mlp.mlp.down.bias": Tensor(_LAYER + "mlp.c_proj.bias"),
}
for _i, _name in enumerate(("query", "key", "value")):
    TENSORS[f"attention.attention.{_name}.kernel"] = Tensor(_LAYER + "attn.c_attn.weight", "conv1d", (_i, 3))
    TENSORS[f"attention.attention.{_name}.bias"] = Tensor(_LAYER + "attn.c_attn.bias", "same", (_i, 3))


def _read(fields: Fields) -> dict[str, Any]:
    fields.only("scale_attn_weights", True)
    fields.only("scale_attn_by_inverse_layer_idx", False)
    d_model = fields.take("n_embd", int)
    return {
        "vocab_size": fields.take("vocab_size", int),
        "d_model": d_model,
        "num_layers": fields.take("n_layer", int),
        "num_heads": fields.take("n_head", int),
        "d_ff": fields.take("n_inner", int, 4 * d_model),
        "activation": fields.choose("activation_function", ACTIVATIONS, "gelu_new"),
        "gated": False,
        "use_bias": True,
        "norm": "layer",
        "norm_eps": fields.take("layer_norm_epsilon", float, 1e-5),
        "positions": "learned",
        "max_length": fields.take("n_positions", int, 1024),
        "tie_embeddings": fields.take("tie_word_embeddings", bool, True),
    }


def _write(config: DecoderConfig) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size,
        "n_embd": config.d_model,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "n_inner": config.mlp_width,
        "activation_function": "gelu_new" if config.activation == "gelu" else ACTIVATION_NAMES[config.activation],
        "layer_norm_epsilon": config.eps,
        "n_positions": config.max_length,
        "tie_word_embeddings": config.tie_embeddings,
    }


GPT2 = Family("gpt2", "GPT2LMHeadModel", _read, _write, TENSORS, "transformer.", r".*attn\.(masked_)?bias")
