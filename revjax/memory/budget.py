"""A budget of memory, as people write it, in bytes of one device."""

import math
import pathlib
import re

import jax

from ..errors import ConfigError, nearest
from .devices import HARDWARE, Hardware

_UNITS = {"": 1, "B": 1} | {
    f"{letter}{binary}B": (1024 if binary else 1000) ** power
    for power, letter in enumerate("kMGT", start=1)
    for binary in ("", "i")
}
_SHARE_OF_DEVICE = 0.9  # of `auto`: the rest is for what XLA does not count


def budget_bytes(budget: str, hardware: str | None = None) -> int:
    """Bytes of one device: "40GiB", "0.5" (of the device) or "auto" (most of it).

    Args:
      hardware: the device, a name of `HARDWARE`; None is the one that is here.

    Raises `ConfigError` for a budget or a device that is none of these.
    """
    try:
        share = _SHARE_OF_DEVICE if budget == "auto" else float(budget)
    except ValueError:
        share = None
    if share is not None and 0 < share <= 1:
        return int(share * (device_bytes() if hardware is None else known_hardware(hardware).bytes))
    try:
        found = parse_bytes(budget)
        if found < 10**6 and not re.search("[A-Za-z]", budget):
            raise ValueError(f"{budget} bytes are meant? It has no unit: write {budget}GB or {budget}MB.")
        return found
    except ValueError as e:
        raise ConfigError(
            f"The budget {budget!r}: {e} It may also be a part of the device (0.5), auto, aggressive or balanced."
        ) from None


def parse_bytes(text: str) -> int:
    """Reads "40GiB", "8 GB", "500MB", "1e9".

    Raises `ValueError` for a unit that is not one, and for what is not above 0.

    >>> parse_bytes("1.5GiB")
    1610612736
    """
    match = re.fullmatch(r"\s*([0-9.]+(?:e[+-]?[0-9]+)?)\s*([A-Za-z]*)\s*", text)
    units = {name.lower(): factor for name, factor in _UNITS.items()}
    try:
        number, unit = float(match[1]), match[2]  # pyright: ignore[reportOptionalSubscript]
        found = number * units[unit.lower()]
    except (TypeError, ValueError, KeyError):
        raise ValueError(f"Bytes are written as 40GiB, 8GB, 500MB or 1e9, but got {text!r}.") from None
    if not 0 < found < math.inf:
        raise ValueError(f"Bytes must be above 0, but got {text!r}.")
    return int(found)


def known_hardware(name: str) -> Hardware:
    """The entry of `HARDWARE`; raises `ConfigError` where there is none."""
    if name.lower() not in HARDWARE:
        raise ConfigError(
            f"There is no hardware {name!r}.{nearest(name.lower(), HARDWARE)} Known are {', '.join(HARDWARE)}; for "
            "another, give its memory: --budget=40GiB."
        )
    return HARDWARE[name.lower()]


def device_bytes() -> int:
    """The memory of one device that this process can have; of a CPU, its part of what is free."""
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    if limit:
        return limit
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            lines = dict(line.split(":", 1) for line in file)
        free = 1024 * int(lines["MemAvailable"].split()[0])
        allowed = pathlib.Path("/sys/fs/cgroup/memory.max")
        limit = allowed.read_text().strip() if allowed.is_file() else "max"
        return min(free, int(limit) if limit.isdecimal() else free) // jax.local_device_count()
    except (OSError, KeyError, ValueError):
        raise ConfigError("This device does not tell its memory: give bytes, such as --budget=8GB.") from None
