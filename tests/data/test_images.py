"""Images: read as they are, split by their names, changed at random and the same again; refused where they are none."""

import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from revjax.data import ImageBatches, ImagesConfig, find_images, image_batches, load_images, make_augment
from revjax.data.images import fitted
from revjax.errors import DataError

pillow = pytest.importorskip("PIL.Image", reason="images need Pillow")
SIZE = dict(size=8, channels=1, num_classes=2)


@pytest.fixture
def folder(tmp_path):
    """Ten images each of cats and dogs: of another size, in color."""
    draw = np.random.default_rng(0)
    for kind in ("cat", "dog"):
        (tmp_path / "images" / kind / "more").mkdir(parents=True)
        for i in range(10):
            image = draw.integers(0, 256, (12, 16, 3), dtype=np.uint8)
            pillow.fromarray(image).save(tmp_path / "images" / kind / ("more" if i % 2 else ".") / f"{i}.png")
    (tmp_path / "images" / "README.txt").write_text("not an image")
    return tmp_path / "images"


def test_a_folder_has_a_folder_for_each_class(folder):
    config = ImagesConfig(source=str(folder))
    images = load_images(config, **SIZE)
    assert images.classes == ("cat", "dog") and (len(images.train), len(images.held_out)) == (16, 4)
    row = images.train[0]
    assert row["images"].shape == (8, 8, 1) and row["images"].dtype == np.uint8 and row["labels"].dtype == np.int32
    color = load_images(config, size=12, channels=3, num_classes=2)
    path = color.train.images[0]
    np.testing.assert_array_equal(color.train[0]["images"], np.asarray(pillow.open(path))[:, 2:14])
    (folder / "dog" / "new.png").write_bytes(path.read_bytes())  # the others stay on their sides
    more = load_images(dataclasses.replace(config, validation_fraction=4 / 21), **SIZE)
    moved = set(map(str, images.train.images)) ^ set(map(str, more.train.images))
    assert len(moved) <= 2 and more.fingerprint != images.fingerprint


def test_digits_are_those_of_scikit_learn():
    datasets = pytest.importorskip("sklearn.datasets", reason="digits come with scikit-learn")
    images = load_images(ImagesConfig(), size=8, channels=1, num_classes=10)
    assert len(images.train) + len(images.held_out) == 1797 and len(images.held_out) == 359
    whole = load_images(ImagesConfig(validation_fraction=0.0), size=8, channels=1, num_classes=10)
    found = datasets.load_digits()
    np.testing.assert_array_equal(whole.train.labels, found.target)
    row = whole.train[5]["images"][..., 0]
    np.testing.assert_allclose(row / 255 * 16, found.images[5], atol=0.04)


def test_an_npz_and_another_source_to_evaluate_on(tmp_path, folder):
    images = np.arange(4 * 64, dtype=np.uint8).reshape(4, 8, 8)
    np.savez(tmp_path / "a.npz", images=images, labels=np.array([0, 1, 0, 1]))
    np.savez(tmp_path / "b.npz", images=images[..., None], labels=np.array([1, 1, 0, 0]))
    config = ImagesConfig(source=str(tmp_path / "a.npz"), validation=str(tmp_path / "b.npz"))
    found = load_images(config, **SIZE)
    assert len(found.train) == len(found.held_out) == 4 and found.held_out[0]["labels"] == 1
    np.testing.assert_array_equal(found.train[3]["images"][..., 0], images[3])
    with pytest.raises(DataError, match="has other classes than"):
        load_images(dataclasses.replace(config, validation=str(folder)), **SIZE)


def test_batches_are_a_function_of_their_number_and_go_on_where_they_were(folder):
    images = load_images(ImagesConfig(source=str(folder)), **SIZE)
    make = lambda: ImageBatches(images, batch_size=4, num_tokens=5, seed=3)
    batches = make()
    first = [next(batches) for _ in range(6)]
    assert (
        first[0]["images"].shape == (4, 8, 8, 1) and first[0]["labels"].shape == (4,) and batches.rows_per_epoch == 16
    )
    state, after = batches.state(), next(batches)
    again = make()
    again.restore(state)
    np.testing.assert_array_equal(next(again)["images"], after["images"])
    epoch = np.concatenate([batch["images"] for batch in first[:4]]).reshape(16, -1)
    assert len({row.tobytes() for row in epoch}) == 16
    with pytest.raises(DataError, match="The data is not what the run was started with: seed was 3 and is 4"):
        ImageBatches(images, batch_size=4, num_tokens=5, seed=4).restore(state)
    for b in (batches, again):
        b.close()


def test_what_is_held_out_is_given_whole(folder):
    images = load_images(ImagesConfig(source=str(folder), validation_fraction=0.35), **SIZE)
    sizes = [len(batch["labels"]) for batch in image_batches(images.held_out, batch_size=3)]
    assert sizes == [3, 3, 1]
    assert len(list(image_batches(images.held_out, batch_size=3, max_batches=2))) == 2


@pytest.mark.parametrize(
    "shape, channels", [((8, 8), 1), ((8, 8), 3), ((8, 8, 1), 3), ((8, 8, 3), 1), ((8, 8, 4), 3), ((20, 10, 3), 3)]
)
def test_images_become_what_the_model_takes(shape, channels):
    image = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    found = fitted(image, 8, channels)
    assert found.shape == (8, 8, channels) and found.dtype == np.uint8
    if shape[:2] == (8, 8) and (len(shape) == 2 or shape[2] == 1):
        np.testing.assert_array_equal(found, np.broadcast_to(image.reshape(8, 8, 1), found.shape))
    if shape == (8, 8, 3):
        weights = np.array([0.299, 0.587, 0.114])
        np.testing.assert_allclose(found[..., 0], image @ weights, atol=0.6)


def test_images_are_changed_by_a_key_and_only_as_far_as_is_said():
    pytest.importorskip("dm_pix", reason="images are changed by dm-pix")
    assert make_augment(ImagesConfig()) is None
    images = jnp.zeros((64, 8, 8, 1), jnp.uint8).at[:, 3, 4].set(200)
    moved = make_augment(ImagesConfig(crop_padding=2))
    assert moved is not None
    found = moved(images, jax.random.key(0))
    np.testing.assert_array_equal(found, moved(images, jax.random.key(0)))
    assert found.dtype == jnp.uint8 and jnp.all(found.sum((1, 2, 3)) == 200)
    places = {tuple(np.argwhere(image[..., 0])[0].tolist()) for image in np.asarray(found)}
    assert {(y, x) for y in range(1, 6) for x in range(2, 7)} >= places and len(places) > 15
    flipped = make_augment(ImagesConfig(flip=True))
    assert flipped is not None
    columns = {int(np.argwhere(image)[0][1]) for image in np.asarray(flipped(images, jax.random.key(0)))}
    assert columns == {3, 4}
    hardly = make_augment(ImagesConfig(rotate=1e-4))
    assert hardly is not None
    full = jnp.full((4, 8, 8, 1), 200, jnp.uint8)
    np.testing.assert_array_equal(hardly(full, jax.random.key(0)), full)  # also at the edges
    turned = make_augment(ImagesConfig(rotate=90.0))
    assert turned is not None
    found = np.asarray(turned(images, jax.random.key(0)))
    assert len({image.tobytes() for image in found}) > 50 and found.max() <= 200


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(batch_size=0), "batch_size must be at least 1"),
        (dict(validation_fraction=1.0), "validation_fraction must be in"),
        (dict(crop_padding=-1), "crop_padding must be at least 0"),
        (dict(rotate=200.0), "rotate must be in degrees from 0 to 180"),
        (dict(source=""), "it is empty"),
    ],
)
def test_impossible_settings_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        ImagesConfig(**fields)


def test_what_are_no_images_is_refused(tmp_path, folder):
    load = lambda source, **more: load_images(ImagesConfig(source=str(source)), **SIZE | more)
    bad = {
        "float": (dict(images=np.zeros((2, 8, 8)), labels=np.array([0, 1])), r"must be bytes \(uint8\)"),
        "flat": (dict(images=np.zeros((2, 8), np.uint8), labels=np.array([0, 1])), r"of the shape \(N, H, W\)"),
        "few": (dict(images=np.zeros((2, 8, 8), np.uint8), labels=np.array([0])), "one for each of the 2 images"),
        "half": (dict(images=np.zeros((2, 8, 8), np.uint8), labels=np.array([0.5, 1])), "must be whole numbers"),
        "below": (dict(images=np.zeros((2, 8, 8), np.uint8), labels=np.array([-1, 1])), "from 0 on"),
        "none": (dict(images=np.zeros((2, 8, 8), np.uint8)), "not an .npz file with images and labels"),
    }
    for name, (arrays, message) in bad.items():
        np.savez(tmp_path / f"{name}.npz", **arrays)
        with pytest.raises(DataError, match=message):
            load(tmp_path / f"{name}.npz")
    (tmp_path / "text.npz").write_text("no zip")
    with pytest.raises(DataError, match="not an .npz file"):
        load(tmp_path / "text.npz")
    with pytest.raises(DataError, match=r"has 2 classes, but the model 10. Set --model.num_classes=2"):
        load(folder, num_classes=10)
    (folder / "bird").mkdir()
    with pytest.raises(DataError, match="but no image is in bird"):
        load(folder)
    (folder / "bird" / "x.png").write_bytes(b"\x89PNG no more")
    images = load(folder, num_classes=3)
    broken = [i for i, p in enumerate(images.train.images) if p.name == "x.png"]
    rows = images.train if broken else images.held_out
    with pytest.raises(DataError, match="x.png cannot be read as an image: .*Delete it, or mend it"):
        [rows[i] for i in range(len(rows))]
    with pytest.raises(DataError, match=r"There is no folder or file 'nowhere' \(data.source\)"):
        find_images(ImagesConfig(source="nowhere"))


def test_what_is_not_installed_is_named(monkeypatch, folder):
    monkeypatch.setitem(sys.modules, "dm_pix", None)
    with pytest.raises(DataError, match=r"dm-pix is not installed .* pip install -e '.\[vision\]'"):
        make_augment(ImagesConfig(flip=True))
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(DataError, match="Pillow is not installed"):
        load_images(ImagesConfig(source=str(folder)), **SIZE)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(DataError, match="scikit-learn is not installed"):
        find_images(ImagesConfig())
