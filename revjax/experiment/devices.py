"""The devices of a run. For one, nothing is said of where arrays live."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from ..errors import ConfigError
from ..models import ModelConfig, VisionConfig
from ..sharding import batch_sharding, constrain_rows, gather_layer, make_mesh, shard_batch, state_shardings
from ..training import TrainState
from .config import RunConfig


@dataclasses.dataclass(frozen=True)
class Devices:
    """One device, or those of a mesh."""

    mesh: Mesh | None

    @staticmethod
    def of(config: RunConfig) -> "Devices":
        """Those of `config`; raises `ConfigError` where they are not there, or do not divide a micro-batch."""
        try:
            mesh = make_mesh(config.mesh)
        except ValueError as e:
            raise ConfigError(str(e)) from None
        rows, accumulation = config.data.batch_size // config.memory.accumulation, config.memory.accumulation
        if rows % mesh.size:
            raise ConfigError(
                f"{mesh.size} devices share the {rows} rows of a micro-batch, which they must divide (data.batch_size "
                f"by memory.accumulation). Set --data.batch_size={mesh.size * accumulation}, or --mesh.data=1 "
                "--mesh.fsdp=1 for one device."
            )
        return Devices(mesh if mesh.size > 1 else None)

    @property
    def count(self) -> int:
        return 1 if self.mesh is None else self.mesh.size

    @property
    def hooks(self) -> dict[str, Callable]:
        """What a model needs to know of the mesh."""
        return {} if self.mesh is None else {"constrain": constrain_rows(self.mesh), "gather": gather_layer(self.mesh)}

    def model(self, config: ModelConfig) -> ModelConfig:
        """With a tile of the loss for each device: after each tile, the head's gradient is summed over all of them."""
        if isinstance(config, VisionConfig):  # it has few logits
            return config
        return dataclasses.replace(config, loss_tile=config.loss_tile * self.count)

    def shapes_of_state(self, state: TrainState) -> TrainState:
        """`state`, of shapes, with the places where its arrays belong."""
        if self.mesh is None:
            return state
        return jax.tree.map(_placed, state, state_shardings(state, self.mesh))

    def shapes_of_batch(self, batch: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.ShapeDtypeStruct]:
        """A batch of these shapes, as `deal` deals it out."""
        if self.mesh is None:
            return batch
        return {name: _placed(x, batch_sharding(x.shape, self.mesh)) for name, x in batch.items()}

    def make(self, start: Callable[..., TrainState], shapes: TrainState, *args: Any) -> TrainState:
        """`start(*args)`, each array made where it belongs. Its arrays among `args` are used up."""
        donated = tuple(range(len(args)))
        if self.mesh is None:
            return jax.jit(start, donate_argnums=donated)(*args)
        args = tuple(jax.device_put(x, state_shardings(x, self.mesh)) for x in args)
        return jax.jit(start, donate_argnums=donated, out_shardings=state_shardings(shapes, self.mesh))(*args)

    def jit(self, step: Callable, state: TrainState) -> Any:
        """The jitted step, which leaves the state where it found it, and uses it up."""
        if self.mesh is None:
            return jax.jit(step, donate_argnums=0)
        return jax.jit(step, donate_argnums=0, out_shardings=(state_shardings(state, self.mesh), None))

    def deal(self, batch: Any) -> Any:
        """`batch`, its rows on their devices."""
        return batch if self.mesh is None else shard_batch(batch, self.mesh)


def _placed(x: jax.ShapeDtypeStruct, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding, weak_type=x.weak_type)
