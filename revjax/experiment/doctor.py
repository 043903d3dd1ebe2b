"""What revjax finds on this machine: for whoever sets it up, or reports a problem."""

import functools
import importlib.metadata
import os
import pathlib
import platform
import shutil
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ..config import users_cache
from ..memory import peak_flops
from ..models import Decoder, DecoderConfig, Report, value_and_grad
from .compilation import MAX_BYTES
from .versions import git_revision, versions

PACKAGES = ("jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
OPTIONAL = {
    **{"pyarrow": "data", "zstandard": "data", "jinja2": "chat", "dm-pix": "vision"},
    **{"tensorboardX": "tensorboard", "wandb": "wandb", "libtpu": None},
}


def doctor() -> tuple[str, list[str]]:
    """Returns a description of machine and software, and what is wrong with them, each with what to do.

    Runs a small model forward and back (compiled first, up to half a minute) to see that its streams are rebuilt.
    """
    problems = known_problems(os.environ)
    if wrong := _small_model():
        problems.append(f"A small model is not exact here: {wrong}")
    lines = {
        "revjax": ", ".join(filter(None, [versions(), git_revision()])),
        "packages": ", ".join(f"{name} {_version(name) or 'is missing'}" for name in PACKAGES),
        "extras": "\n".join(_extra(name, extra) for name, extra in OPTIONAL.items()),
        "machine": f"{platform.platform()}, {_cores()} cores, {_memory()}",
        "devices": "\n".join(map(_device, jax.local_devices())),
        "products": _products(),
        "caches": f"{_folder(users_cache('xla'))}; at most {MAX_BYTES / 1e6:,.0f} MB\n"
        f"{_folder(users_cache('tokens'))}\n{_folder(users_cache('step-bytes'))}\n"
        "(each folder may be deleted: what is in it is made again)",
        "disk": f"{shutil.disk_usage('.').free / 1e9:.0f} GB free here, {_free(users_cache('')):.0f} GB for the caches",
        "exact": "no: see below" if wrong else "a small model with dropout, in bf16: every stream rebuilt to the bit",
        "problems": "\n".join(problems) or "none found",
    }
    rows = [(name if i == 0 else "", line) for name, text in lines.items() for i, line in enumerate(text.split("\n"))]
    return "\n".join(f"{name:<12} {line}" for name, line in rows), problems


def known_problems(environ: Mapping[str, str]) -> list[str]:
    """Settings that are known to do harm, in words."""
    flags = environ.get("XLA_FLAGS", "")
    found = []
    if "xla_cpu_enable_fast_math=true" in flags:
        found.append("XLA_FLAGS has xla_cpu_enable_fast_math, which lets XLA reorder sums of floats. Take it out.")
    if "xla_gpu_deterministic_ops=true" in flags or "xla_gpu_exclude_nondeterministic_ops=true" in flags:
        found.append(
            "XLA_FLAGS asks for deterministic kernels: with cuDNN before 9.25, attention then needs memory that grows "
            "with the square of the length. revjax does not need the flag."
        )
    if "XLA_PYTHON_CLIENT_MEM_FRACTION" in environ:
        found.append("XLA_PYTHON_CLIENT_MEM_FRACTION has a new name: XLA_CLIENT_MEM_FRACTION.")
    if jax.config.values["jax_disable_jit"]:
        found.append("JAX_DISABLE_JIT is set: nothing is compiled, and all is slow. Unset it.")
    if jax.config.values["jax_disable_most_optimizations"]:
        found.append(
            "JAX_DISABLE_MOST_OPTIMIZATIONS is set: XLA's tanh then depends on what stands beside it, so that layers "
            "that use it (gelu) may not be rebuilt to the bit. Unset it."
        )
    if shutil.which("nvidia-smi") and jax.default_backend() == "cpu":
        found.append("There is an NVIDIA driver, but jax does not use it. Type: pip install -e '.[gpu]'")
    return found


def _small_model() -> str:
    """Which of its layers were not rebuilt to the bit, in words; "" where all were."""
    model = Decoder(DecoderConfig(d_model=64, num_layers=4, num_heads=2, dropout=0.1), rngs=nnx.Rngs(0))
    tokens = jax.random.randint(jax.random.key(0), (2, 129), 0, model.config.vocab_size)

    @jax.jit
    def gradient(model: Decoder) -> tuple[Report, Any]:
        key = jax.random.key(1)
        loss = lambda model: jnp.divide(*model.loss(tokens[:, :-1], tokens[:, 1:], key=key))
        (_, report), grads = value_and_grad(loss)(model)
        return report, grads  # without them, nothing would be rebuilt

    return gradient(model)[0].describe(model)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _extra(name: str, extra: str | None) -> str:
    how = f": pip install -e '.[{extra}]'" if extra else ""
    return f"{name} {_version(name) or f'is not there{how}'}"


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _memory() -> str:
    try:
        return f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 1e9:.0f} GB"
    except (ValueError, OSError, AttributeError):  # not on this system
        return "memory not known"


def _device(device: Any) -> str:
    limit = (device.memory_stats() or {}).get("bytes_limit")
    peak = peak_flops(device.device_kind, "bfloat16")
    memory = f", {limit / 1e9:.0f} GB for jax" if limit else ""
    return f"{device} ({device.device_kind}){memory}" + (f", {peak / 1e12:.0f} TFLOP/s in bf16" if peak else "")


def _products() -> str:
    """How fast matrices are multiplied: a CPU without instructions for bf16 is slower in it than in fp32."""
    speed = {dtype: _product_flops(dtype) for dtype in ("bfloat16", "float32")}
    text = ", ".join(f"{flops / 1e9:,.0f} GFLOP/s in {dtype}" for dtype, flops in speed.items())
    return text + (": --model.dtype=float32 is faster here" if speed["float32"] > 1.2 * speed["bfloat16"] else "")


def _product_flops(dtype: str, size: int = 1024, repeats: int = 5) -> float:
    """Floating-point operations a second, in the fastest of a few products."""
    a = jnp.ones((size, size), dtype)
    product = jax.jit(functools.partial(jnp.dot, preferred_element_type=jnp.float32))
    jax.block_until_ready(product(a, a))
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(product(a, a))
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)


def _folder(path: pathlib.Path) -> str:
    sizes = [file.stat().st_size for file in path.rglob("*") if file.is_file()]
    return f"{path}: {len(sizes):,} files, {sum(sizes) / 1e6:,.0f} MB"


def _free(path: pathlib.Path) -> float:
    there = next(p for p in (path, *path.parents) if p.exists())
    return shutil.disk_usage(there).free / 1e9
