"""A study trains what is missing, pairs its seeds, and goes on where it was."""

import dataclasses
import json
import pathlib

import pytest

from revjax import cli
from revjax.benchmarking import StudyConfig, compare, summarize, table
from revjax.benchmarking import study as study_module
from revjax.benchmarking.study import fingerprint, half_width, kept_bits
from revjax.config import load
from revjax.errors import ConfigError
from revjax.experiment import RunConfig

ROOT = pathlib.Path(__file__).parents[2]
STUDIES = sorted((ROOT / "configs" / "studies").glob("*.yaml"))


@pytest.fixture
def study(tmp_path):
    """A file of two variants with two seeds each."""
    (tmp_path / "text.txt").write_text("".join(f"{i} squared is {i * i}.\n" for i in range(2000)))
    shared = {
        "model": {"d_model": 32, "num_layers": 2, "num_heads": 2},
        "data": {"source": str(tmp_path / "text.txt"), "sequence_length": 32, "batch_size": 4},
        "training": {"steps": 4, "eval_every": 2, "eval_batches": 2},
        "mesh": {"data": 1},
    }
    (tmp_path / "shared.yaml").write_text(json.dumps(shared))
    variants = {
        "ordinary": {"model.coupling": "residual", "memory.plan": "inputs:1"},
        "half, 1/2": {"model.coupling": "near-residual:1"},
    }
    fields = {
        "results": str(tmp_path / "out" / "study.jsonl"),
        "folder": str(tmp_path / "runs"),
        "runs": [str(tmp_path / "shared.yaml")],
        "baseline": "ordinary",
        "variants": variants,
        "seeds": [0, 1],
    }
    (tmp_path / "study.yaml").write_text(json.dumps(fields))
    return tmp_path / "study.yaml"


@pytest.mark.slow
def test_a_study_is_trained_once_and_reported_by_paired_seeds(study, capsys):
    assert cli.main(["compare", str(study)]) == 0
    out = capsys.readouterr().out
    rows = [json.loads(line) for line in (study.parent / "out" / "study.jsonl").read_text().splitlines()]
    assert [(row["variant"], row["seed"]) for row in rows] == [
        (variant, seed) for seed in (0, 1) for variant in ("ordinary", "half, 1/2")
    ]
    assert [row["kept_bits"] for row in rows] == [16, 1, 16, 1]
    assert all(row["canary"] == row["unsafe"] == row["skipped"] == 0 and row["tokens"] == 512 for row in rows)
    assert all([tokens for tokens, _ in row["curve"]] == [0, 256, 512] for row in rows)
    assert (study.parent / "out" / "study.png").read_bytes().startswith(b"\x89PNG")
    assert not list((study.parent / "runs").iterdir())  # each is in the file of results
    before = (study.parent / "out" / "study.jsonl").read_bytes()
    assert cli.main(["compare", str(study)]) == 0 and capsys.readouterr().out == out
    assert (study.parent / "out" / "study.jsonl").read_bytes() == before
    other = ["compare", str(study), "--report", "--variants", '{"half, 1/2": {"optimizer.learning_rate": 0.1}}']
    assert cli.main(other) == 0 and "2 of 4 runs are not made yet" in capsys.readouterr().out


def row(variant, seed, loss):
    numbers = {"kept_bits": 0, "step_bytes": 1e6, "step_s": 0.1, "canary": 0, "unsafe": 0, "max_abs": 3}
    return {"variant": variant, "seed": seed, "bits_per_byte": loss, **numbers}


def test_differences_are_those_of_seeds_that_both_have():
    rows = [row("a", 0, 2.0), row("b", 0, 2.2), row("a", 1, 4.0), row("b", 1, 4.48), row("b", 2, 9.0)]
    a, b = summarize(rows, "a")
    assert a.difference == a.half_width == 0
    assert b.difference == pytest.approx(11) and b.half_width == pytest.approx(12.7062047)  # t of one degree of freedom
    assert half_width([1.0]) == float("inf")
    assert "+11.00 ± 12.71" in table([a, b]) and "5.2267" in table([a, b])


def test_what_is_not_text_is_compared_by_its_loss():
    rows = [row(variant, 0, loss) for variant, loss in (("a", 2.0), ("b", 1.5))]
    rows = [{name: x for name, x in r.items() if name != "bits_per_byte"} | {"loss": r["bits_per_byte"]} for r in rows]
    a, b = summarize([rows[0] | {"accuracy": 0.5}, rows[1] | {"accuracy": 0.75}], "a")
    assert b.difference == -25
    head, _, *lines = table([a, b]).splitlines()
    assert " nats |" in head and "% right" in head and "75.00" in lines[1]
    assert "% right" not in table(summarize(rows, "a"))


def test_a_result_belongs_to_its_settings_and_not_to_those_that_came_later(monkeypatch):
    config = load(RunConfig, (), [], environ={})
    others = ["--model.d_model=64", "--optimizer.clip_norm=null", "--model.num_kv_heads=2", "--training.seed=1"]
    found = [fingerprint(load(RunConfig, (), settings, environ={})) for settings in ([], *([x] for x in others))]
    assert len(set(found)) == 5
    assert fingerprint(load(RunConfig, (), ["--run.name=b", "--run.folder=c"], environ={})) == found[0]
    read = [fingerprint(load(RunConfig, (), [f"--model.readout={x}"], environ={})) for x in ("concat", "mean")]
    assert read[0] == found[0] != read[1]  # what auto comes to
    asdict = dataclasses.asdict
    with_more = lambda config: asdict(config) | {"new": None, "model": asdict(config.model) | {"new": None}}
    monkeypatch.setattr(study_module.dataclasses, "asdict", lambda x: with_more(x) if x is config else asdict(x))
    assert fingerprint(config) == found[0]


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.name)
def test_shipped_studies_have_runs_that_can_be_made(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = load(StudyConfig, path, environ={})
    runs = [config.run_config(variant, config.seeds[0]) for variant in config.variants]
    assert len({run.run.name for run in runs}) == len(runs)
    assert kept_bits(runs[list(config.variants).index(config.baseline)]) == 16
    assert f"python scripts/compare.py configs/studies/{path.name}" in path.read_text()


@pytest.mark.parametrize(
    "settings, message",
    [
        (["--baseline=ordinry"], "there is no variant 'ordinry'. Did you mean 'ordinary'"),
        (["--results=study.yaml/a.jsonl"], "Cannot write to study.yaml/a.jsonl .results.: "),
        (["--seeds=[1, 1]"], "seeds must be different numbers"),
        (["--variants={half: {model.couplng: revnet}}"], "unknown field 'model.couplng'. Did you mean 'coupling'"),
    ],
)
def test_a_study_that_cannot_be_made_is_refused_before_any_run(study, monkeypatch, settings, message):
    monkeypatch.chdir(study.parent)
    with pytest.raises(ConfigError, match=message):
        list(compare(load(StudyConfig, study, settings, environ={})))
    assert not (study.parent / "runs").exists()
