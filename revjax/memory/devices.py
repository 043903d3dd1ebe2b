"""What a device has and can do at most, from its maker: memory, and dense products in bf16 or fp16 without sparsity.

NVIDIA: data sheets of A100, H100, H200 and B200. TPU: cloud.google.com/tpu/docs, system architecture.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Hardware:
    """One device.

    Attributes:
      kind: the beginning of what jax calls its `device_kind`.
      flops: a second, in bf16 or fp16.
      bytes: of its memory.
      bandwidth: bytes a second between its memory and itself.
    """

    kind: str
    flops: float
    bytes: int
    bandwidth: float

    @property
    def balance(self) -> float:
        """FLOPs in the time that one byte takes."""
        return self.flops / self.bandwidth


def _hardware(kind: str, teraflops: float, gigabytes: int, terabytes_per_s: float) -> Hardware:
    return Hardware(kind, 1e12 * teraflops, gigabytes * 10**9, 1e12 * terabytes_per_s)


HARDWARE = {  # longer kinds before shorter ones
    "a100-80gb": _hardware("NVIDIA A100", 312, 80, 2.0),
    "a100-40gb": _hardware("NVIDIA A100", 312, 40, 1.55),
    "h100-pcie": _hardware("NVIDIA H100 PCIe", 756, 80, 2.0),
    "h100-nvl": _hardware("NVIDIA H100 NVL", 835, 94, 3.9),
    "h100": _hardware("NVIDIA H100", 989, 80, 3.35),
    "h200": _hardware("NVIDIA H200", 989, 141, 4.8),
    "b200": _hardware("NVIDIA B200", 2250, 180, 7.7),
    "tpu-v4": _hardware("TPU v4", 275, 32, 1.2),
    "tpu-v5e": _hardware("TPU v5 lite", 197, 16, 0.8),
    "tpu-v5p": _hardware("TPU v5", 459, 95, 2.76),
    "tpu-v6e": _hardware("TPU v6 lite", 918, 32, 1.6),
}
_OTHER_KINDS = {"TPU v5e": "tpu-v5e", "TPU v6e": "tpu-v6e"}


def peak_flops(device_kind: str, dtype: str) -> float | None:
    """FLOPs a second of one device in bfloat16 or float16; None for another dtype, and where it is not known.

    >>> peak_flops(jax.devices()[0].device_kind, "bfloat16")
    """
    if dtype not in ("bfloat16", "float16"):
        return None
    kinds = {kind: HARDWARE[name] for kind, name in _OTHER_KINDS.items()} | {h.kind: h for h in HARDWARE.values()}
    return next((hardware.flops for kind, hardware in kinds.items() if device_kind.startswith(kind)), None)
