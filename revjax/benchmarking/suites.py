"""The claims of the README as lists of measurements, whose rows are written as they come and never measured twice."""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax

from ..errors import ConfigError
from ..logging import get_logger
from .accelerator import accelerator, accelerators
from .cost import cost, draw
from .exactness import (
    EXACT_COUPLINGS,
    FAMILIES,
    OTHER_FAMILIES,
    ExactnessConfig,
    FamilyConfig,
    exactness,
    family_memory,
)
from .gradients import GradientsConfig, gradients
from .loop import LoopConfig, loop
from .memory import AttentionConfig, KeptConfig, MemoryConfig, TrainStepConfig, attention, kept, memory, train_step
from .peers import PEERS, PeerConfig, peer
from .planning import PlanningConfig, planning
from .rivals import rival, ways
from .speed import SpeedConfig, speed

_LONG: dict[str, Any] = dict(num_layers=96, d_model=128, sequence_length=128, batch_size=1)
_WIDE: dict[str, Any] = dict(num_layers=24, d_model=256, sequence_length=512, batch_size=4)
_TUNED: dict[str, Any] = dict(num_layers=24, d_model=64, sequence_length=64, batch_size=2)
_ODD_LONG: dict[str, Any] = _LONG | {"sequence_length": 121}
_ODD_WIDE: dict[str, Any] = _WIDE | {"sequence_length": 127}

SUITES: dict[str, tuple[Callable[[Any], dict[str, Any]], list[Any]]] = {
    "exactness": (
        exactness,
        [ExactnessConfig(coupling=c, **_WIDE) for c in EXACT_COUPLINGS]
        + [ExactnessConfig(coupling=c, steps=200, **_LONG) for c in EXACT_COUPLINGS]
        + [ExactnessConfig(coupling=c, steps=200, drift=False, **_WIDE) for c in ("revnet", "near-residual:1")]
        + [ExactnessConfig(coupling=c, dtype="float32", **_LONG) for c in ("revnet", "near-residual:1", "bdia:1")]
        # Odd lengths, few heads, and norms by head: short loops, in which functions have other approximations.
        + [
            ExactnessConfig(coupling="revnet", qk_norm=True, num_heads=4, dtype=dtype, **shape)
            for dtype in ("bfloat16", "float32")
            for shape in (_ODD_WIDE, _ODD_LONG)
        ],
    ),
    "families": (
        exactness,
        [
            FamilyConfig(family=f, coupling=c, steps=200, drift=False, **_TUNED)
            for f in FAMILIES
            for c in ("near-residual:4", "bdia:4" if f == "bert" else "bdia:1")  # post-norm layers need near ones
        ],
    ),
    "gradients": (
        gradients,
        [
            GradientsConfig(coupling=c, dtype=dtype, num_layers=12, d_model=128, sequence_length=128, batch_size=2)
            for dtype in ("float32", "bfloat16")
            for c in ("revnet", "leapfrog:0.5", "momentum:0.25", "near-residual:1", "near-residual:4", "bdia:1")
        ],
    ),
    "attention": (attention, [AttentionConfig(sequence_length=t) for t in (4096, 8192, 16_384)]),
    "train-step": (
        train_step,
        [
            TrainStepConfig(
                num_layers=n, d_model=512, sequence_length=2048, batch_size=1, vocab_size=32_000, in_backward=how
            )
            for how in (None, "one_sweep", "two_sweeps")
            for n in (12, 48)
        ],
    ),
    "memory": (
        memory,
        [
            MemoryConfig(num_layers=n, d_model=256, sequence_length=512, batch_size=4, stack_only=True)
            for n in (12, 48, 96, 384)
        ]
        + [
            MemoryConfig(num_layers=n, d_model=512, sequence_length=2048, batch_size=1, vocab_size=32_000)
            for n in (12, 48)
        ],
    ),
    "family-memory": (
        family_memory,
        [
            FamilyConfig(family=f, coupling="revnet", num_layers=n, d_model=128, sequence_length=128, batch_size=8)
            for f in OTHER_FAMILIES
            for n in (6, 24, 96)
        ],
    ),
    "kept": (
        kept,
        [
            KeptConfig(coupling=c, num_layers=12, d_model=256, sequence_length=512, batch_size=4)
            for c in ("revnet", "near-residual:1", "near-residual:4", "bdia:4")
        ],
    ),
    "context": (
        memory,
        [
            MemoryConfig(num_layers=12, d_model=256, sequence_length=t, batch_size=1, vocab_size=8192)
            for t in (4096, 16_384, 65_536, 131_072)
        ],
    ),
    "cost": (cost, draw(seed=20_261_130, n=24)),
    "planner": (
        planning,
        [
            PlanningConfig(**_WIDE, vocab_size=256, dtype="bfloat16"),
            PlanningConfig(**_WIDE, vocab_size=8192, dtype="float32"),
            PlanningConfig(
                num_layers=12, d_model=128, sequence_length=4096, batch_size=2, vocab_size=8192, dtype="bfloat16"
            ),
            PlanningConfig(
                num_layers=48,
                d_model=128,
                sequence_length=256,
                batch_size=8,
                vocab_size=256,
                dtype="bfloat16",
                coupling="near-residual:1",
            ),
        ],
    ),
    "peers": (
        peer,
        [
            PeerConfig(peer=name, num_layers=12, d_model=256, sequence_length=512, batch_size=4)
            for name in ("revjax", *PEERS)
        ],
    ),
    "rivals": (
        rival,
        [
            config
            for dtype in ("bfloat16", "float32")
            for config in ways(
                num_layers=48, d_model=256, sequence_length=2048, batch_size=1, vocab_size=8192, dtype=dtype
            )
        ],
    ),
    "speed": (
        speed,
        [SpeedConfig(dtype=dtype, **_WIDE) for dtype in ("bfloat16", "float32")]
        + [SpeedConfig(dtype="bfloat16", coupling=c, **_WIDE) for c in ("near-residual:1", "near-residual:4")]
        + [
            SpeedConfig(num_layers=12, d_model=128, sequence_length=8192, batch_size=1, dtype=dtype, pairs=9)
            for dtype in ("bfloat16", "float32")
        ],
    ),
    "accelerator": (accelerator, accelerators()),
    "loop": (loop, [LoopConfig(num_layers=12, d_model=96, sequence_length=128, batch_size=8)]),
}


ABOUT = {
    "exactness": "rows rebuilt wrong after training, for every coupling, beside float streams (about an hour)",
    "families": "rows rebuilt wrong while pretrained families are tuned, at 24 layers (twenty minutes)",
    "gradients": "gradients against stored activations, for six couplings in two dtypes (ten minutes)",
    "attention": "bytes of blockwise attention at three lengths (a minute)",
    "train-step": "bytes of the whole training step, also with updates in the backward pass (four minutes)",
    "memory": "bytes of the gradient beside jax.checkpoint and stored, by depth (two minutes)",
    "family-memory": "bytes of the gradient of other families than decoders, by depth (five minutes)",
    "kept": "bytes that couplings keep of each token and layer, beside jax.checkpoint and stored (five minutes)",
    "context": "bytes of the gradient beside jax.checkpoint and stored, by the length of the context (two minutes)",
    "cost": "bytes of a step as counted by hand, beside those of the compiled one, 24 drawn at random (four minutes)",
    "planner": "what the planner would choose for 20 budgets, beside the fastest steps that fit (half an hour)",
    "peers": "time and memory beside reversible libraries of PyTorch; installs them (half an hour)",
    "rivals": "every plan beside every form of jax.checkpoint, memory and time in pairs (an hour)",
    "speed": "time of a step beside jax.checkpoint and stored, in pairs (twenty minutes)",
    "accelerator": "a decoder of 1.2 billion on one GPU: memory, time and energy of every way (ten minutes there)",
    "loop": "time of the training loop beside the bare jitted step, in pairs (two minutes)",
}  # on two CPU cores


def run_suite(name: str, folder: pathlib.Path) -> Iterator[dict[str, Any]]:
    """Yields every row of a suite; those already in `folder`/NAME.jsonl under this jax are read, not measured."""
    measure, configs = SUITES[name]
    path = folder / f"{name}.jsonl"
    try:  # before an hour is spent
        folder.mkdir(parents=True, exist_ok=True)
        path.touch()
    except OSError as e:
        raise ConfigError(f"Cannot write to {path}: {e.strerror}. Give another folder: --folder=FOLDER.") from None
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for i, config in enumerate(configs):
        get_logger(__name__).info("%s: row %d of %d", name, i + 1, len(configs))
        wanted = {"jax": jax.__version__, "backend": jax.default_backend()} | dataclasses.asdict(config)
        row = next((row for row in rows if wanted.items() <= row.items()), None)
        if row is None:
            row = wanted | measure(config)
            with path.open("a") as file:
                file.write(json.dumps(row, allow_nan=False) + "\n")
        yield row
