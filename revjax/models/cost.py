"""What a model is, in numbers counted by hand: parameters, FLOPs per token, a summary."""

import math
from collections.abc import Iterator
from typing import Any

import jax
from flax import nnx

from ..core.plan import All, Keep, Reverse, for_runs
from .decoder_config import DecoderConfig
from .encoder import EncoderConfig
from .encoder_decoder import EncoderDecoderConfig
from .families import ModelConfig
from .lora import Frozen
from .stack import ReversibleStack
from .tower import Tower
from .transformer_config import TransformerConfig
from .vision import VisionConfig


def num_params(model: nnx.Module, *, trained_only: bool = False) -> int:
    """How many parameters `model` has (an abstract one, from nnx.eval_shape, will do)."""
    wanted = nnx.Param if trained_only else nnx.Any(nnx.Param, Frozen)
    return sum(p.size for p in jax.tree.leaves(nnx.state(model, wanted)))


def flops_per_token(config: ModelConfig, sequence_length: int) -> float:
    """Model FLOPs for one token of a training step: forward and backward, nothing twice, causal attention halved.

    6 for each parameter of a matrix product, and 12 for each channel and visible position of attention
    (two products, three passes, two FLOPs each). The convention is PaLM's (arXiv:2204.02311, appendix B), but
    with the masked half of attention left out. Where there are adapters, what they are beside is frozen: 4. A token of
    an encoder-decoder is one of the target, for which there is one of the source.
    """
    layers, head = sum(_forward_flops(config, sequence_length)), _head_flops(config)
    if config.lora is None:
        return 3 * (layers + head)
    frozen = head + _num_layers(config) * 2 * sum(math.prod(shape) for shape in layer_kernels(config).values())
    return 3 * (layers + head) - frozen


def hardware_flops_per_token(config: ModelConfig, sequence_length: int, plan: str) -> float:
    """As `flops_per_token`, with what the plan computes again.

    That is every layer's forward pass; with `attention`, but for the kernel of attention; with `all`, nothing.
    """
    weights, kernel = _forward_flops(config, sequence_length)
    again = 0.0
    for num_layers, keep in kept_layers(config, plan):
        share, named = num_layers / config.num_layers, isinstance(keep, Reverse) and "attention" in keep.names
        again += share * (0 if isinstance(keep, All) else weights if named else weights + kernel)
    return flops_per_token(config, sequence_length) + again


def _forward_flops(config: ModelConfig, sequence_length: int) -> tuple[float, float]:
    """FLOPs of all layers' forward pass for one token: of products with weights, and of the kernels of attention."""
    causal = isinstance(config, DecoderConfig)
    kernel = attention_kernel_flops(config, sequence_length, causal=causal)
    weights = layer_forward_flops(config, sequence_length, causal=causal) - kernel
    if not isinstance(config, EncoderDecoderConfig):
        return config.num_layers * weights, config.num_layers * kernel
    cross = 2.0 * sum(math.prod(layer_kernels(config)[name]) for name in ("query", "key", "value", "out"))
    deep = config.decoder_layers
    return (config.num_layers + deep) * weights + deep * cross, (config.num_layers + 1.5 * deep) * kernel


def _num_layers(config: ModelConfig) -> int:
    return config.num_layers + (config.decoder_layers if isinstance(config, EncoderDecoderConfig) else 0)


def _head_flops(config: ModelConfig) -> float:
    """Of the forward pass of one token, beside the layers."""
    if isinstance(config, VisionConfig):
        patch = 2 * config.channels * config.patch_size**2 * config.d_model
        return patch + 2 * config.num_classes * config.d_model / config.num_tokens
    head = 2 * config.vocab_size * config.d_model
    return config.mask_rate * (head + 2 * config.d_model**2) if isinstance(config, EncoderConfig) else head


def kept_layers(config: TransformerConfig, plan: str) -> list[tuple[int, Keep]]:
    """(how many layers, what the plan keeps of them), first layers first."""
    found, rest = [], config.num_layers
    for parts in for_runs(plan, config.run_lengths):
        each = min(len(config.period), rest)  # layers of a repeat
        found += [(n * each, keep) for n, keep in parts]
        rest -= sum(n * each for n, _ in parts)
    return found


def layer_forward_flops(config: TransformerConfig, sequence_length: int, *, causal: bool = True) -> float:
    """FLOPs of one layer's forward pass for one token: 2 for each weight, and the kernel of attention."""
    kernels = layer_kernels(config)
    weights = sum(math.prod(shape) for shape in kernels.values())
    if config.lora is not None:
        weights += sum(config.lora.rank * sum(kernels[name]) for name in config.lora.layers if name in kernels)
    return 2.0 * weights + attention_kernel_flops(config, sequence_length, causal=causal)


def layer_kernels(config: TransformerConfig) -> dict[str, tuple[int, int]]:
    """(inputs, outputs) of each matrix of a layer."""
    heads, kv_heads = config.num_heads * config.head_size, config.kv_heads * config.head_size
    attention = {
        "query": (config.d_model, heads),
        "key": (config.d_model, kv_heads),
        "value": (config.d_model, kv_heads),
    }
    mlp = {"up": (config.d_model, config.mlp_width), "down": (config.mlp_width, config.d_model)}
    gate = {"gate": mlp["up"]} if config.gated else {}
    return attention | {"out": (heads, config.d_model)} | gate | mlp


def attention_kernel_flops(config: TransformerConfig, sequence_length: int, *, causal: bool = True) -> float:
    """FLOPs of softmax(q k^T) v in one layer's forward pass for one token: 4 for each channel and visible position."""
    heads, local = config.num_heads * config.head_size, config.period.count("local") / len(config.period)
    everything = sequence_length / 2 if causal else float(sequence_length)
    seen = min(everything, (1 if causal else 2) * (config.window or sequence_length))
    return 4.0 * heads * (local * seen + (1 - local) * everything)


def summary(model: Any) -> str:
    """A table of the parts of a decoder, an encoder, ...: shapes, parameters, where they go."""
    config = model.config
    rows = list(_parts(model, config))
    if getattr(model, "head", model) is None:
        rows.append(("head", "tied to the embedding", 0))
    rows.append(("total", f"{config.coupling}, {'exact' if config.exact else 'float'} streams", num_params(model)))
    if config.lora is not None:
        rows.append(("trained", f"adapters of rank {config.lora.rank}", num_params(model, trained_only=True)))
    width = [max(len(str(row[i])) for row in rows) for i in (0, 1)]
    return "\n".join(f"{name:<{width[0]}}  {shape:<{width[1]}}  {n:>14,}" for name, shape, n in rows)


_ORDER = (("stack", "encoder"), ("decoder",), ("norm", "readout"), ("head", "pooler"))  # after what makes vectors


def _parts(module: nnx.Module, config: TransformerConfig, of: str = "") -> Iterator[tuple[str, str, int]]:
    """(name, shape, parameters) of each part, from the input to the head."""
    place = lambda name: next((i for i, names in enumerate(_ORDER, 1) if name.startswith(names)), 0)
    for name, part in sorted(vars(module).items(), key=lambda item: (place(item[0]), item[0])):
        if isinstance(part, ReversibleStack):
            for branches, length in zip(part.runs, part.lengths, strict=True):
                for b in branches:
                    yield f"{of}{length} x {type(b).__name__}", _shape_of(b, config), num_params(b)
        elif isinstance(part, Tower):
            yield from _parts(part, config, f"{name}: ")
        elif isinstance(part, nnx.Module | nnx.Param):
            shapes = [p.shape for p in jax.tree.leaves(nnx.state(part) if isinstance(part, nnx.Module) else part)]
            largest = max(shapes, key=math.prod)
            yield of + name.replace("_", " "), " x ".join(map(str, largest)), sum(map(math.prod, shapes))


def _shape_of(branch: nnx.Module, config: TransformerConfig) -> str:
    heads = f"{config.num_heads} heads of {config.head_size}" + (
        f", {config.kv_heads} kv heads" if config.kv_heads != config.num_heads else ""
    )
    width = f"width {config.mlp_width}{', gated' if config.gated else ''}"
    name = type(branch).__name__
    return heads if name.endswith("AttentionBranch") else width if name == "MLPBranch" else f"{heads}; {width}"
