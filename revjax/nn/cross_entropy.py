"""The loss of a language model without its logits: tokens in tiles, the whole vocabulary in each.

    z = x . W + bias        lse = log sum exp z        loss = sum over tokens of weight (lse - z[target] + z_loss lse^2)

    dz = weight (softmax(z) (1 + 2 z_loss lse) - onehot(target))    dx = dz . W^T    dW += x^T . dz    dbias += sum dz

With a soft cap c (Gemma 2, arXiv:2408.00118), z becomes c tanh(z / c), and dz is multiplied by 1 - (z / c)^2.

When the loss is differentiated, dx and dW are computed in the forward loop, while a tile's logits exist
(three matmuls; recomputing the logits later would take four), and they are all that is kept: as large as
x and W, whatever T * V is. The idea is Liger's (arXiv:2410.10989); z_loss is PaLM's (arXiv:2204.02311).

Tiles run along T and hold the whole batch, so that a sharded batch stays where it is.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

_PRODUCT_BYTES = 16 * 2**20


def cross_entropy(
    hidden_BTD: jax.Array,
    kernel_DV: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array | None = None,
    *,
    bias_V: jax.Array | None = None,
    tile_tokens: int = 256,
    z_loss: float = 0.0,
    softcap: float | None = None,
    dtype=jnp.bfloat16,
) -> tuple[jax.Array, jax.Array]:
    """Returns (sum of weighted losses in nats, sum of weights), both fp32 scalars: their ratio is the mean.

    Memory grows with tile_tokens * V and with the sizes of `hidden` and `kernel`, not with T * V. Without
    differentiation no gradient work is done. A target outside [0, V) whose weight is not 0 makes both NaN.

    Args:
      weights_BT: None counts every token once.
      bias_V: added to the logits of each token; None is none.
      tile_tokens: about how many tokens have logits at a time, over the whole batch; need not divide B * T.
      z_loss: weight of lse^2, which keeps the logits' scale from drifting.
      softcap: logits stay between -softcap and softcap.
      dtype: of the matmul operands, forward and backward; sums are fp32.
    """
    _check(hidden_BTD, kernel_DV, bias_V, targets_BT, weights_BT, tile_tokens)
    weights_BT = checked_weights(targets_BT, weights_BT, kernel_DV.shape[1])
    spec = _Spec(max(1, tile_tokens // targets_BT.shape[0]), float(z_loss), softcap, jnp.dtype(dtype))
    return _loss_sum(spec, hidden_BTD, kernel_DV, bias_V, targets_BT, weights_BT), jnp.sum(weights_BT)


def checked_weights(targets: jax.Array, weights: jax.Array | None, num_classes: int) -> jax.Array:
    """Weights in fp32 (None counts each target once): NaN where a target that counts is none of the classes.

    A traced target cannot be refused, and -100 or the number of a larger vocabulary would be learned from in silence.
    """
    weights = jnp.ones(targets.shape, jnp.float32) if weights is None else weights.astype(jnp.float32)
    is_class = (targets >= 0) & (targets < num_classes)
    return jnp.where(is_class | (weights == 0), weights, jnp.nan)


class _Spec(NamedTuple):
    tile: int  # positions along T
    z_loss: float
    softcap: float | None
    dtype: jnp.dtype


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loss_sum(spec, hidden, kernel, bias, targets, weights):
    kernel = kernel.astype(spec.dtype)

    def tile(total, inputs):
        x, t, w = inputs
        losses, _ = _tile_losses(spec, x, kernel, bias, t)
        return total + jnp.sum(w * losses), None

    return _over_tiles(spec, tile, jnp.zeros((), jnp.float32), hidden, targets, weights)[0]


def _loss_sum_fwd(spec, hidden, kernel, bias, targets, weights):
    low_kernel = kernel.astype(spec.dtype)

    def tile(carry, inputs):
        total, dtable, dbias = carry
        x, t, w = inputs
        losses, (logits, lse, hit) = _tile_losses(spec, x, low_kernel, bias, t)
        dlse = w * (1 + 2 * spec.z_loss * lse)
        dlogits = jnp.exp(logits - lse[..., None]) * dlse[..., None] - jnp.where(hit, w[..., None], 0)
        if spec.softcap is not None:
            dlogits = dlogits * (1 - jnp.square(logits / spec.softcap))
        dbias = None if dbias is None else dbias + jnp.sum(dlogits, axis=(0, 1))
        dlogits = dlogits.astype(spec.dtype)
        dx = _product("btv,dv->btd", dlogits, low_kernel).astype(hidden.dtype)
        dtable = _add_product(dtable, dlogits, x.astype(spec.dtype))
        return (total + jnp.sum(w * losses), dtable, dbias), (dx, losses)

    start_bias = None if bias is None else jnp.zeros(bias.shape, jnp.float32)
    start = (jnp.zeros((), jnp.float32), jnp.zeros(kernel.shape[::-1], jnp.float32), start_bias)
    (total, dtable, dbias), (dx, losses) = _over_tiles(spec, tile, start, hidden, targets, weights)
    # Without it XLA may move the transpose into the product of a single tile, which it then has no bf16 kernel for on a
    # CPU (jax 0.10.2).
    dkernel = jax.lax.optimization_barrier(dtable).T
    dbias = None if bias is None else jnp.asarray(dbias, bias.dtype)
    return total, (_untile(dx, hidden.shape[1]), dkernel.astype(kernel.dtype), dbias, _untile(losses, hidden.shape[1]))


def _loss_sum_bwd(spec, residuals, dtotal):
    dhidden, dkernel, dbias, losses = residuals
    scaled = lambda d: None if d is None else (d * dtotal).astype(d.dtype)
    return scaled(dhidden), scaled(dkernel), scaled(dbias), None, losses * dtotal


_loss_sum.defvjp(_loss_sum_fwd, _loss_sum_bwd)


def _tile_losses(spec, x_Btd, kernel_DV, bias_V, targets_Bt):
    """Returns the losses of one tile, unweighted, and (logits, lse, which logit is the target's)."""
    logits = _product("btd,dv->btv", x_Btd.astype(spec.dtype), kernel_DV)
    logits = logits if bias_V is None else logits + bias_V.astype(logits.dtype)[None, None]
    if spec.softcap is not None:
        logits = spec.softcap * jnp.tanh(logits / spec.softcap)
    lse = jax.nn.logsumexp(logits, axis=-1)
    hit = jnp.arange(logits.shape[-1], dtype=targets_Bt.dtype)[None, None, :] == targets_Bt[..., None]
    target_logits = jnp.sum(jnp.where(hit, logits, 0), axis=-1)
    return lse - target_logits + spec.z_loss * jnp.square(lse), (logits, lse, hit)


def _add_product(total_VD, dlogits_BtV, x_BtD):
    """total + dlogits^T . x"""

    def add(total, dlogits):
        if dlogits.dtype.itemsize == 2:
            return total + _product("btv,btd->vd", dlogits, x_BtD)
        # XLA would copy fp32 logits to transpose them, so the product, which is smaller, is transposed.
        return total + jax.lax.optimization_barrier(_product("btd,btv->dv", x_BtD, dlogits)).T

    def add_in_parts(total, dlogits):
        """On a CPU the product exists beside the sum, so there it is one of a part of the vocabulary."""
        vocab_size = total.shape[0]
        wanted = min(8, -(-4 * total.size // _PRODUCT_BYTES))
        size = next(vocab_size // n for n in range(wanted, 0, -1) if vocab_size % n == 0)

        def part(i, total):
            some = lambda x, axis: jax.lax.dynamic_slice_in_dim(x, i * size, size, axis)
            return jax.lax.dynamic_update_slice_in_dim(total, add(some(total, 0), some(dlogits, 2)), i * size, 0)

        return jax.lax.fori_loop(0, vocab_size // size, part, total) if size < vocab_size else add(total, dlogits)

    return jax.lax.platform_dependent(total_VD, dlogits_BtV, cpu=add_in_parts, default=add)


def _over_tiles(spec, tile, start, *arrays):
    """Scans `tile` over arrays (B, T, ...) cut along T; the padding at the end has weight 0."""
    length = arrays[0].shape[1]
    num_tiles = -(-length // spec.tile)
    size = -(-length // num_tiles)

    def cut(x):
        x = jnp.pad(x, ((0, 0), (0, num_tiles * size - length), *((0, 0),) * (x.ndim - 2)))
        return x.reshape(x.shape[0], num_tiles, size, *x.shape[2:]).swapaxes(0, 1)

    return jax.lax.scan(tile, start, tuple(cut(x) for x in arrays))


def _untile(x, length):
    """(tiles, B, tile, ...) -> (B, T, ...)."""
    x = x.swapaxes(0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]


def _product(equation, a, b):
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)


def _check(hidden, kernel, bias, targets, weights, tile_tokens):
    if hidden.ndim != 3 or kernel.ndim != 2 or hidden.shape[2] != kernel.shape[0]:
        raise ValueError(
            f"Expected hidden (B, T, D) and kernel (D, V), but got {hidden.shape} and {kernel.shape}. "
            "A tied embedding gives its kernel as `embedding.head_kernel`."
        )
    if bias is not None and bias.shape != kernel.shape[1:]:
        raise ValueError(f"bias_V must have the shape {kernel.shape[1:]} (V), but got {bias.shape}.")
    for name, x in (("targets", targets), ("weights", weights)):
        if x is not None and x.shape != hidden.shape[:2]:
            raise ValueError(f"{name} must have the shape {hidden.shape[:2]} (B, T), but got {x.shape}.")
    if not jnp.issubdtype(targets.dtype, jnp.integer):
        raise TypeError(f"targets must be integers, but got {targets.dtype}.")
    if tile_tokens < 1:
        raise ValueError(f"tile_tokens must be at least 1, but got {tile_tokens}.")
