"""Decoders by name: sizes that are known to be sensible, from a laptop to one large accelerator."""

import dataclasses

from ..errors import nearest
from .decoder_config import DecoderConfig

_TINY = DecoderConfig(d_model=128, num_layers=12, num_heads=4, qk_norm=True)
_SMALL = DecoderConfig(vocab_size=50_304, d_model=512, num_layers=12, num_heads=8, qk_norm=True)

PRESETS: dict[str, DecoderConfig] = {
    "decoder-tiny": _TINY,  # bytes; 2.4 million parameters
    "decoder-small": _SMALL,
    "decoder-base": dataclasses.replace(_SMALL, d_model=768, num_layers=24, num_heads=12),
    "decoder-large": dataclasses.replace(_SMALL, d_model=1280, num_layers=36, num_heads=20, num_kv_heads=5),
    "decoder-1b": dataclasses.replace(_SMALL, d_model=2048, num_layers=20, num_heads=16, num_kv_heads=4, d_ff=5632),
}


def preset(name: str, **changes) -> DecoderConfig:
    """The configuration of that name, with `changes` to its fields.

    Raises:
      ValueError: there is no preset of that name.
      TypeError: `changes` has a name that is no field.

    >>> preset("decoder-tiny", num_layers=96).num_layers
    96
    """
    if name not in PRESETS:
        raise ValueError(f"There is no preset {name!r}.{nearest(name, PRESETS)} Presets are {', '.join(PRESETS)}.")
    fields = [field.name for field in dataclasses.fields(DecoderConfig)]
    for change in changes:
        if change not in fields:
            raise TypeError(f"A decoder has no {change!r}.{nearest(change, fields)} It has {', '.join(fields)}.")
    return dataclasses.replace(PRESETS[name], **changes)
