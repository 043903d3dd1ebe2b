"""ViT for the classification of images: layer norms before each branch, a class token, patches by a convolution."""

from typing import Any

from ...models import VisionConfig
from ..fields import Fields
from .base import Family, Tensor
from .llama import ACTIVATION_NAMES as _ACTIVATION_NAMES
from .llama import ACTIVATIONS

ACTIVATION_NAMES = _ACTIVATION_NAMES | {"gelu": "gelu_new"}  # their usual name of the tanh approximation here

_LAYER = "vit.encoder.layer.{}."
_MODULES = {
    "attention.attention.query": _LAYER + "attention.attention.query",
    "attention.attention.key": _LAYER + "attention.attention.key",
    "attention.attention.value": _LAYER + "attention.attention.value",
    "attention.attention.out": _LAYER + "attention.output.dense",
    "mlp.mlp.up": _LAYER + "intermediate.dense",
    "mlp.mlp.down": _LAYER + "output.dense",
    "head": "classifier",
}
_NORMS = {
    "attention.norm": _LAYER + "layernorm_before",
    "mlp.norm": _LAYER + "layernorm_after",
    "norm": "vit.layernorm",
}
TENSORS = {
    "class_token": Tensor("vit.embeddings.cls_token", lead=2),
    "positions.table": Tensor("vit.embeddings.position_embeddings", "table", lead=1),
    "patches.kernel": Tensor("vit.embeddings.patch_embeddings.projection.weight", "conv2d"),
    "patches.bias": Tensor("vit.embeddings.patch_embeddings.projection.bias"),
    **{f"{ours}.kernel": Tensor(f"{theirs}.weight", "linear") for ours, theirs in _MODULES.items()},
    **{f"{ours}.bias": Tensor(f"{theirs}.bias") for ours, theirs in (_MODULES | _NORMS).items()},
    **{f"{ours}.scale": Tensor(f"{theirs}.weight") for ours, theirs in _NORMS.items()},
}


def _read(fields: Fields) -> dict[str, Any]:
    fields.ignore("encoder_stride", "pooler_act", "pooler_output_size")
    return {
        "image_size": fields.take("image_size", int, 224),
        "patch_size": fields.take("patch_size", int, 16),
        "channels": fields.take("num_channels", int, 3),
        "num_classes": len(fields.take("id2label", dict, {"0": "", "1": ""})),
        "d_model": fields.take("hidden_size", int),
        "num_layers": fields.take("num_hidden_layers", int),
        "num_heads": fields.take("num_attention_heads", int),
        "d_ff": fields.take("intermediate_size", int),
        "activation": fields.choose("hidden_act", ACTIVATIONS, "gelu"),
        "norm_eps": fields.take("layer_norm_eps", float, 1e-12),
        "qkv_bias": fields.take("qkv_bias", bool, True),
    }


def _write(config: VisionConfig) -> dict[str, Any]:
    names = {str(i): f"LABEL_{i}" for i in range(config.num_classes)}
    return {
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "num_channels": config.channels,
        "id2label": names,
        "label2id": {name: int(i) for i, name in names.items()},
        "hidden_size": config.d_model,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.mlp_width,
        "hidden_act": ACTIVATION_NAMES[config.activation],
        "layer_norm_eps": config.eps,
        "qkv_bias": config.use_bias if config.qkv_bias is None else config.qkv_bias,
    }


VIT = Family(
    model_type="vit",
    architecture="ViTForImageClassification",
    read=_read,
    write=_write,
    tensors=TENSORS,
    prefix="vit.",
    ignored=r"vit\.pooler\..*",
    config=VisionConfig,
)
