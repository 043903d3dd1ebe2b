"""How near costs that are counted by hand come to those of compiled training steps, drawn at random."""

import dataclasses
import random

from ..memory import step_cost
from ..models import DecoderConfig
from .memory import step_temp_bytes


@dataclasses.dataclass(frozen=True, kw_only=True)
class CostConfig:
    """A decoder, a batch and a plan."""

    num_layers: int
    d_model: int
    num_heads: int
    vocab_size: int
    dtype: str
    loss_tile: int
    sequence_length: int
    batch_size: int
    plan: str

    def decoder(self) -> DecoderConfig:
        fields = {f.name for f in dataclasses.fields(DecoderConfig)}
        return DecoderConfig(**{k: v for k, v in dataclasses.asdict(self).items() if k in fields})


def draw(seed: int, n: int) -> list[CostConfig]:
    """Returns `n` configurations, of which none has more than 2**27 elements in its streams over all layers."""
    rng, found = random.Random(seed), []
    while len(found) < n:
        head, heads = rng.choice([32, 64]), rng.choice([2, 4, 6, 8, 12])
        config = CostConfig(
            num_layers=rng.choice([6, 12, 24, 48]),
            d_model=head * heads,
            num_heads=heads,
            vocab_size=rng.choice([256, 1024, 8192, 32_000]),
            dtype=rng.choice(["bfloat16", "float32"]),
            loss_tile=rng.choice([256, 1024]),
            sequence_length=rng.choice([256, 512, 1000, 2048, 4096]),
            batch_size=rng.choice([1, 2, 4]),
            plan=rng.choice(["nothing", "attention", "all"]),
        )
        if config.num_layers * config.batch_size * config.sequence_length * config.d_model <= 2**27:
            found.append(config)
    return found


def cost(config: CostConfig) -> dict[str, float | str]:
    """Temporary bytes of a training step with AdamW: counted, compiled, and how far the count is off."""
    decoder, shape = config.decoder(), (config.batch_size, config.sequence_length)
    compiled, size = step_temp_bytes(decoder, *shape, config.plan)
    counted = step_cost(decoder, *shape, plan=config.plan, num_params=size, state_bytes=0)
    return {
        "highest": counted.highest,
        "counted": counted.bytes,
        "compiled": compiled,
        "gradients": 4 * size,
        "off": counted.bytes / compiled - 1,
    }
