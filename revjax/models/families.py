"""The families of models, each by the class of its configuration."""

from typing import Any

from .decoder import Decoder
from .decoder_config import DecoderConfig
from .encoder import Encoder, EncoderConfig
from .encoder_decoder import EncoderDecoder, EncoderDecoderConfig
from .vision import VisionConfig, VisionTransformer

ModelConfig = DecoderConfig | EncoderConfig | VisionConfig | EncoderDecoderConfig
Model = Decoder | Encoder | VisionTransformer | EncoderDecoder

_MODELS: dict[type, type] = {
    DecoderConfig: Decoder,
    EncoderConfig: Encoder,
    VisionConfig: VisionTransformer,
    EncoderDecoderConfig: EncoderDecoder,
}


def make_model(config: ModelConfig, **options: Any) -> Any:
    """The model of that configuration; `options` are those of the models: plan, constrain, gather, rngs."""
    return _MODELS[type(config)](config, **options)
