"""What a device can do at most, from its maker: dense products in bf16 or fp16, without sparsity.

NVIDIA: data sheets of A100, H100, H200 and B200. TPU: cloud.google.com/tpu/docs, system architecture.
"""

_PEAK_TFLOPS = {  # the beginning of `device_kind`; longer names first
    "NVIDIA A100": 312,
    "NVIDIA H100 PCIe": 756,
    "NVIDIA H100 NVL": 835,
    "NVIDIA H100": 989,
    "NVIDIA H200": 989,
    "NVIDIA B200": 2250,
    "TPU v4": 275,
    "TPU v5 lite": 197,
    "TPU v5e": 197,
    "TPU v5": 459,
    "TPU v6 lite": 918,
    "TPU v6e": 918,
}


def peak_flops(device_kind: str, dtype: str) -> float | None:
    """FLOPs a second of one device in bfloat16 or float16; None for another dtype, and where it is not known.

    >>> peak_flops(jax.devices()[0].device_kind, "bfloat16")
    """
    if dtype not in ("bfloat16", "float16"):
        return None
    return next((1e12 * tera for name, tera in _PEAK_TFLOPS.items() if device_kind.startswith(name)), None)
