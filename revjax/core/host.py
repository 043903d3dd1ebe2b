"""Arrays on their way to the host's memory and back, inside of a program.

A GPU and a TPU move what a loop keeps there while the loop goes on. A CPU has no other memory: XLA accepts there what
says so, and moves nothing, so such a program is refused when it is lowered for a CPU.
"""

import jax
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

HOST_IS_ALL_THERE_IS = (
    "The plan 'host' keeps streams in the host's memory, but a CPU has no other: nothing would be saved. Pass "
    "plan='inputs:K' here, or compile for a GPU or a TPU."
)

_beside_a_host = Primitive("beside_a_host")  # the identity, on devices that are not the host


def to_host(x: jax.Array) -> jax.Array:
    """`x` in the host's memory. Compiling for a CPU raises ValueError."""
    return jax.device_put(_beside_a_host.bind(x), jax.memory.Space.Host)


def to_device(x: jax.Array) -> jax.Array:
    """`x` in the device's memory again."""
    return jax.device_put(x, jax.memory.Space.Device)


def _refuse(*_):
    raise ValueError(HOST_IS_ALL_THERE_IS)


_beside_a_host.def_abstract_eval(lambda x: x)
mlir.register_lowering(_beside_a_host, lambda _, x: [x])
mlir.register_lowering(_beside_a_host, _refuse, platform="cpu")
batching.defvectorized(_beside_a_host)
