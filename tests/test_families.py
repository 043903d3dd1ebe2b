"""Encoders, vision transformers and encoder-decoders go through the same scripts as decoders."""

import json
import pathlib

import numpy as np
import pytest

from revjax import cli, experiment
from revjax.config import load
from revjax.errors import ConfigError, DataError
from revjax.experiment import RunConfig
from revjax.training import read_metrics

pytest.importorskip("sklearn", reason="digits come with scikit-learn")
pytest.importorskip("dm_pix", reason="images are changed by dm-pix")
ROOT = pathlib.Path(__file__).parents[1]
SIZES = [
    *("--model.d_model=16", "--model.num_layers=2", "--model.num_heads=2", "--data.batch_size=8"),
    *("--training.steps=4", "--training.eval_every=2", "--training.eval_batches=2", "--training.checkpoint_every=2"),
    *("--run.compilation_cache=null", "--mesh.data=1"),
]
CONFIGS = {"digits": [], "masked-text": ["--data.sequence_length=24"], "denoise-text": ["--data.sequence_length=24"]}


FIRST_FAST = [name if name == "digits" else pytest.param(name, marks=pytest.mark.slow) for name in CONFIGS]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"{i} squared is {i * i}.\n" for i in range(500)))
    return path


def words(name, text, folder, *more) -> list[str]:
    of_text = [] if name == "digits" else [f"--data.source={text}", f"--data.cache={folder / 'tokens'}"]
    return [str(ROOT / "configs" / f"{name}.yaml"), *SIZES, *CONFIGS[name], f"--run.folder={folder}", *of_text, *more]


@pytest.mark.parametrize("name", FIRST_FAST)
def test_a_family_is_trained_goes_on_and_is_evaluated(name, text, tmp_path, capsys):
    assert cli.main(["train", *words(name, text, tmp_path, "--training.steps=2")]) == 0
    first = capsys.readouterr().out
    assert "every stream was rebuilt to the bit, at each of 2 steps" in first
    assert ("digits: 1,438 of 10 classes, 8 x 8 x 1; held out: 359" in first) == (name == "digits")
    assert cli.main(["train", *words(name, text, tmp_path, "--allow-change=training.steps")]) == 0
    whole = [cli.main(["train", *words(name, text, tmp_path, "--run.name=whole")]), capsys.readouterr().out][0]
    assert whole == 0
    lines, once = (read_metrics(tmp_path / run / "metrics.jsonl") for run in (name, "whole"))
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert [line["loss"] for line in lines] == [line["loss"] for line in once]
    assert all(line["canary"] == line["unsafe"] == 0 and "bits_per_byte" not in line for line in lines)
    assert all(("accuracy" in line) == (name == "digits") for line in lines)
    last = read_metrics(tmp_path / name / "validation.jsonl")[-1]
    assert last["step"] == 4 and np.isfinite(last["loss"]) and ("accuracy" in last) == (name == "digits")
    assert (tmp_path / name / "loss.png").stat().st_size > 10_000 and not (tmp_path / name / "sample.txt").exists()
    assert cli.main(["evaluate", str(tmp_path / name)]) == 0
    out = capsys.readouterr().out
    assert ("over 359 of 359 images" in out and "accuracy" in out) if name == "digits" else "nats/token" in out
    assert cli.main(["generate", str(tmp_path / name), "--prompt=a"]) == 2
    assert "generates no text here: that needs a decoder" in capsys.readouterr().err
    assert cli.main(["export", str(tmp_path / name), f"--output={tmp_path / 'out.safetensors'}"]) == 0
    assert cli.main(["runs", str(tmp_path)]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["digits", "denoise-text"])
def test_a_plan_is_found_for_a_family(name, text, tmp_path, capsys):
    more = ["--memory.plan=auto", "--budget=aggressive", "--json"]
    assert cli.main(["plan", *words(name, text, tmp_path), *more]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["chosen"]["compiled"] and found["settings"]["memory.plan"] == "nothing"
    assert ("model.loss_tile" in found["settings"]) == (name != "digits")


def split(words):
    return words[0], words[1:]


@pytest.mark.slow
@pytest.mark.parametrize("source", ["folder", "npz"])
def test_images_of_ones_own_are_trained_on_and_evaluated(source, text, tmp_path, capsys):
    pillow = pytest.importorskip("PIL.Image", reason="images need Pillow")
    draw = np.random.default_rng(0)
    images, labels = draw.integers(0, 256, (24, 9, 11, 3), dtype=np.uint8), np.arange(24) % 2
    np.savez(tmp_path / "images.npz", images=images, labels=labels)
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        (tmp_path / "images" / "ab"[label]).mkdir(parents=True, exist_ok=True)
        pillow.fromarray(image).save(tmp_path / "images" / "ab"[label] / f"{i}.png")
    place = tmp_path / ("images.npz" if source == "npz" else "images")
    more = [f"--data.source={place}", "--model.num_classes=2", "--model.channels=3", "--data.flip=true"]
    assert cli.main(["train", *words("digits", text, tmp_path, *more)]) == 0
    assert cli.main(["evaluate", str(tmp_path / "digits"), f"--source={place}"]) == 0
    assert "over 24 of 24 images" in capsys.readouterr().out
    assert cli.main(["evaluate", str(tmp_path / "digits"), "--sequence_length=3"]) == 2
    assert "sequence_length is of text, and the run reads images" in capsys.readouterr().err


@pytest.mark.parametrize(
    "settings, message",
    [
        (["--model.family=vision"], "reads images, but data.kind is text"),
        (["--data.kind=images"], "reads text, but data.kind is images"),
        (["--model.family=visoin"], "Did you mean 'vision'"),
        (["--model.family=vision", "--data.kind=images", "--model.vocab_size=3"], "unknown field 'model.vocab_size'"),
        (["--model.family=encoder", "--data.chat_template=x"], "chat_template is for decoders"),
        (["--model.patch_size=4"], "unknown field 'model.patch_size'"),
        (["--num_classes=4"], "Did you mean 'model.num_classes'"),
        (
            ["--model.family=encoder", "--model.positions=learned", "--data.sequence_length=600"],
            "Set --model.max_length",
        ),
    ],
)
def test_settings_of_another_family_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        load(RunConfig, (), settings, environ={})


def test_what_does_not_fit_the_data_is_refused_before_any_work(text, tmp_path):
    build = lambda name, *more: experiment.build(
        load(RunConfig, *split(words(name, text, tmp_path, *more)), environ={})
    )
    for name, more, message in [
        ("masked-text", "--model.vocab_size=256", "the model knows 256, and 1 of its own beside them"),
        ("denoise-text", "--model.vocab_size=257", "the model knows 257, and 2 of its own beside them"),
        ("digits", "--model.num_classes=9", "digits has 10 classes, but the model 9"),
        ("digits", "--data.source=nowhere", "There is no folder or file 'nowhere'"),
        ("digits", "--data.batch_size=2000", "fewer than data.batch_size=2000"),
    ]:
        with pytest.raises(DataError, match=message):
            build(name, more)
    with pytest.raises(ConfigError, match="The context of images is as long as they have patches"):
        experiment.largest(load(RunConfig, *split(words("digits", text, tmp_path)), environ={}), "context", "1GB")


@pytest.mark.slow
def test_a_run_starts_from_another_of_its_family_and_not_from_one_of_another(text, tmp_path, capsys):
    for name in ("digits", "masked-text"):
        assert cli.main(["train", *words(name, text, tmp_path)]) == 0
    start = f"--training.start_from={tmp_path / 'digits'}"
    assert cli.main(["train", *words("digits", text, tmp_path, start, "--run.name=more")]) == 0
    before = read_metrics(tmp_path / "digits" / "validation.jsonl")[-1]
    assert read_metrics(tmp_path / "more" / "validation.jsonl")[0]["loss"] == pytest.approx(before["loss"], rel=1e-6)
    capsys.readouterr()
    assert cli.main(["train", *words("masked-text", text, tmp_path, start, "--run.name=wrong")]) == 2
    assert "has another shape" in capsys.readouterr().err
    assert not (tmp_path / "wrong").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, setting",
    [
        ("digits", "--mesh.data=2"),
        ("digits", "--memory.accumulation=2"),
        ("denoise-text", "--optimizer.in_backward=two_sweeps"),
    ],
)
def test_a_family_is_trained_alike_however_the_step_is_made(name, setting, text, tmp_path):
    """Without what is drawn for each micro-batch anew: dropout, masks and changed images."""
    calm = ["--model.dropout=0", "--data.crop_padding=0", "--data.rotate=0"] if name == "digits" else []
    for run, more in (("plain", []), ("other", [setting])):
        assert cli.main(["train", *words(name, text, tmp_path, *calm, *more, f"--run.name={run}")]) == 0
    plain, other = (read_metrics(tmp_path / run / "metrics.jsonl") for run in ("plain", "other"))
    assert all(line["canary"] == line["unsafe"] == 0 for line in other)
    np.testing.assert_allclose([line["loss"] for line in other], [line["loss"] for line in plain], rtol=2e-4)
