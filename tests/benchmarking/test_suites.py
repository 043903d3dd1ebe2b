"""The benchmark command keeps its rows, goes on where it was, and refuses what it does not know."""

import json

from revjax.benchmarking import SUITES, MemoryConfig, memory, run_suite
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
