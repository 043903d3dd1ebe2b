"""Rotary positions, as config.json says them: in one dict (transformers 5), or in fields of their own (before)."""

import dataclasses
from typing import Any

from ..errors import ConfigError
from ..nn import RopeScaling
from .fields import Fields

_NAMES = {"original_max_length": "original_max_position_embeddings"}  # ours: theirs, where they differ
_FIELDS = {  # by kind: what its dict may say
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "original_max_length", "low_freq_factor", "high_freq_factor"),
    "yarn": (
        *("factor", "original_max_length", "beta_fast", "beta_slow", "truncate"),
        *("attention_factor", "mscale", "mscale_all_dim"),
    ),
    "longrope": ("factor", "original_max_length", "attention_factor", "short_factor", "long_factor"),
}


def read_rope(
    fields: Fields, max_length: int, *, base: float = 10_000.0, local_base: float | None = None
) -> dict[str, Any]:
    """rope_base, rope_scaling, and with a `local_base` also local_rope_base, of a `DecoderConfig`.

    Args:
      base, local_base: where the config says none.
    """
    given = fields.take("rope_parameters", dict, {})
    scaling = fields.take("rope_scaling", dict, {})
    theta = fields.take("rope_theta", float, base)
    where = fields.where
    if local_base is None:
        theta, scaling = _read(scaling or given, theta, max_length, where)
        return {"rope_base": theta, "rope_scaling": scaling}
    local_theta = fields.take("rope_local_base_freq", float, local_base)
    theta, scaling = _read(given.get("full_attention") or scaling, theta, max_length, where)
    local_theta, none = _read(given.get("sliding_attention") or {}, local_theta, max_length, where)
    if none is not None:
        raise ConfigError(f"{where}: scaled rotary positions in sliding attention are not supported.")
    return {"rope_base": theta, "rope_scaling": scaling, "local_rope_base": local_theta}


def write_rope(base: float, scaling: RopeScaling | None) -> dict[str, Any]:
    """rope_theta and rope_scaling of a config.json, which every version of transformers reads."""
    if scaling is None:
        return {"rope_theta": base, "rope_scaling": None}
    default = RopeScaling(kind="linear")
    values = {name: getattr(scaling, name) for name in _FIELDS[scaling.kind]}
    always = ("factor", "original_max_length", "low_freq_factor", "high_freq_factor")
    said = {n: v for n, v in values.items() if n in always or v != getattr(default, n)}
    plain = {_NAMES.get(n, n): list(v) if isinstance(v, tuple) else v for n, v in said.items()}
    return {"rope_theta": base, "rope_scaling": {"rope_type": scaling.kind, **plain}}


def _read(given: dict[str, Any], theta: float, max_length: int, where: str) -> tuple[float, RopeScaling | None]:
    fields = Fields(given, f"{where}, rotary positions")
    theta = fields.take("rope_theta", float, theta)
    kind = fields.take("type", str, "default")
    kind = fields.take("rope_type", str, kind)
    fields.only("partial_rotary_factor", 1.0)
    if kind == "default":
        fields.finish()
        return theta, None
    if kind not in _FIELDS:
        raise ConfigError(
            f"{where}: rotary positions of the kind {kind!r} are not supported, only {', '.join(_FIELDS)}."
        )
    values: dict[str, Any] = {"original_max_length": max_length}
    kinds = {f.name: f.type for f in dataclasses.fields(RopeScaling)}
    for name in _FIELDS[kind]:
        plain: type = int if name == "original_max_length" else bool if name == "truncate" else float
        plain = list if "tuple" in str(kinds[name]) else plain
        value = fields.take(_NAMES.get(name, name), plain, None)
        if value is not None:
            values[name] = tuple(map(float, value)) if plain is list else value
    if kind in ("yarn", "longrope"):
        values.setdefault("factor", max_length / values["original_max_length"])
    fields.finish()
    try:
        return theta, RopeScaling(kind=kind, **values)  # pyright: ignore[reportArgumentType]
    except ValueError as e:
        raise ConfigError(f"{where}: {e}") from None
