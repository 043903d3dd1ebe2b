"""`python -m revjax.benchmarking.peers.jax_step CONFIG`: revjax's part, in a process of its own; prints JSON."""

import json
import sys

import jax
import jax.numpy as jnp
from flax import nnx

from ...models import Decoder, DecoderConfig, value_and_grad
from .process import measure


def main(given: dict) -> dict:
    """Measures the gradient of a stack of `given["num_layers"]` layers."""
    config = DecoderConfig(
        num_layers=given["num_layers"],
        d_model=given["d_model"],
        num_heads=given["d_model"] // 64,
        positions="learned",  # outside the stack: no rotary embedding in it, as in the peers' attention
        dtype="float32",
    )
    stack = Decoder(config, rngs=nnx.Rngs(0)).stack
    x = jax.random.normal(jax.random.key(1), (given["batch_size"], given["sequence_length"], given["d_model"]))
    gradient = lambda stack, x: value_and_grad(lambda stack: jnp.mean(stack(x) ** 2))(stack)
    step = jax.jit(gradient).lower(stack, x).compile()
    found = measure(lambda: jax.block_until_ready(step(stack, x)), given["what"], given["repeats"])
    _, ours = step(stack, x)
    stack.plan = "all"
    _, stored = jax.jit(gradient)(stack, x)
    return {given["what"]: found, "version": jax.__version__, "error": _relative(ours, stored)}


def _relative(a, b) -> float:
    norm = lambda tree: sum(float(jnp.sum(x**2)) for x in jax.tree.leaves(tree)) ** 0.5
    return norm(jax.tree.map(lambda x, y: x - y, a, b)) / norm(b)


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
