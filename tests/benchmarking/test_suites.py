"""The benchmark command keeps its rows, goes on where it was, and refuses what it does not know."""

import json

import numpy as np

from revjax.benchmarking import SUITES, GradientsConfig, MemoryConfig, gradients, memory, run_suite
from revjax.benchmarking.gradients import distance, unequal
from revjax.benchmarking.memory import AttentionConfig, TrainStepConfig, attention, train_step
from revjax.cli import main

TINY = MemoryConfig(num_layers=2, d_model=64, sequence_length=16, batch_size=1)


def test_a_suite_keeps_its_rows_and_does_not_measure_them_again(tmp_path, monkeypatch):
    measured = []
    monkeypatch.setitem(SUITES, "memory", (lambda config: measured.append(config) or memory(config), [TINY]))
    (row,) = run_suite("memory", tmp_path)
    assert row["reversible"] > 0 and row["checkpoint"] > 0 and row["stored"] > 0
    assert json.loads((tmp_path / "memory.jsonl").read_text()) == row
    assert list(run_suite("memory", tmp_path)) == [row] and len(measured) == 1


def test_an_unknown_suite_is_refused(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["benchmark", "sped"]) == 2
    assert "Did you mean 'speed'" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_told_before_anything_is_measured(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    assert main(["benchmark", "memory", f"--folder={tmp_path}/file/x"]) == 2
    assert "x/memory.jsonl: Not a directory. Give another folder: --folder=" in capsys.readouterr().err


def test_gradients_are_compared_with_the_stored_run_and_its_own_floor():
    sizes = dict(num_layers=2, d_model=32, sequence_length=16, batch_size=1)
    row = gradients(GradientsConfig(coupling="near-residual:1", dtype="bfloat16", **sizes))
    assert row["to_stored"] == row["to_stored_unequal"] == row["canary"] == 0 and row["losses_equal"] == 1
    a, b = {"w": np.array([1.0, 2.0])}, {"w": np.array([1.0, 4.0])}
    assert unequal(a, b) == 0.5 and distance(a, b) > 0.4


def test_a_training_step_holds_more_than_its_gradient_and_attention_grows_with_its_length():
    row = train_step(TrainStepConfig(num_layers=2, d_model=64, sequence_length=16, batch_size=1))
    assert row["temporary"] > row["parameters"] > 0
    short, long = (attention(AttentionConfig(sequence_length=t))["temporary"] for t in (1024, 2048))
    assert short < long < 3 * short
