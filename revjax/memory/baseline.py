"""The rival: the same layers in an ordinary residual stack, `lax.scan` with `jax.checkpoint` per layer.

    x[l+1] = x[l] + f_l(x[l])        x in the compute dtype

Every claim of revjax is measured beside this. Nothing of the reversible core is used here, and no rounding
is pinned: it is what one would write without revjax.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from ..models.decoder import Decoder
from ..nn import cross_entropy


def residual_stack(model: Decoder, x: jax.Array, *, remat: bool = True) -> jax.Array:
    """The layers of `model` as an ordinary residual network; `remat` recomputes each layer in the backward pass."""
    for branches in model.stack.runs:
        graphdef, params_L = nnx.split(list(branches))

        def layer(x, params, graphdef=graphdef):
            for branch in nnx.merge(graphdef, params):
                x = x + _by_chunks(branch, x).astype(x.dtype)
            return x, None

        x, _ = jax.lax.scan(jax.checkpoint(layer) if remat else layer, x, params_L)
    return x


def _by_chunks(branch: nnx.Module, x_BTD: jax.Array) -> jax.Array:
    """The branch on so many tokens at a time as it asks for (`mlp_chunk`), so that the rival saves that memory too."""
    chunk, length = getattr(branch, "chunk_tokens", None), x_BTD.shape[1]
    if not chunk or chunk >= length:
        return branch(x_BTD)  # pyright: ignore[reportCallIssue]
    padded = jnp.pad(x_BTD, ((0, 0), (0, -length % chunk), (0, 0)))
    chunks = padded.reshape(padded.shape[0], -1, chunk, padded.shape[2]).swapaxes(0, 1)
    y = jax.lax.map(jax.checkpoint(lambda x: branch(x)), chunks).swapaxes(0, 1)  # pyright: ignore[reportCallIssue]
    return y.reshape(padded.shape)[:, :length]


def residual_loss(model: Decoder, tokens_BT: jax.Array, targets_BT: jax.Array, *, remat: bool = True) -> jax.Array:
    """The mean cross-entropy of `model`, run as an ordinary residual network; same attention, same fused loss."""
    dtype = jnp.dtype(model.config.dtype)
    x_BTD = residual_stack(model, model.embedding.encode(tokens_BT).astype(dtype), remat=remat)
    x_BTD = model.read_out(x_BTD, x_BTD) if model.readout == "concat" else model.norm(x_BTD)
    loss, weight = cross_entropy(x_BTD, model.head_kernel, targets_BT, tile_tokens=model.config.loss_tile, dtype=dtype)
    return loss / weight


checkpoint_loss = functools.partial(residual_loss, remat=True)
stored_loss = functools.partial(residual_loss, remat=False)
