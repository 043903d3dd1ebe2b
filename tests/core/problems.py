"""Small stacks that several test files run: bf16 branches with dropout, which is what makes float streams drift."""

import jax
import jax.numpy as jnp

from revjax import core

B, T, D = 2, 16, 32
COUPLINGS = {
    "revnet": core.RevNet(),
    "midpoint": core.Midpoint(0.5),
    "leapfrog": core.Leapfrog(0.3),
    "momentum": core.Momentum(0.5),
    "near-residual-1": core.NearResidual(1),
    "near-residual-2": core.NearResidual(2),
    "near-residual-4": core.NearResidual(4),
    "near-residual-8": core.NearResidual(8),
    "bdia": core.BDIA(key=jax.random.key(7)),
    "h per f": core.LinearCoupling(h=jnp.linspace(0.2, 1.0, 2)[jnp.arange(24) % 2]),
    "signs per f": core.LinearCoupling(sign=jnp.where(jnp.arange(24) % 2, 1, -1), h=0.5),
}


def dropout(x, key):
    return jnp.where(jax.random.bernoulli(key, 0.9, x.shape), x / 0.9, 0)


def norm(x):
    return x * jax.lax.rsqrt(jnp.mean(x.astype(jnp.float32) ** 2, -1, keepdims=True) + 1e-6).astype(x.dtype)


def mix(w, x, side):
    return dropout(jnp.tanh(norm(x).astype(jnp.bfloat16) @ w.astype(jnp.bfloat16)), side)


def swish(w, x, side):
    return dropout(jax.nn.silu(norm(x).astype(jnp.bfloat16) @ w.astype(jnp.bfloat16)), side).astype(jnp.float32)


def make_problem(num_layers, scale=1.5):
    """Parameters of `mix` and `swish` for each layer, x, and keys for dropout."""
    kw, kv, kx, ks = jax.random.split(jax.random.key(0), 4)
    normal = lambda key: scale / D**0.5 * jax.random.normal(key, (num_layers, D, D))
    keys = jax.random.split(ks, (2, num_layers))
    return (normal(kw), normal(kv)), jax.random.normal(kx, (B, T, D)), (keys[0], keys[1])


def make_run(params, side=None, fns=(mix, swish)):
    return core.Run(fns, params, side)


def objective(result):
    """A scalar that depends on both streams."""
    x_prev, x = result.streams
    return jnp.mean(x**2) + (0.0 if x_prev is None else jnp.mean(jnp.sin(x_prev)))


def num_wrong(canary_grad):
    return float(canary_grad[:, 0].sum())
