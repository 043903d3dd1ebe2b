"""BERT: layer norms after each sum, learned positions, two kinds of tokens, biases everywhere.

Its head for the next sentence (cls.seq_relationship) is left out.
"""

from collections.abc import Container
from typing import Any

from ...models import EncoderConfig
from ..fields import Fields
from .base import Family, Tensor
from .llama import ACTIVATIONS
from .vit import ACTIVATION_NAMES

_LAYER = "bert.encoder.layer.{}."
_MODULES = {
    "attention.attention.query": _LAYER + "attention.self.query",
    "attention.attention.key": _LAYER + "attention.self.key",
    "attention.attention.value": _LAYER + "attention.self.value",
    "attention.attention.out": _LAYER + "attention.output.dense",
    "mlp.mlp.up": _LAYER + "intermediate.dense",
    "mlp.mlp.down": _LAYER + "output.dense",
    "head_dense": "cls.predictions.transform.dense",
    "pooler": "bert.pooler.dense",
}
_NORMS = {
    "attention.norm": _LAYER + "attention.output.LayerNorm",
    "mlp.norm": _LAYER + "output.LayerNorm",
    "embedding_norm": "bert.embeddings.LayerNorm",
    "head_norm": "cls.predictions.transform.LayerNorm",
}
TENSORS = {
    "embedding.table": Tensor("bert.embeddings.word_embeddings.weight", "table"),
    "positions.table": Tensor("bert.embeddings.position_embeddings.weight", "table"),
    "kinds.table": Tensor("bert.embeddings.token_type_embeddings.weight", "table"),
    "head_bias": Tensor("cls.predictions.bias"),
    "head.kernel": Tensor("cls.predictions.decoder.weight", "linear"),
    **{f"{ours}.kernel": Tensor(f"{theirs}.weight", "linear") for ours, theirs in _MODULES.items()},
    **{f"{ours}.bias": Tensor(f"{theirs}.bias") for ours, theirs in (_MODULES | _NORMS).items()},
    **{f"{ours}.scale": Tensor(f"{theirs}.weight") for ours, theirs in _NORMS.items()},
}


def _read(fields: Fields) -> dict[str, Any]:
    fields.only("position_embedding_type", "absolute")
    fields.only("tie_word_embeddings", True)
    fields.ignore("classifier_dropout", "gradient_checkpointing", "directionality", "pooler_fc_size")
    fields.ignore("pooler_num_attention_heads", "pooler_num_fc_layers", "pooler_size_per_head", "pooler_type")
    return {
        "vocab_size": fields.take("vocab_size", int),
        "d_model": fields.take("hidden_size", int),
        "num_layers": fields.take("num_hidden_layers", int),
        "num_heads": fields.take("num_attention_heads", int),
        "d_ff": fields.take("intermediate_size", int),
        "activation": fields.choose("hidden_act", ACTIVATIONS, "gelu"),
        "norm_eps": fields.take("layer_norm_eps", float, 1e-12),
        "norm_placement": "post",
        "positions": "learned",
        "max_length": fields.take("max_position_embeddings", int, 512),
        "token_kinds": fields.take("type_vocab_size", int, 2),
    }


def _read_tensors(names: Container[str]) -> dict[str, Any]:
    has = lambda name: name in names
    pooler = has("bert.pooler.dense.weight") or has("pooler.dense.weight")
    return {"head": has("cls.predictions.bias"), "pooler": pooler}


def _write(config: EncoderConfig) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.mlp_width,
        "hidden_act": ACTIVATION_NAMES[config.activation],
        "layer_norm_eps": config.eps,
        "max_position_embeddings": config.max_length,
        "type_vocab_size": config.token_kinds,
    }


BERT = Family(
    model_type="bert",
    architecture="BertForMaskedLM",
    read=_read,
    write=_write,
    tensors=TENSORS,
    prefix="bert.",
    ignored=r".*position_ids|cls\.seq_relationship\..*|cls\.predictions\.decoder\.bias",
    config=EncoderConfig,
    read_tensors=_read_tensors,
    is_bare=lambda config: not config.head,
    other_architectures=("BertForPreTraining", "BertModel"),
    old_names=(("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta")),
)
