"""A large decoder on one accelerator: memory and time of its gradient, for every plan and every form of jax.checkpoint.

Each way is compiled and timed by itself, one after the other in one process: a device of one's own keeps its speed (the
spread is told). Steps are dispatched in a row, as in training, so that the host is not waited for. Utilisation is told
against the data sheet's peak and against that of a large product measured here, and energy where the driver tells it.
"""

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ..errors import ConfigError
from ..memory import RIVALS, gpu_use, peak_flops
from ..models import Decoder, DecoderConfig, flops_per_token, hardware_flops_per_token, preset
from .rivals import PLANS, gradient_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class AcceleratorConfig:
    """One way to a gradient (see `rivals`) of the preset "decoder-1b", at 24 layers 1.2 billion parameters."""

    way: str
    sequence_length: int
    batch_size: int = 1
    num_layers: int = 24
    mlp_chunk: int | None = None
    steps: int = 2  # in a row
    repeats: int = 3

    def decoder(self) -> DecoderConfig:
        return preset("decoder-1b", num_layers=self.num_layers, mlp_chunk=self.mlp_chunk, loss_tile=4096)


def accelerators() -> list[AcceleratorConfig]:
    """8k, 32k and 128k tokens; at the last, what may fit; and a million with two layers, to show that it runs."""
    ways = [*(f"revjax {plan}" for plan in PLANS), *RIVALS, "offload"]
    fit = ["revjax nothing", "revjax attention", "checkpoint", "attention", "offload"]
    return (
        [AcceleratorConfig(way=way, sequence_length=8192, batch_size=4) for way in ways]
        + [AcceleratorConfig(way=way, sequence_length=131_072, steps=1, repeats=1) for way in fit]
        + [AcceleratorConfig(way=way, sequence_length=32_768, steps=1) for way in [*fit, "revjax all", "stored"]]
        + [AcceleratorConfig(way="revjax nothing", sequence_length=2**20, num_layers=2, mlp_chunk=16_384, repeats=0)]
    )


def accelerator(config: AcceleratorConfig, *, seed: int = 0) -> dict[str, Any]:
    """Measures one way: bytes with parameters and gradients, seconds of a step, utilisation, rows rebuilt wrong.

    Where the device has not enough memory, "seconds" is None, and "bytes" what XLA wants.
    """
    if jax.default_backend() == "cpu":
        raise ConfigError("The suite accelerator needs a GPU or a TPU. Others run on a CPU: revjax benchmark --help")
    decoder = config.decoder()
    model = nnx.merge(_graph(decoder, config.way), _variables(decoder, seed))
    size = (config.batch_size, config.sequence_length)
    tokens = jax.random.randint(jax.random.key(seed), size, 0, decoder.vocab_size)
    row: dict[str, Any] = {"device": jax.devices()[0].device_kind, "seconds": None, "bytes": None}
    try:
        start = time.perf_counter()
        program = jax.jit(gradient_of(config.way)).lower(model, tokens).compile()
        row["compile_s"] = time.perf_counter() - start
        analysis = program.memory_analysis()
        assert analysis is not None, "XLA tells no memory on this backend"
        row |= {"temp_bytes": analysis.temp_size_in_bytes, "bytes": _bytes(analysis)}
        start = time.perf_counter()
        result = jax.block_until_ready(program(model, tokens))
        seconds = [time.perf_counter() - start]  # with what the first step does besides; not used where there are more
        loss, report = result[0] if config.way.startswith("revjax ") else (result[0], None)
        for _ in range(config.repeats):
            start = time.perf_counter()
            for _ in range(config.steps):
                del result  # gradients of one step at a time
                result = program(model, tokens)
            jax.block_until_ready(result)
            seconds.append((time.perf_counter() - start) / config.steps)
        del result
        if config.repeats:
            row |= _energy(lambda: jax.block_until_ready(program(model, tokens)), tokens.size)
    except jax.errors.JaxRuntimeError as e:
        if "RESOURCE_EXHAUSTED" not in str(e):
            raise
        return row
    seconds = seconds[1:] or seconds
    row |= {"seconds": float(np.median(seconds)), "seconds_low": min(seconds), "seconds_high": max(seconds)}
    row |= {"loss": float(loss), "canary": None if report is None else float(report.canary)}
    row["peak_bytes_so_far"] = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    per_second = config.batch_size * config.sequence_length / row["seconds"]
    model_flops = per_second * flops_per_token(decoder, config.sequence_length)
    row |= {"tokens_per_second": per_second, "model_flops": model_flops, "gemm_flops": gemm_flops()}
    row["model_flops_of_gemm"] = model_flops / row["gemm_flops"]
    if peak := peak_flops(row["device"], "bfloat16"):
        row["model_flops_of_peak"] = model_flops / peak
    if config.way.startswith("revjax "):
        plan = config.way.removeprefix("revjax ")
        done = per_second * hardware_flops_per_token(decoder, config.sequence_length, plan)
        row["hardware_flops_of_gemm"] = done / row["gemm_flops"]
    return row


def _energy(step: Callable[[], Any], num_tokens: int) -> dict[str, Any]:
    """Joules of a step and of a token, and watts; or why there are none."""
    try:
        use = gpu_use(step, seconds=2.0)[0]
    except ValueError as e:
        return {"no_energy": str(e)}
    return {"joules": use.step_joules, "joules_per_token": use.step_joules / num_tokens, "watts": use.watts}


def _graph(decoder: DecoderConfig, way: str) -> Any:
    plan = way.removeprefix("revjax ") if way.startswith("revjax ") else "nothing"
    return nnx.graphdef(nnx.eval_shape(lambda: Decoder(decoder, plan=plan, rngs=nnx.Rngs(0))))


@functools.lru_cache(maxsize=1)  # of the last shape: all ways have the same parameters
def _variables(decoder: DecoderConfig, seed: int) -> Any:
    return jax.jit(lambda: nnx.state(Decoder(decoder, rngs=nnx.Rngs(seed))))()


def _bytes(analysis: Any) -> int:
    used = analysis.temp_size_in_bytes + analysis.argument_size_in_bytes + analysis.output_size_in_bytes
    return used - analysis.alias_size_in_bytes


@functools.cache
def gemm_flops(size: int = 8192, repeats: int = 20) -> float:
    """FLOPs a second of a square bf16 product of random numbers, on the device that is here."""
    a, b = (jax.random.normal(jax.random.key(i), (size, size), jnp.bfloat16) for i in (0, 1))
    product = jax.jit(jnp.matmul)
    jax.block_until_ready(product(a, b))
    start = time.perf_counter()
    for _ in range(repeats):
        c = product(a, b)
    jax.block_until_ready(c)
    return 2.0 * size**3 * repeats / (time.perf_counter() - start)
