"""T5, and its version 1.1: RMS norms before each branch, relative positions as a bias of scores that are not scaled."""

from collections.abc import Container
from typing import Any

from ...models import EncoderDecoderConfig
from ..fields import Fields
from .base import Family, Tensor
from .llama import ACTIVATION_NAMES, ACTIVATIONS

_LETTERS = {"query": "q", "key": "k", "value": "v", "out": "o"}


def _tower(tower: str, branches: tuple[str, ...], gated: bool) -> dict[str, Tensor]:
    """The tensors of a tower's layers. Where MLPs are gated, "wi_0" is the gate; otherwise "wi" is up."""
    found = {}
    for i, branch in enumerate(branches):
        layer = f"{tower}.block.{{}}.layer.{i}."
        found[f"{tower}.{branch}.norm.scale"] = Tensor(layer + "layer_norm.weight")
        if branch == "mlp":
            up, gate = ("wi_1", "wi_0") if gated else ("wi", "wi_0")
            for ours, theirs in (("up", up), ("gate", gate), ("down", "wo")):
                name = f"{layer}DenseReluDense.{theirs}.weight"
                found[f"{tower}.mlp.mlp.{ours}.kernel"] = Tensor(name, "linear")
        else:
            kind = "SelfAttention" if branch == "attention" else "EncDecAttention"
            for ours, theirs in _LETTERS.items():
                found[f"{tower}.{branch}.attention.{ours}.kernel"] = Tensor(f"{layer}{kind}.{theirs}.weight", "linear")
    return found | {f"{tower}.norm.scale": Tensor(f"{tower}.final_layer_norm.weight")}


def _tensors(gated: bool) -> dict[str, Tensor]:
    bias = "{}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    return {
        "embedding.table": Tensor("shared.weight", "table"),
        "head.kernel": Tensor("lm_head.weight", "linear"),
        "encoder_bias": Tensor(bias.format("encoder"), "table"),
        "decoder_bias": Tensor(bias.format("decoder"), "table"),
        **_tower("encoder", ("attention", "mlp"), gated),
        **_tower("decoder", ("attention", "cross", "mlp"), gated),
    }


def _read(fields: Fields) -> dict[str, Any]:
    fields.only("is_encoder_decoder", True)
    fields.ignore("dense_act_fn", "is_gated_act", "n_positions", "output_past", "classifier_dropout", "dropout_rate")
    fields.ignore("initializer_factor")
    d_model = fields.take("d_model", int)
    tied = fields.take("tie_word_embeddings", bool, True)
    pad = fields.take("pad_token_id", int, 0)
    activation = fields.take("feed_forward_proj", str, "relu")
    kind = activation.removeprefix("gated-")
    if kind not in ACTIVATIONS:
        fields.choose("feed_forward_proj", dict.fromkeys(("relu", "gated-gelu", "gated-silu"), ""), activation)
    return {
        "vocab_size": fields.take("vocab_size", int),
        "d_model": d_model,
        "num_layers": fields.take("num_layers", int),
        "num_decoder_layers": fields.take("num_decoder_layers", int, None),
        "num_heads": fields.take("num_heads", int),
        "head_dim": fields.take("d_kv", int),
        "d_ff": fields.take("d_ff", int),
        # "gated-gelu" is the tanh approximation, though "gelu" elsewhere is not.
        "activation": "gelu" if activation == "gated-gelu" else ACTIVATIONS[kind],
        "gated": activation.startswith("gated-"),
        "norm_eps": fields.take("layer_norm_epsilon", float, 1e-6),
        "positions": "relative",
        "relative_buckets": fields.take("relative_attention_num_buckets", int, 32),
        "relative_max_distance": fields.take("relative_attention_max_distance", int, 128),
        "attention_scale": 1.0,
        "logit_scale": d_model**-0.5 if fields.take("scale_decoder_outputs", bool, tied) else None,
        "start_token": fields.take("decoder_start_token_id", int, pad),
    }


def _read_tensors(names: Container[str]) -> dict[str, Any]:
    return {"tie_embeddings": "lm_head.weight" not in names}


def _write(config: EncoderDecoderConfig) -> dict[str, Any]:
    gelu = config.gated and config.activation == "gelu"
    activation = "gelu" if gelu else ACTIVATION_NAMES[config.activation]
    return {
        "is_encoder_decoder": True,
        "vocab_size": config.vocab_size,
        "d_model": config.d_model,
        "num_layers": config.num_layers,
        "num_decoder_layers": config.decoder_layers,
        "num_heads": config.num_heads,
        "d_kv": config.head_size,
        "d_ff": config.mlp_width,
        "feed_forward_proj": f"gated-{activation}" if config.gated else activation,
        "layer_norm_epsilon": config.eps,
        "relative_attention_num_buckets": config.relative_buckets,
        "relative_attention_max_distance": config.relative_max_distance,
        "tie_word_embeddings": config.logit_scale is not None,
        "decoder_start_token_id": config.start,
    }


T5 = Family(
    model_type="t5",
    architecture="T5ForConditionalGeneration",
    read=_read,
    write=_write,
    tensors=_tensors(gated=False),
    prefix="",
    ignored=r"(encoder|decoder)\.embed_tokens\.weight",
    config=EncoderDecoderConfig,
    read_tensors=_read_tensors,
    other_tensors=lambda config: _tensors(gated=config.gated),
)
