"""The devices of a run. For one, nothing is said of where arrays live."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from ..errors import ConfigError
from ..models import DecoderConfig
from ..sharding import constrain_rows, gather_layer, make_mesh, shard_batch, state_shardings
from ..training import TrainState
from .config import RunConfig

Params = dict[str, Any]


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
        """What a `Decoder` needs to know of the mesh."""
        return {} if self.mesh is None else {"constrain": constrain_rows(self.mesh), "gather": gather_layer(self.mesh)}

    def model(self, config: DecoderConfig) -> DecoderConfig:
        """With a tile of the loss for each device: after each tile, the head's gradient is summed over all of them."""
        return dataclasses.replace(config, loss_tile=config.loss_tile * self.count)

    def begin(self, start: Callable[[Params], TrainState], params: Params, *, dry: bool) -> TrainState:
        """`start(params)`, its arrays where they belong; with `dry`, their shapes."""
        if self.mesh is None:
            return jax.eval_shape(start, params) if dry else start(params)
        if not dry:  # moments are made where their parameters are
            return self._placed(start(self._placed(params)))
        state = jax.eval_shape(start, params)
        placed = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
        return jax.tree.map(placed, state, state_shardings(state, self.mesh))

    def _placed(self, tree: Any) -> Any:
        assert self.mesh is not None
        return jax.device_put(tree, state_shardings(tree, self.mesh))

    def jit(self, step: Callable, state: TrainState) -> Any:
        """The jitted step, which leaves the state where it found it, and uses it up."""
        if self.mesh is None:
            return jax.jit(step, donate_argnums=0)
        return jax.jit(step, donate_argnums=0, out_shardings=(state_shardings(state, self.mesh), None))

    def deal(self, batch: Any) -> Any:
        """`batch`, its rows on their devices."""
        return batch if self.mesh is None else shard_batch(batch, self.mesh)
