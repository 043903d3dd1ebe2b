"""Images with labels: a folder for each class, an .npz file, or the digits that come with scikit-learn.

Images become bytes of one size, (H, W, C). Those of a folder are read when a batch needs them. Which are held out is
told by a hash of the file's name in the folder (elsewhere, of the image), so that it does not depend on the others.
"""

import dataclasses
import hashlib
import importlib
import pathlib
import zipfile
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np

from ..errors import DataError
from .batches import Batch, RowBatches, in_order

DIGITS = "digits"  # a source: 1,797 handwritten digits of 8 x 8 pixels, which come with scikit-learn
_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImagesConfig:
    """Which images to train on, and how they are changed on the way."""

    kind: Literal["images"] = "images"
    source: str = DIGITS  # a folder with a folder of images for each class, an .npz with images and labels, or digits
    validation: str | None = None  # another one, to evaluate on; null holds images of the source out
    validation_fraction: float = 0.2  # share of the images that is held out
    batch_size: int = 64  # images of one step, over all devices
    crop_padding: int = 0  # in training, images are moved by up to so many pixels
    rotate: float = 0.0  # in training, images are turned by up to so many degrees
    flip: bool = False  # in training, half of the images are mirrored, left to right

    def __post_init__(self):
        if not self.source:
            raise ValueError("source must be a folder, an .npz file or digits, but it is empty.")
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, but got {self.batch_size}.")
        if not 0 <= self.validation_fraction < 1:
            raise ValueError(f"validation_fraction must be in [0, 1), but got {self.validation_fraction}.")
        if self.crop_padding < 0:
            raise ValueError(f"crop_padding must be at least 0, but got {self.crop_padding}.")
        if not 0 <= self.rotate <= 180:
            raise ValueError(f"rotate must be in degrees from 0 to 180, but got {self.rotate}.")

    @property
    def augments(self) -> bool:
        """Whether images are changed in training."""
        return bool(self.crop_padding or self.rotate or self.flip)


@dataclasses.dataclass(frozen=True)
class ImageRows:
    """Images and their labels, each read when it is asked for: {images: uint8 (H, W, C), labels: int32}.

    `images` are arrays, or paths of files; `size` and `channels` are what they become.
    """

    images: Any  # a sequence
    labels: np.ndarray
    size: int
    channels: int

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index) -> dict[str, np.ndarray]:
        i = int(index)
        image = self.images[i]
        image = _read_image(image, self.channels) if isinstance(image, pathlib.Path) else image
        return {"images": fitted(image, self.size, self.channels), "labels": self.labels[i]}

    def some(self, chosen: np.ndarray) -> "ImageRows":
        """Those at the places `chosen`."""
        places = np.flatnonzero(chosen)
        return dataclasses.replace(self, images=[self.images[i] for i in places], labels=self.labels[places])


@dataclasses.dataclass(frozen=True)
class Images:
    """All that is trained and evaluated on."""

    source: str
    train: ImageRows
    held_out: ImageRows
    classes: tuple[str, ...]
    fingerprint: str  # another one for other images to train on


def find_images(config: ImagesConfig) -> None:
    """Raises `DataError` where a source of `config` is not there, or what reads it is not installed."""
    for name, source in (("source", config.source), ("validation", config.validation)):
        if source is not None and source != DIGITS and not pathlib.Path(source).expanduser().exists():
            raise DataError(
                f"There is no folder or file {source!r} (data.{name}). Give a folder with a folder of images for each "
                f"class, an .npz with images and labels, or {DIGITS!r}."
            )
    if DIGITS in (config.source, config.validation):
        _need("sklearn", "scikit-learn", "digits come with it")


def load_images(config: ImagesConfig, *, size: int, channels: int, num_classes: int) -> Images:
    """Returns the images of `config`, for a model of such images and so many classes.

    Raises `DataError` where there are none, where an image or a label is not one, and where classes do not fit.
    """
    rows, classes, keys = _load(config.source, "source", size, channels)
    if len(classes) != num_classes:
        raise DataError(
            f"{config.source} has {len(classes)} classes, but the model {num_classes}. Set "
            f"--model.num_classes={len(classes)}."
        )
    if config.validation is not None:
        train = rows
        held_out, others, _ = _load(config.validation, "validation", size, channels)
        if others != classes:
            raise DataError(f"{config.validation} (data.validation) has other classes than {config.source}.")
    else:
        hashes = np.array([int.from_bytes(hashlib.sha256(key).digest()[:8], "big") / 2**64 for key in keys])
        count = min(max(round(config.validation_fraction * len(rows)), 1), len(rows) - 1)
        is_held_out = np.zeros(len(rows), bool)
        if config.validation_fraction:
            is_held_out[np.argsort(hashes, kind="stable")[:count]] = True
        train, held_out = rows.some(~is_held_out), rows.some(is_held_out)
    if not len(train):
        raise DataError(f"{config.source} has too few images to train on: {len(rows)}.")
    return Images(config.source, train, held_out, classes, _fingerprint(keys, rows.labels, train))


class ImageBatches(RowBatches):
    """An endless iterator over training batches: images (B, H, W, C) of bytes, labels (B,). See `RowBatches`.

    Args:
      images: with one at least to train on.
      batch_size: B, over all processes.
      num_tokens: that the model makes of an image.
      seed: of the order.
    """

    def __init__(self, images: Images, *, batch_size: int, num_tokens: int, seed: int):
        identity = {"images": images.fingerprint, "batch_size": batch_size, "seed": seed}
        super().__init__([images.train], [1.0], batch_size=batch_size, seed=seed, identity=identity)
        self.sequence_length = num_tokens


def image_batches(rows: ImageRows, *, batch_size: int, max_batches: int | None = None) -> Iterator[Batch]:
    """Yields the images in order, the same at every call. The last batch may be smaller."""
    return in_order(rows, batch_size, max_batches, drop_remainder=False)


def fitted(image: np.ndarray, size: int, channels: int) -> np.ndarray:
    """An image (H, W) or (H, W, C) of bytes as one of `size` x `size` x `channels`: the middle, as large as it fits."""
    image = image if image.ndim == 3 else image[..., None]
    if image.shape[-1] != channels:
        image = _gray(image) if channels == 1 else image[..., :3] if image.shape[-1] == 4 else image
        image = np.repeat(image, channels, axis=-1) if image.shape[-1] == 1 else image
    height, width = image.shape[:2]
    if (height, width) == (size, size):
        return image
    pillow = _need("PIL.Image", "Pillow", "images of another size than the model's are resized by it")
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    middle = np.ascontiguousarray(image[top : top + side, left : left + side])
    planes = [pillow.fromarray(middle[..., c]).resize((size, size), pillow.Resampling.BICUBIC) for c in range(channels)]
    return np.stack([np.asarray(plane) for plane in planes], axis=-1)


def _gray(image: np.ndarray) -> np.ndarray:
    """(H, W, 3 or 4) -> (H, W, 1), as bright as it looks (ITU-R 601)."""
    return (
        (image[..., :3].astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32))
        .round()
        .astype(np.uint8)[..., None]
    )


def _load(source: str, field: str, size: int, channels: int) -> tuple[ImageRows, tuple[str, ...], list[bytes]]:
    """Images, names of classes, and for each image what it is known by."""
    if source == DIGITS:
        found = _need("sklearn.datasets", "scikit-learn", "digits come with it").load_digits()
        images, labels = (found.images * (255 / 16)).round().astype(np.uint8), found.target
    else:
        path = pathlib.Path(source).expanduser()
        if path.is_dir():
            return _load_folder(path, field, size, channels)
        images, labels = _load_npz(path, field)
    classes = tuple(str(i) for i in range(int(labels.max()) + 1))
    return ImageRows(images, labels.astype(np.int32), size, channels), classes, [image.tobytes() for image in images]


def _load_folder(path: pathlib.Path, field: str, size: int, channels: int):
    _need("PIL.Image", "Pillow", "images are read by it")
    folders = sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))
    files = [sorted(p for p in folder.rglob("*") if p.suffix.lower() in _SUFFIXES) for folder in folders]
    empty = [folder.name for folder, found in zip(folders, files, strict=True) if not found]
    if not folders or empty:
        what = f"no image is in {', '.join(empty[:5])}" if empty else "it has no folders"
        raise DataError(f"{path} (data.{field}) must have a folder of images for each class, but {what}.")
    paths = [p for found in files for p in found]
    labels = np.repeat(np.arange(len(folders), dtype=np.int32), [len(found) for found in files])
    rows = ImageRows(paths, labels, size, channels)
    return rows, tuple(f.name for f in folders), [str(p.relative_to(path)).encode() for p in paths]


def _load_npz(path: pathlib.Path, field: str) -> tuple[np.ndarray, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as found:
            images, labels = (found[name] for name in ("images", "labels"))
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as e:
        raise DataError(f"{path} (data.{field}) is not an .npz file with images and labels: {e}.") from None
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or (images.ndim == 4 and images.shape[3] not in (1, 3, 4)):
        raise DataError(
            f"The images of {path} must be bytes (uint8) of the shape (N, H, W) or (N, H, W, C), with C 1, 3 or 4, but "
            f"they are {images.dtype} {images.shape}."
        )
    if labels.shape != images.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
        raise DataError(
            f"The labels of {path} must be whole numbers, one for each of the {len(images)} images, but they are "
            f"{labels.dtype} {labels.shape}."
        )
    if not len(labels) or labels.min() < 0 or labels.max() > len(labels):
        raise DataError(f"The labels of {path} must be the numbers of classes, from 0 on.")
    return images, labels


def _read_image(path: pathlib.Path, channels: int) -> np.ndarray:
    pillow = _need("PIL.Image", "Pillow", "images are read by it")
    try:
        with pillow.open(path) as image:
            return np.asarray(image.convert("L" if channels == 1 else "RGB"))
    except (OSError, ValueError, SyntaxError, pillow.DecompressionBombError) as e:  # what Pillow raises for damage
        raise DataError(f"{path} cannot be read as an image: {e}. Delete it, or mend it.") from None


def _fingerprint(keys: list[bytes], labels: np.ndarray, train: ImageRows) -> str:
    digest = hashlib.sha256(b"".join(hashlib.sha256(key).digest() for key in keys))
    for array in (labels, train.labels):
        digest.update(np.ascontiguousarray(array).tobytes())
    digest.update(f"{train.size} {train.channels}".encode())
    return digest.hexdigest()[:32]


def _need(module: str, package: str, why: str) -> Any:
    """The module; raises `DataError` where it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise DataError(f"{package} is not installed ({why}): pip install -e '.[vision]'") from None
