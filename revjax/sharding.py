"""Where arrays live on many devices: a mesh, and a table that says which axis of which parameter is cut.

    batch, streams      rows over data and fsdp
    parameters          by RULES over fsdp; gradients, moments and running means as the parameters they belong to
    everything else     whole on every device

Only jax is imported. Tensor and context parallelism are further axes of the mesh, and further columns of the table.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

PyTree = Any
BATCH = ("data", "fsdp")  # the axes of the mesh that rows are dealt over

# The first pattern that is found in a parameter's path, with an axis of the mesh for each axis of the parameter. Those
# of a stack have layers as their first axis: it is never cut, since a scan takes one layer at a time.
RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"embedding/table$", ("fsdp", None)),  # V, D
    (r"head/kernel$", ("fsdp", None)),  # D, V
    (r"runs/.*/(query|key|value)/kernel$", (None, "fsdp", None, None)),  # L, D, heads, H
    (r"runs/.*/out/kernel$", (None, None, None, "fsdp")),  # L, heads, H, D
    (r"runs/.*/down/kernel$", (None, None, "fsdp")),  # L, F, D
    (r"runs/.*kernel$", (None, "fsdp", None)),  # L, D, F
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How the devices of this process share the work."""

    data: int | None = None  # so many groups, each with its part of a batch; null: all devices that fsdp leaves
    fsdp: int = 1  # so many devices share a copy of parameters, gradients and optimizer state

    def __post_init__(self):
        for name in ("data", "fsdp"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, but got {getattr(self, name)}.")


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """Returns the mesh (data, fsdp) of `config` over `devices`, by default all; raises `ValueError` for too few."""
    devices = jax.devices() if devices is None else devices
    data = max(len(devices) // config.fsdp, 1) if config.data is None else config.data
    if data * config.fsdp > len(devices):
        raise ValueError(
            f"mesh.data={data} times mesh.fsdp={config.fsdp} needs {data * config.fsdp} devices, but there "
            f"{'is' if len(devices) == 1 else 'are'} {len(devices)}."
        )
    grid = np.array(devices[: data * config.fsdp]).reshape(data, config.fsdp)
    return Mesh(grid, ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)


def spec_of(path: str, shape: Sequence[int], mesh: Mesh) -> PartitionSpec:
    """Returns how the parameter at `path` ("stack/runs/0/0/mlp/up/kernel") is cut; what does not divide stays whole."""
    for pattern, axes in RULES:
        if re.search(pattern, path) and len(axes) == len(shape):
            fits = [name if name and size % mesh.shape[name] == 0 else None for name, size in zip(axes, shape)]
            return PartitionSpec(*fits)
    return PartitionSpec()


def state_shardings(state: PyTree, mesh: Mesh) -> PyTree:
    """Returns a `NamedSharding` for each array: parameters, and whatever has the path of one at its end (moments)."""
    return jax.tree.map_with_path(lambda path, x: NamedSharding(mesh, spec_of(_name(path), x.shape, mesh)), state)


def batch_sharding(shape: Sequence[int], mesh: Mesh) -> NamedSharding:
    """Returns how an array whose first axis is rows is dealt out; whole on every device where they do not divide."""
    groups = math.prod(mesh.shape[axis] for axis in BATCH)
    return NamedSharding(mesh, PartitionSpec(BATCH) if shape and shape[0] % groups == 0 else PartitionSpec())


def shard_batch(batch: PyTree, mesh: Mesh) -> PyTree:
    """Returns `batch` with its rows on their devices."""
    return jax.tree.map(lambda x: jax.device_put(x, batch_sharding(x.shape, mesh)), batch)


def gather_layer(mesh: Mesh) -> Callable[[PyTree], PyTree]:
    """Returns a function that makes the parameters of one layer of a stack whole, and cuts their gradients again.

    So the backward pass gathers a layer once, for running it again and for its transpose, and gradients leave the layer
    in the pieces that the optimizer wants.
    """
    whole = NamedSharding(mesh, PartitionSpec())

    @jax.custom_vjp
    def gather(params):
        return jax.tree.map(lambda p: jax.lax.with_sharding_constraint(p, whole), params)

    def backward(_, grads):
        def cut(path, g):
            _, *spec = (*spec_of(f"runs/{_name(path)}", (1, *g.shape), mesh), *[None] * (g.ndim + 1))
            return jax.lax.with_sharding_constraint(g, NamedSharding(mesh, PartitionSpec(*spec[: g.ndim])))

        return (jax.tree.map_with_path(cut, grads),)

    gather.defvjp(lambda params: (gather(params), None), backward)
    return gather


def _name(path: Any) -> str:
    return "/".join(str(getattr(k, "key", getattr(k, "idx", getattr(k, "name", "")))) for k in path)


def constrain_rows(mesh: Mesh) -> Callable[[jax.Array], jax.Array]:
    """Returns a function that keeps the rows of a stream on their devices, for `reversible_scan(..., constrain=)`."""
    return lambda x: jax.lax.with_sharding_constraint(x, batch_sharding(x.shape, mesh))
