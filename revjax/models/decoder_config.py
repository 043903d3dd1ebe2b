"""The shape of a decoder, checked as a whole before anything is built."""

import dataclasses
from typing import Literal

from .transformer_config import TransformerConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig(TransformerConfig):
    """The shape of a decoder. Sizes count elements; `None` is filled in as said."""

    family: Literal["decoder"] = "decoder"
    vocab_size: int = 256
    positions: Literal["rotary", "learned"] = "rotary"
    max_length: int = 1024  # for learned positions only
    logit_softcap: float | None = None  # logits stay below it; null is none
    embedding_scale: float = 1.0  # tokens' vectors are multiplied by it (Gemma: sqrt(d_model))
    tie_embeddings: bool = True
    loss_tile: int = 256  # tokens that have logits at one time

    def __post_init__(self):
        super().__post_init__()
        for name in ("vocab_size", "max_length", "loss_tile"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, but got {getattr(self, name)}.")
        if self.logit_softcap is not None and self.logit_softcap <= 0:
            raise ValueError(f"logit_softcap must be positive, or null, but got {self.logit_softcap}.")
