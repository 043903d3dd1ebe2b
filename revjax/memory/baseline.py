"""The rivals: the same layers in an ordinary residual stack, under `lax.scan`, each in its best form.

    x[l+1] = x[l] + f_l(x[l])        x in the compute dtype

    stored       every activation that a gradient needs
    dots         jax.checkpoint per layer that keeps the results of matrix products
    attention    jax.checkpoint per layer that keeps attention's output and log-sum-exp
    checkpoint   jax.checkpoint per layer: x at every layer is kept, the rest is computed again
    nested       jax.checkpoint per segment of about sqrt(L) layers, and per layer in it
    offload      as checkpoint, with x at every layer in the host's memory (not on CPU, which has no other)

Every claim of revjax is measured beside this. Nothing of the reversible core is used here, and no rounding
is pinned: it is what one would write without revjax.
"""

import functools
import math
import types
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from ..models import Decoder, ReversibleStack, TransformerConfig, stacks_of
from ..models.stack import keywords_of

RIVALS = ("stored", "dots", "attention", "checkpoint", "nested")
_POLICIES = {
    "dots": jax.checkpoint_policies.dots_saveable,
    "attention": jax.checkpoint_policies.save_only_these_names("attention"),
    "checkpoint": None,
    "nested": None,
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=["layer_input"],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


def as_residual(model: nnx.Module, rival: str = "checkpoint") -> nnx.Module:
    """Makes each stack of `model` an ordinary residual network, with what `rival` keeps for the backward pass.

    For use inside of what is differentiated, on a model that was merged there: it is changed, and returned.
    """
    for stack in stacks_of(model).values():
        vars(stack)["scan"] = functools.partial(_residual_scan, stack, rival, model.config)  # pyright: ignore
    return model


def _residual_scan(stack: ReversibleStack, rival: str, config: TransformerConfig, streams, *, key=None, **inputs: Any):
    """As `ReversibleStack.scan`; there is one stream, and nothing random."""
    assert key is None, "rivals are measured without dropout"
    x = residual_stack(stack, streams[1].astype(jnp.dtype(config.dtype)), rival, **inputs)
    return types.SimpleNamespace(streams=(x if config.resolved_readout == "concat" else None, x))


def residual_stack(stack: ReversibleStack, x: jax.Array, rival: str = "checkpoint", **inputs: Any) -> jax.Array:
    """The layers of `stack` as an ordinary residual network, with what `rival` keeps for the backward pass.

    Branches get those of `inputs` that they name.
    """
    given = {name: value for name, value in inputs.items() if value is not None}
    for branches in stack.runs:
        graphdef, params_L = nnx.split(list(branches))

        def layer(x, params, graphdef=graphdef):
            x = checkpoint_name(x, "layer_input")
            for branch in nnx.merge(graphdef, params):
                x = x + _by_chunks(branch, x, given).astype(x.dtype)
            return x, None

        if rival != "stored":  # in a scan, XLA cannot merge what is computed twice: no barriers are needed
            layer = jax.checkpoint(layer, prevent_cse=False, policy=_POLICIES[rival])
        x = _scan_segments(layer, x, params_L) if rival == "nested" else jax.lax.scan(layer, x, params_L)[0]
    return x


def _scan_segments(layer: Callable, x: jax.Array, params_L: Any) -> jax.Array:
    """`lax.scan` over segments of about sqrt(L) layers, of which each is computed again as a whole."""
    length = jax.tree.leaves(params_L)[0].shape[0]
    size = min((n for n in range(1, length + 1) if length % n == 0), key=lambda n: abs(n - math.sqrt(length)))
    segments = jax.tree.map(lambda a: a.reshape(-1, size, *a.shape[1:]), params_L)
    segment = lambda x, params: (jax.lax.scan(layer, x, params)[0], None)
    return jax.lax.scan(jax.checkpoint(segment, prevent_cse=False), x, segments)[0]


def _by_chunks(branch: nnx.Module, x_BTD: jax.Array, inputs: dict[str, Any]) -> jax.Array:
    """The branch on so many tokens at a time as it asks for (`mlp_chunk`), so that the rival saves that memory too."""
    chunk, length = getattr(branch, "chunk_tokens", None), x_BTD.shape[1]
    if not chunk or chunk >= length:
        known = keywords_of(branch)
        given = {name: value for name, value in inputs.items() if name in known}
        return branch(x_BTD, **given)  # pyright: ignore[reportCallIssue]
    padded = jnp.pad(x_BTD, ((0, 0), (0, -length % chunk), (0, 0)))
    chunks = padded.reshape(padded.shape[0], -1, chunk, padded.shape[2]).swapaxes(0, 1)
    y = jax.lax.map(jax.checkpoint(lambda x: branch(x)), chunks).swapaxes(0, 1)  # pyright: ignore[reportCallIssue]
    return y.reshape(padded.shape)[:, :length]


def residual_loss(model: Decoder, tokens_BT: jax.Array, targets_BT: jax.Array, rival: str = "checkpoint") -> jax.Array:
    """The mean cross-entropy of `model`, run as an ordinary residual network; same attention, same fused loss."""
    return jnp.divide(*as_residual(model, rival).loss(tokens_BT, targets_BT))  # pyright: ignore


checkpoint_loss = functools.partial(residual_loss, rival="checkpoint")
stored_loss = functools.partial(residual_loss, rival="stored")
