"""Images changed at random, on the device, by dm-pix: another key, another change; the same key, the same one."""

import importlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ..errors import DataError
from .images import ImagesConfig


def make_augment(config: ImagesConfig) -> Callable[[jax.Array, jax.Array], jax.Array] | None:
    """`(images of bytes (B, H, W, C), key) -> images`, as `config` says; None where it says nothing.

    What comes from beyond an image is black. Raises `DataError` where dm-pix is not installed.
    """
    if not config.augments:
        return None
    try:
        pix: Any = importlib.import_module("dm_pix")
    except ImportError:
        raise DataError(
            "dm-pix is not installed (data.crop_padding, data.rotate and data.flip need it): pip install -e '.[vision]'"
        ) from None

    def one(image: jax.Array, key: jax.Array) -> jax.Array:
        turn, move, mirror = jax.random.split(key, 3)
        image = image.astype(jnp.float32)
        if config.rotate:
            angle = jnp.deg2rad(config.rotate) * jax.random.uniform(turn, minval=-1.0, maxval=1.0)
            # With a rim of its own, or what lies on the edge would fall out of the image by a rounding.
            image = pix.rotate(jnp.pad(image, ((1, 1), (1, 1), (0, 0))), angle, mode="constant")[1:-1, 1:-1]
        if config.crop_padding:
            padded = jnp.pad(image, ((config.crop_padding,) * 2, (config.crop_padding,) * 2, (0, 0)))
            image = pix.random_crop(move, padded, image.shape)
        if config.flip:
            image = pix.random_flip_left_right(mirror, image)
        return image

    def augment(images: Any, key: jax.Array) -> jax.Array:
        keys = jax.random.split(key, images.shape[0])
        return jnp.clip(jnp.round(jax.vmap(one)(images, keys)), 0, 255).astype(jnp.uint8)

    return augment
