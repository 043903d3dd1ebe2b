"""A run leaves what it says, goes on exactly where it was, and never writes into another run's folder."""

import dataclasses
import json
import logging
import pathlib
import re
import shutil
import sys
import types

import jax
import numpy as np
import optax
import pytest
from flax import nnx
from safetensors import safe_open

from revjax import cli, experiment
from revjax.checkpoint import Checkpointer
from revjax.config import load
from revjax.data import Batches, ByteTokenizer, train_tokenizer
from revjax.errors import CheckpointError, ConfigError, DataError, RevjaxError, RunFolderError
from revjax.experiment import MemoryConfig, Program, RunConfig
from revjax.experiment.trained import named, read_parameters
from revjax.models import Decoder, DecoderConfig
from revjax.training import OptimizerConfig, RunFolder, TrainingConfig, read_metrics, split


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"{i} squared is {i * i}.\n" for i in range(2000)))
    return path


def configure(text, folder, *settings) -> RunConfig:
    basic = [
        "--run.name=a",
        "--mesh.data=1",
        f"--run.folder={folder}",
        f"--data.source={text}",
        "--data.sequence_length=32",
        "--data.batch_size=4",
        "--model.d_model=32",
        "--model.num_layers=2",
        "--model.num_heads=2",
        "--model.coupling=bdia:1",  # draws from the step's key
        "--memory.plan=nothing",
        "--training.steps=10",
        "--training.eval_every=5",
        "--training.eval_batches=2",
        "--training.checkpoint_every=5",
        "--training.sample_tokens=8",
    ]
    return load(RunConfig, (), [*basic, *settings], environ={})


@pytest.fixture(scope="module")
def finished(text, tmp_path_factory):
    """A finished run: its config, what `build` made, and its result."""
    config = configure(text, tmp_path_factory.mktemp("runs"))
    ready = experiment.build(config)
    return config, ready, experiment.run(ready)


@pytest.mark.slow
def test_a_budget_is_settled_once_and_a_run_keeps_what_it_came_to(text, tmp_path, caplog):
    looked_for = ["--memory.plan=auto", "--training.steps=2"]
    config = configure(text, tmp_path, *looked_for, "--memory.budget=aggressive", "--memory.accumulation=2")
    with caplog.at_level(logging.INFO, "revjax"):
        ready = experiment.build(config)
    settled = ready.config.memory
    assert (settled.plan, settled.accumulation, settled.budget) == ("nothing", 4, "aggressive")
    assert "memory.accumulation 2 is not used" in caplog.text
    assert caplog.text.count("compiling") == 2  # the step that was found is not compiled again ("compiling the ...")
    assert "memory.budget aggressive: plan nothing, 4 micro-batches" in caplog.text
    assert experiment.run(ready).outcome.ended == "finished"
    assert load(RunConfig, tmp_path / "a" / "config.yaml", environ={}).memory == settled
    caplog.clear()
    with caplog.at_level(logging.INFO, "revjax"):
        assert experiment.build(config).config == ready.config
    assert "plan nothing" not in caplog.text  # read, not looked for
    with pytest.raises(RunFolderError, match=r"memory.budget was 'aggressive' and is now 'balanced'"):
        experiment.build(configure(text, tmp_path, *looked_for, "--memory.budget=balanced"))
    with pytest.raises(ConfigError, match="Nothing fits into 1 kB"):
        experiment.build(configure(text, tmp_path, *looked_for, "--memory.budget=1kB", "--run.name=b"))
    assert not (tmp_path / "b").exists()


def test_without_settings_of_memory_the_fastest_step_is_taken_that_the_device_holds(text, tmp_path, caplog):
    defaults = MemoryConfig()
    config = dataclasses.replace(configure(text, tmp_path, "--training.steps=2"), memory=defaults)
    with caplog.at_level(logging.INFO, "revjax"):
        ready = experiment.build(config)
    fastest = min(experiment.candidates(config), key=lambda c: (c.time, c.bytes)).choice  # there is room for all
    assert ready.config.memory == dataclasses.replace(defaults, plan=fastest.plan)
    assert f"memory.budget auto: plan {fastest.plan}" in caplog.text
    caplog.clear()
    given = dataclasses.replace(defaults, plan="nothing", budget="8GB")
    assert experiment.build(dataclasses.replace(config, memory=given)).config.memory == given
    assert "memory.budget 8GB is not used: memory.plan is 'nothing', not auto" in caplog.text


@pytest.mark.slow
def test_an_ordinary_network_has_plans_of_its_own(text, tmp_path):
    config = configure(text, tmp_path, "--model.coupling=residual", "--memory.plan=auto", "--memory.budget=aggressive")
    assert experiment.build(config, dry=True).config.memory.plan == "inputs"
    assert experiment.check_model(config).ok


@pytest.mark.slow
def test_advice_names_settings_that_do_what_it_says(text, tmp_path):
    """The compiled step is smaller where advice says so, and what a step has already is not advised."""
    basic = ["--model.d_model=64", "--model.num_layers=8", "--data.sequence_length=128", "--memory.plan=all"]
    config = configure(text, tmp_path, *basic)
    devices = experiment.Devices.of(config)
    program = experiment.Program.of(config, devices)
    now = experiment.bytes_of_step(program.compile())
    found = {s.setting: s for s in experiment.suggestions(config, program.shapes, devices)}
    assert "--memory.plan=all" not in found
    for setting in ("--memory.plan=nothing", "--memory.accumulation=2", "--optimizer.moment_dtype=bfloat16"):
        other = experiment.bytes_of_step(
            experiment.Program.of(configure(text, tmp_path, *basic, setting), devices).compile()
        )
        assert found[setting].bytes < 0 and other < now
        assert 0.9 <= found[setting].bytes / (other - now) <= 1.1  # at 2 layers up to 2.5 (jax 0.12.0.1)
    assert found["--memory.accumulation=2"].time > 1 == found["--optimizer.moment_dtype=bfloat16"].time
    smallest = ["--memory.plan=nothing", "--memory.accumulation=4", "--optimizer.moment_dtype=bfloat16"]
    config = configure(text, tmp_path, *basic, *smallest)
    found = experiment.suggestions(config, experiment.Program.of(config, devices).shapes, devices)
    assert all(s.bytes > 0 and s.time < 1 for s in found)
    assert "no single setting" in experiment.describe_suggestions([])


def test_a_run_leaves_what_it_says(finished):
    config, _, result = finished
    folder = config.run.path
    names = {p.name for p in folder.iterdir()}
    assert names == {
        "config.yaml",
        "metrics.jsonl",
        "validation.jsonl",
        "samples.jsonl",
        "trouble.jsonl",
        "checkpoints",
        "loss.png",
        "sample.txt",
        ".lock",
    }
    assert load(RunConfig, folder / "config.yaml", environ={}) == config
    assert re.match(r"# revjax .*, jax .*, Python .*, (git [0-9a-f]+\+?, )?cpu\n", (folder / "config.yaml").read_text())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 11))
    for key in (
        "loss",
        "bits_per_byte",
        "learning_rate",
        "grad_norm",
        "canary",
        "unsafe",
        "max_abs",
        "tokens_per_second",
    ):
        assert all(isinstance(line[key], int | float) for line in lines), key
    assert {line["canary"] for line in lines} == {0} and {line["unsafe"] for line in lines} == {0}
    assert [line["step"] for line in read_metrics(folder / "validation.jsonl")] == [0, 5, 10]
    assert (folder / "sample.txt").read_text().startswith("def ") and result.sample.startswith("def ")
    summary = experiment.summarize(result)
    assert result.exit_code == 0 and " finished at step 10" in summary and "was finished" not in summary
    assert "at each of 10 steps (canary 0, unsafe 0)" in summary


def test_ten_steps_are_five_and_five_to_the_bit(finished, tmp_path, text):
    """The process dies in step 8; the same command starts again from the checkpoint of step 5."""
    straight = finished[2].outcome.state
    config = configure(text, tmp_path)
    ready = dataclasses.replace(experiment.build(config), train_step=finished[1].train_step)

    def dying(state, batch):
        if int(state.step) == 7:
            raise RuntimeError("power cut")
        return ready.train_step(state, batch)

    with pytest.raises(RuntimeError, match="power cut"):
        experiment.run(dataclasses.replace(ready, train_step=dying))
    again = experiment.build(config)
    assert again.start_step == 5
    resumed = experiment.run(again).outcome.state
    assert all(map(np.array_equal, jax.tree.leaves(resumed), jax.tree.leaves(straight)))
    losses = lambda c: [line["loss"] for line in read_metrics(c.run.path / "metrics.jsonl")]
    assert losses(config) == losses(finished[0])


def test_a_finished_run_is_left_as_it_is(finished):
    config, ready, result = finished
    before = (config.run.path / "metrics.jsonl").read_text()
    again = dataclasses.replace(ready, state=result.outcome.state)  # what build returns, without compiling again
    assert again.start_step == 10 and "nothing is left to do" in experiment.announce(again)
    repeated = experiment.run(again)
    assert repeated.outcome.ended == "finished" and "was finished at step 10" in experiment.summarize(repeated)
    assert (config.run.path / "metrics.jsonl").read_text() == before


def test_a_damaged_latest_checkpoint_gives_way_to_the_one_before(finished, tmp_path, text):
    """With the same end as a run that was never damaged."""
    shutil.copytree(finished[0].run.path, tmp_path / "a")
    victim = next(p for p in sorted((tmp_path / "a" / "checkpoints" / "10").rglob("d/*")) if p.is_file())
    victim.write_bytes(victim.read_bytes()[:-1])
    ready = experiment.build(configure(text, tmp_path))
    assert ready.start_step == 5 and list(ready.damaged) == [10]
    result = experiment.run(ready)
    assert result.outcome.ended == "finished"
    assert all(map(np.array_equal, jax.tree.leaves(result.outcome.state), jax.tree.leaves(finished[2].outcome.state)))
    names = {p.name for p in (tmp_path / "a" / "checkpoints").iterdir()}
    assert names == {"5", "10", "10.damaged-0"}
    experiment.load_run(tmp_path / "a")


def test_a_checkpoint_says_what_it_was_made_with(finished):
    config, _, _ = finished
    _, meta = Checkpointer(config.run.path / "checkpoints").restore()
    assert meta["config"]["model"]["d_model"] == 32 and "jax" in meta["versions"] and meta["backend"] == "cpu"


def test_another_config_in_the_same_folder_is_refused_by_field(finished, text):
    folder = finished[0].run.folder
    with pytest.raises(RunFolderError) as error:
        experiment.build(configure(text, folder, "--optimizer.learning_rate=0.5", "--model.num_layers=3"))
    message = str(error.value)
    assert (
        "model.num_layers was 2 and is now 3" in message
        and "optimizer.learning_rate was 0.001 and is now 0.5" in message
    )
    assert "--run.name=a-2" in message and "--allow-change=model.num_layers,optimizer.learning_rate" in message
    with pytest.raises(ConfigError, match="no field 'training.step'. Did you mean 'training.steps'"):
        experiment.build(configure(text, folder), allow_change=["training.step"])


def test_a_finished_run_goes_on_with_more_steps_where_that_is_allowed(finished, text, tmp_path):
    shutil.copytree(finished[0].run.path, tmp_path / "a")
    config = configure(text, tmp_path, "--training.steps=12")
    before = (tmp_path / "a" / "config.yaml").read_text()
    result = experiment.run(experiment.build(config, allow_change=["training.steps"]))
    assert result.outcome.ended == "finished" and int(result.outcome.state.step) == 12
    assert load(RunConfig, tmp_path / "a" / "config.yaml", environ={}).training.steps == 12
    assert (tmp_path / "a" / "config.1.yaml").read_text() == before
    assert [line["step"] for line in read_metrics(tmp_path / "a" / "metrics.jsonl")] == list(range(1, 13))


def test_a_folder_of_other_things_is_refused(text, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "thesis.tex").write_text("")
    with pytest.raises(RunFolderError, match="not the folder of a run: it has no config.yaml, but thesis.tex"):
        experiment.build(configure(text, tmp_path))
    with pytest.raises(RunFolderError, match="is a file, but a run needs a folder"):
        experiment.build(configure(text, tmp_path / "a", "--run.name=thesis.tex"))


def test_text_that_has_changed_is_refused_on_resume(finished, text):
    before = text.read_text()
    text.write_text(before * 2)
    try:
        with pytest.raises(DataError, match="The data is not what the run was started with: text was .* and is"):
            experiment.build(finished[0])
        assert experiment.build(finished[0], allow_change=["data.source"]).batches.step == 10
    finally:
        text.write_text(before)


def test_a_crash_before_the_first_step_leaves_nothing(finished, tmp_path):
    config, ready, result = finished

    def broken(state, batch):
        raise MemoryError("out of memory")

    new = dataclasses.replace(
        ready,
        folder=RunFolder(tmp_path / "new", config),
        batches=Batches(ready.corpus, batch_size=4, sequence_length=32, seed=0),
        state=dataclasses.replace(result.outcome.state, step=jax.numpy.zeros((), "int32")),
        train_step=broken,
    )
    with pytest.raises(MemoryError):
        experiment.run(new)
    assert list(tmp_path.iterdir()) == []


def test_a_trained_model_comes_back_and_continues_a_text(finished):
    config, _, result = finished
    trained = experiment.load_run(config.run.path)
    _, params = split(trained.model)
    assert all(map(np.array_equal, jax.tree.leaves(params), jax.tree.leaves(result.outcome.state.params)))
    options = experiment.SampleConfig(prompt="1 squared", max_new_tokens=5, temperature=0)
    assert experiment.sample_text(trained.model, trained.tokenizer, options).startswith("1 squared")


def test_a_model_that_is_not_there_is_an_error_in_words(finished, tmp_path):
    parent = finished[0].run.path.parent
    with pytest.raises(RunFolderError, match=r"There is no run in .*/b: the folder does not exist. .* has a\."):
        experiment.load_run(parent / "b")
    with pytest.raises(RunFolderError, match="has no config.yaml, but a. Give one of its runs, such as .*/a.$"):
        experiment.load_run(parent)
    (tmp_path / "config.yaml").write_text((finished[0].run.path / "config.yaml").read_text())
    with pytest.raises(CheckpointError, match="There is no checkpoint"):
        experiment.load_run(tmp_path)


def test_the_loss_on_the_held_out_text_is_the_last_validation(finished, capsys):
    config, _, _ = finished
    last = read_metrics(config.run.path / "validation.jsonl")[-1]["loss"]
    (done,) = experiment.evaluate(config.run.path, experiment.EvaluateConfig(max_batches=2))
    assert done.loss == pytest.approx(last, rel=1e-6) and done.count == 2 * 4 * 32
    assert done.bits_per_byte == pytest.approx(done.loss / np.log(2), rel=1e-3) and done.source.endswith("held out")
    assert cli.main(["evaluate", str(config.run.path), "--max_batches=2"]) == 0
    out = capsys.readouterr().out
    assert f"{done.bits_per_byte:.4f} bits/byte" in out
    assert f"over 256 of {finished[1].corpus.validation[0].text.num_tokens:,} tokens" in out


def test_the_loss_on_another_text(finished, tmp_path):
    (tmp_path / "other.txt").write_text("1 squared is 1.\n" * 200)
    options = experiment.EvaluateConfig(source=str(tmp_path / "other.txt"), batch_size=1, sequence_length=16)
    (done,) = experiment.evaluate(finished[0].run.path, options)
    assert done.count == 200 * 16 and done.size == 200 * 16 + 1
    with pytest.raises(DataError, match=r"There is no file or folder 'nowhere' \(--source\)"):
        experiment.evaluate(finished[0].run.path, experiment.EvaluateConfig(source="nowhere"))
    rows = [json.dumps({"body": f"{i} squared is {i * i}.\n" * 9}) for i in range(9)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows) + "\n")
    with pytest.raises(DataError, match="has no field 'text'"):
        experiment.evaluate(finished[0].run.path, dataclasses.replace(options, source=str(tmp_path / "rows.jsonl")))
    options = dataclasses.replace(options, source=str(tmp_path / "rows.jsonl"), text_field="body")
    assert experiment.evaluate(finished[0].run.path, options)[0].count > 1000


def test_a_batch_of_trouble_can_be_had_again_as_the_docs_say(finished, tmp_path):
    config, ready, _ = finished
    (tmp_path / "config.yaml").write_text((config.run.path / "config.yaml").read_text())
    line = {"batch": ready.batches.state() | {"step": 3}}
    (tmp_path / "trouble.jsonl").write_text(json.dumps(line) + "\n")
    docs = (pathlib.Path(__file__).parents[1] / "docs" / "training.md").read_text()
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", docs, re.DOTALL) if "line[" in block]
    found = {}
    code = code.replace('"runs/quickstart"', repr(str(tmp_path)))
    exec(code, found)
    assert np.array_equal(found["batch"]["tokens"], ready.batches.batch(3)["tokens"])
    (tmp_path / "trouble.jsonl").write_text("")
    with pytest.raises(AssertionError, match="There was no trouble in"):
        exec(code, {})


def test_parameters_that_are_not_finite_are_told(finished, tmp_path, caplog, monkeypatch):
    """A model that says nothing, or only nan, says why."""
    folder = tmp_path / "a"
    shutil.copytree(finished[0].run.path, folder)
    with Checkpointer(folder / "checkpoints") as checkpointer:
        nested, meta = checkpointer.restore()
        nested["params"]["norm"]["scale"][0] = np.nan
        checkpointer.save(11, nested, meta, force=True)
        checkpointer.wait()
    monkeypatch.setattr(logging.getLogger("revjax"), "propagate", True)
    experiment.load_run(folder)
    assert "are not all finite: its training diverged" in caplog.text


def test_runs_are_compared_in_a_table_and_a_plot(finished, tmp_path, capsys):
    folder = finished[0].run.path
    assert cli.main(["runs", str(folder.parent), f"--plot={tmp_path / 'runs.png'}"]) == 0
    table = capsys.readouterr().out
    header, line = table.splitlines()[:2]
    assert header.split()[:3] == ["run", "step", "train"] and line.split()[:2] == ["a", "10"]
    assert f"{read_metrics(folder / 'validation.jsonl')[-1]['bits_per_byte']:.3f}" in line
    assert (tmp_path / "runs.png").stat().st_size > 1000 and table.endswith(f"\n\n{tmp_path / 'runs.png'}\n")
    assert cli.main(["runs", str(folder)]) == 0 and table.startswith(capsys.readouterr().out)
    assert cli.main(["runs", str(tmp_path)]) == 2 and "There is no run in" in capsys.readouterr().err


def test_a_run_whose_latest_losses_are_no_numbers_does_not_look_alive(tmp_path, capsys):
    (tmp_path / "dead").mkdir()
    (tmp_path / "dead" / "config.yaml").write_text("")
    step = {"tokens_per_second": 10.0, "canary": 0, "unsafe": 3, "skipped": 0}
    lines = [{"step": i, "bits_per_byte": None if i > 2 else 2.0} | step for i in range(1, 5)]
    evaluations = [{"step": 0, "bits_per_byte": 7.9}, {"step": 4, "bits_per_byte": None}]
    for name, of_it in (("metrics", lines), ("validation", evaluations)):
        (tmp_path / "dead" / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in of_it))
    assert cli.main(["runs", str(tmp_path), f"--plot={tmp_path / 'runs.png'}"]) == 0
    header, line = (row.split() for row in capsys.readouterr().out.replace("held out", "held_out").splitlines()[:2])
    shown = dict(zip(header, line, strict=True))
    assert (shown["train"], shown["held_out"], shown["best"]) == ("nan", "nan", "7.900")
    assert (shown["canary"], shown["unsafe"]) == ("0", "12")


class Says(nnx.Module):
    """A model whose tokens are the bytes of a text, whatever it is asked."""

    def __init__(self, text):
        self.text = nnx.data(jax.numpy.asarray(np.frombuffer(text.encode(), np.uint8).astype(np.int32)))

    def init_cache(self, batch, max_length):
        return jax.numpy.zeros((), jax.numpy.int32)

    def decode(self, tokens_BT, cache):
        return jax.nn.one_hot(self.text[cache], 256)[None, None] * 1e3, cache + 1


@pytest.mark.parametrize(
    "text, stop, expected",
    [
        ("one two three", ("wo",), "one t"),
        ("one two three", ("three", "two"), "one "),
        ("one two three", ("four",), "one two three"),
        ("one two\0three", (), "one two"),
        ("naïve café " * 4, ("é c",), "naïve café " * 4),
        ("naïve café " * 4, ("é n",), "naïve caf"),
        ("x" * 17 + "END", ("END",), "x" * 17),
    ],
)
def test_a_text_ends_where_it_is_told_to(text, stop, expected):
    options = experiment.SampleConfig(prompt="a", max_new_tokens=len(text.encode()), stop=stop, temperature=0)
    pieces = list(experiment.stream_text(Says(text), ByteTokenizer(), options))
    assert (
        "".join(pieces) == expected and experiment.sample_text(Says(text), ByteTokenizer(), options) == "a" + expected
    )


@pytest.mark.slow
def test_many_prompts_are_continued_in_batches_as_each_alone(finished):
    run = experiment.load_run(finished[0].run.path)
    options = experiment.SampleConfig(max_new_tokens=30, temperature=0, batch_size=2, stop=("\n",))
    prompts = ["12 squared", "", "1", "1999 squared is ", "12 squared"]
    texts = list(experiment.sample_texts(run.model, run.tokenizer, prompts, options))
    alone = lambda prompt: "".join(
        experiment.stream_text(run.model, run.tokenizer, dataclasses.replace(options, prompt=prompt))
    )
    assert texts == [(prompt, alone(prompt)) for prompt in prompts] and texts[0] == texts[4]
    assert all("\n" not in text for _, text in texts)


def test_a_prompt_that_is_too_long_is_refused_before_any_is_continued(text, tmp_path):
    config = configure(text, tmp_path, "--model.positions=learned", "--model.max_length=64").model
    model = Decoder(config, rngs=nnx.Rngs(0))
    options = experiment.SampleConfig(max_new_tokens=40, batch_size=1, temperature=0)
    assert len(list(experiment.sample_texts(model, ByteTokenizer(), ["12", "x" * 24], options))) == 2
    with pytest.raises(ConfigError, match="longest prompt has 25 tokens, .* leave room for 24"):
        next(experiment.sample_texts(model, ByteTokenizer(), ["12", "x" * 25], options))


def test_the_same_prompts_are_continued_differently_where_draws_are_made(finished):
    run = experiment.load_run(finished[0].run.path)
    options = experiment.SampleConfig(max_new_tokens=30, temperature=2, batch_size=2)
    texts = [text for _, text in experiment.sample_texts(run.model, run.tokenizer, ["1"] * 4, options)]
    assert len(set(texts)) == 4
    assert texts == [text for _, text in experiment.sample_texts(run.model, run.tokenizer, ["1"] * 4, options)]


@pytest.mark.parametrize(
    "name, text, expected",
    [
        ("a.txt", b"one\n\n two \n", ["one", " two "]),
        ("a.jsonl", b'{"prompt": "one\\ntwo"}\n{"prompt": ""}\n', ["one\ntwo", ""]),
        ("a.txt", b"\n", "has no prompts: write one a line"),
        ("a.txt", b"\xff", "it is not UTF-8"),
        ("b.txt", None, "Cannot read .*b.txt .--prompts.: No such file"),
        ("a.jsonl", b'{"prompt": "one"}\n{"text": "two"}\n', "a.jsonl:2 must be an object with the text of a prompt"),
        ("a.jsonl", b"one\n", "a.jsonl:1 is not JSON"),
    ],
)
def test_prompts_are_lines_or_fields(tmp_path, name, text, expected):
    if text is not None:
        (tmp_path / name).write_bytes(text)
    if isinstance(expected, list):
        assert experiment.read_prompts(tmp_path / name) == expected
    else:
        with pytest.raises(ConfigError, match=expected):
            experiment.read_prompts(tmp_path / name)


def test_an_empty_prompt_begins_a_file(finished):
    run = experiment.load_run(finished[0].run.path)
    assert (
        len(experiment.sample_text(run.model, run.tokenizer, experiment.SampleConfig(prompt="", max_new_tokens=8))) <= 8
    )


class SaysFirst(nnx.Module):
    """A model that repeats the first token that it was given."""

    def init_cache(self, batch, max_length):
        return jax.numpy.int32(-1)

    def decode(self, tokens_BT, cache):
        cache = jax.numpy.where(cache < 0, tokens_BT[0, 0], cache)
        return jax.nn.one_hot(cache, 256)[None, None] * 1e3, cache


def test_a_prompt_stands_after_what_begins_a_document():
    options = experiment.SampleConfig(prompt="abc", max_new_tokens=3, temperature=0)
    tokenizer = ByteTokenizer()
    assert experiment.sample_text(SaysFirst(), tokenizer, options) == "abcaaa"
    tokenizer.begin = (ord("<"),)
    assert experiment.sample_text(SaysFirst(), tokenizer, options) == "abc<<<"
    assert experiment.sample_text(SaysFirst(), tokenizer, dataclasses.replace(options, prompt="")) == "<<<"


def test_a_folder_that_cannot_be_written_is_named_with_what_to_set(text, tmp_path):
    (tmp_path / "file").write_text("")
    config = configure(text, tmp_path / "file")
    with pytest.raises(RunFolderError, match="Cannot write to .*file/a: .* Set run.folder to another place"):
        RunFolder(config.run.path, config).claim("")


@pytest.mark.parametrize(
    "ended, number, code",
    [("finished", None, 0), ("stopped", None, 3), ("interrupted", 2, 130), ("interrupted", 15, 143)],
)
def test_exit_codes_are_those_of_the_docs(finished, tmp_path, ended, number, code):
    outcome = dataclasses.replace(finished[2].outcome, ended=ended, signal=number)
    assert experiment.Result(outcome, 0, 0.0, None, tmp_path).exit_code == code


def test_a_run_whose_model_is_broken_says_so_first_and_ends_with_its_own_exit_code(finished, tmp_path):
    config, ready, result = finished

    def breaking(state, batch):
        state, metrics = ready.train_step(state, batch)
        broken = jax.tree.map(lambda p: p * np.nan, state.params) if int(state.step) == 7 else state.params
        return dataclasses.replace(state, params=broken), metrics

    copied = jax.tree.map(jax.numpy.copy, result.outcome.state)  # a step uses them up
    new = dataclasses.replace(
        ready,
        folder=RunFolder(tmp_path / "a", config),
        batches=Batches(ready.corpus, batch_size=4, sequence_length=32, seed=0),
        state=dataclasses.replace(copied, step=jax.numpy.zeros((), "int32")),
        train_step=breaking,
    )
    result = experiment.run(new)
    assert result.outcome.ended == "finished" and result.exit_code == 3 and result.sample is None
    summary = experiment.summarize(result)
    assert summary.startswith("BROKEN       the model is of no use: since step 8, its loss is no number.")
    assert "--training.on_trouble=rewind" in summary and "On:" not in summary
    assert "no number at step 10" in summary and not (tmp_path / "a" / "sample.txt").exists()


def test_a_sample_that_adds_nothing_to_its_prompt_is_none(finished, tmp_path):
    config, ready, result = finished
    shutil.copytree(config.run.path, tmp_path / "a")
    silent = types.SimpleNamespace(abstract=ready.skeleton.abstract, merge=lambda params: Says("\0"))
    again = dataclasses.replace(
        ready, folder=RunFolder(tmp_path / "a", config), skeleton=silent, state=result.outcome.state
    )
    result = experiment.run(again)
    assert result.sample is None and result.exit_code == 0 and "On:" not in experiment.summarize(result)


def test_what_a_run_left_before_its_first_step_is_no_run(text, tmp_path):
    config = configure(text, tmp_path)
    first = RunFolder(config.run.path, config)
    first.claim("")
    first.release()
    assert RunFolder(config.run.path, configure(text, tmp_path, "--model.num_layers=3")).is_new


@pytest.mark.parametrize(
    "settings, message",
    [
        (["--model.coupling=residual"], "memory.plan 'nothing' cannot rebuild"),
        (["--model.positions=learned", "--model.max_length=16"], "Set --model.max_length=32"),
        (["--memory.plan=everything"], "A plan is 'nothing'"),
        (["--run.name=a/b"], "without slashes"),
    ],
)
def test_a_config_that_cannot_work_as_a_whole_is_refused(text, tmp_path, settings, message):
    with pytest.raises(ConfigError, match=message):
        configure(text, tmp_path, *settings)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="other devices have memory beside that of the host")
def test_a_plan_that_would_move_nothing_to_the_host_is_refused(text, tmp_path):
    with pytest.raises(ConfigError, match="memory.plan 'host:2': The plan 'host' keeps .* a CPU has no other"):
        experiment.build(configure(text, tmp_path, "--memory.plan=host:2"))
    assert list(tmp_path.iterdir()) == []


def test_a_step_that_no_device_holds_is_refused_before_it_is_compiled(text, tmp_path, caplog):
    config = configure(text, tmp_path, "--data.batch_size=10000000", "--data.sequence_length=100000")
    with pytest.raises(ConfigError, match="needs about [0-9,.]+ GB on each device, and .* GB are free"):
        experiment.build(config)
    assert list(tmp_path.iterdir()) == [] and "compiling" not in caplog.text


def test_a_dry_run_of_a_step_for_a_larger_device_warns_and_goes_on(text, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(sys.modules["revjax.experiment.build"], "device_bytes", lambda: 1000)
    with caplog.at_level(logging.INFO, "revjax"):
        assert experiment.build(configure(text, tmp_path), dry=True).is_dry
    assert "on each device, and 1 kB are free" in caplog.text and "is ready after" in caplog.text


def test_a_vocabulary_that_does_not_hold_the_text_is_refused(text, tmp_path):
    with pytest.raises(DataError, match="'bytes' has 256 tokens, but the model knows 110. Set --model.vocab_size=256"):
        experiment.build(configure(text, tmp_path, "--model.vocab_size=110"))
    assert list(tmp_path.iterdir()) == []


def test_a_prompt_that_is_too_long_for_the_model_is_refused(text, tmp_path):
    settings = ["--model.positions=learned", "--model.max_length=32", "--training.sample_tokens=30"]
    with pytest.raises(ConfigError, match="training.sample_prompt 'def ': .*32"):
        experiment.build(configure(text, tmp_path, *settings))


def test_two_processes_do_not_train_in_one_folder(text, tmp_path):
    config = configure(text, tmp_path)
    first, second = experiment.build(config), experiment.build(config)
    first.folder.claim("")
    with pytest.raises(RunFolderError, match="Another process is training in .*--run.name=a-2"):
        experiment.run(second)
    with pytest.raises(RunFolderError, match="Another process is training in"):
        experiment.build(config)  # before anything is compiled
    assert {p.name for p in config.run.path.iterdir()} == {".lock", "config.yaml"}
    first.folder.release()


def test_a_run_that_went_on_meanwhile_is_left_alone(text, tmp_path):
    config = configure(text, tmp_path)
    first, second = experiment.build(config), experiment.build(config)
    experiment.run(first)
    with pytest.raises(RunFolderError, match="stood at step 0 .* is now at step 10"):
        experiment.run(second)
    assert len(read_metrics(config.run.path / "metrics.jsonl")) == 10


def test_a_run_has_its_own_tokenizer_and_its_loss_is_in_bits_per_byte_of_text(text, tmp_path):
    """Mixture, packing, epochs, a tokenizer that is gone afterwards: trained, stopped, gone on with, evaluated."""
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": f"{i} plus {i}"}) + "\n" for i in range(500)))
    (tmp_path / "t.json").write_text(train_tokenizer(str(text), 300))
    config = configure(
        text,
        tmp_path / "runs",
        f"--data.source={{{text}: 3, {tmp_path / 'rows.jsonl'}: 1}}",
        f"--data.validation={{again: {text}}}",
        f"--data.tokenizer={tmp_path / 't.json'}",
        "--model.vocab_size=300",
        "--training.epochs=0.05",
        "--training.sample_prompt=1 squared",
    )
    ready = experiment.build(config)
    steps = ready.config.training.steps
    assert steps == -(-0.05 * ready.batches.rows_per_epoch // 4) and 5 < steps < 40
    result = experiment.run(ready)
    assert result.outcome.ended == "finished" and int(result.outcome.state.step) == steps
    (tmp_path / "t.json").rename(tmp_path / "elsewhere.json")
    trained = experiment.load_run(config.run.path)
    assert trained.tokenizer.fingerprint == ready.corpus.tokenizer.fingerprint
    last = read_metrics(config.run.path / "validation.jsonl")[-1]
    assert set(last["texts"]) == {str(text), str(tmp_path / "rows.jsonl"), "again"}
    for name in ("loss", "bits_per_byte"):
        a, b, _ = (numbers[name] for numbers in last["texts"].values())
        assert last[name] == pytest.approx(0.75 * a + 0.25 * b)
    numbers = last["texts"]["again"]
    (part,) = [part for part in ready.corpus.validation if part.name == "again"]
    assert part.text.num_bytes == text.stat().st_size and part.text.num_tokens < part.text.num_bytes
    nats = numbers["loss"] * part.text.num_tokens
    assert numbers["bits_per_byte"] == pytest.approx(nats / np.log(2) / text.stat().st_size)
    evaluated = experiment.evaluate(config.run.path, experiment.EvaluateConfig(max_batches=2))
    assert [done.source for done in evaluated] == [f"{text}, held out", f"{tmp_path / 'rows.jsonl'}, held out", "again"]
    assert [done.loss for done in evaluated] == pytest.approx([x["loss"] for x in last["texts"].values()], rel=1e-6)


def test_other_data_goes_on_where_that_is_allowed(finished, text, tmp_path):
    shutil.copytree(finished[0].run.path, tmp_path / "a")
    (tmp_path / "other.txt").write_text(text.read_text() * 2)
    config = configure(tmp_path / "other.txt", tmp_path, "--training.steps=12")
    with pytest.raises(RunFolderError, match="training.steps was .*--allow-change=data.source,training.steps"):
        experiment.build(config)
    ready = experiment.build(config, allow_change=["data.source", "training.steps"])
    assert ready.start_step == ready.batches.step == 10


def test_a_run_begins_with_the_parameters_of_another(finished, text, tmp_path, monkeypatch):
    begin = f"--training.start_from={finished[0].run.path}"
    ready = experiment.build(configure(text, tmp_path, begin, "--training.seed=1"))
    theirs = finished[2].outcome.state.params
    assert ready.start_step == 0
    assert all(map(np.array_equal, jax.tree.leaves(ready.state.params), jax.tree.leaves(theirs)))
    experiment.run(ready)
    first = read_metrics(tmp_path / "a" / "metrics.jsonl")[0]["loss"]
    last = read_metrics(finished[0].run.path / "metrics.jsonl")[-1]["loss"]
    assert abs(first - last) < 0.5 * last
    (tmp_path / "untrained").mkdir()
    (tmp_path / "untrained" / "config.yaml").write_text((finished[0].run.path / "config.yaml").read_text())
    gone = configure(text, tmp_path, f"--training.start_from={tmp_path / 'gone'}", "--training.seed=1")
    allowed = ["training.start_from"]
    assert experiment.build(gone, allow_change=allowed).start_step == 10  # a run under way does not need it any more
    for settings, message in (
        (["--model.d_model=16"], "has another shape: .* is .* and here"),
        (["--training.start_from=nowhere"], "There is no run in nowhere"),
        ([f"--training.start_from={tmp_path / 'untrained'}"], "has no checkpoint: was it ever trained"),
        (["--model.d_model=16", "--model.lora.rank=2"], "has another shape: .* is .* and here"),
    ):
        for dry in (True, False):  # told before anything is compiled
            with monkeypatch.context() as patch, pytest.raises(RevjaxError, match=message):
                patch.setattr(Program, "of", lambda *args: pytest.fail("too late"))
                experiment.build(configure(text, tmp_path / "other", begin, *settings), dry=dry)


@pytest.mark.slow
def test_adapters_are_trained_beside_the_parameters_of_another_run(finished, text, tmp_path):
    base = finished[0].run.path
    settings = ("--run.name=lora", f"--training.start_from={base}", "--model.lora.rank=4", "--training.seed=1")
    ready = experiment.build(configure(text, tmp_path, *settings))
    theirs = finished[2].outcome.state.params
    assert all(map(np.array_equal, jax.tree.leaves(ready.state.frozen), jax.tree.leaves(theirs)))
    announced = experiment.announce(ready)
    assert "of which 5,120 of adapters are trained" in announced
    assert "parameters 20.5 kB, frozen 140 kB, optimizer 41 kB" in announced
    result = experiment.run(ready)
    state = result.outcome.state
    assert all(map(np.array_equal, jax.tree.leaves(state.frozen), jax.tree.leaves(theirs)))
    again = experiment.build(configure(text, tmp_path, *settings))
    assert again.start_step == 10
    assert all(map(np.array_equal, jax.tree.leaves(again.state), jax.tree.leaves(state)))
    validation = read_metrics(result.folder / "validation.jsonl")[-1]["loss"]
    (done,) = experiment.evaluate(result.folder, experiment.EvaluateConfig(max_batches=2))
    assert done.loss == pytest.approx(validation, rel=1e-6)

    merged = named(read_parameters(result.folder))
    query = "stack.runs.0.0.attention.query"
    adapter = {x: np.asarray(state.params["stack"]["runs"]["0"]["0"]["attention"]["query"]["adapter"][x]) for x in "ab"}
    expected = np.einsum("ldr,lrnh->ldnh", adapter["a"], adapter["b"]) * 32 / 4
    before = theirs["stack"]["runs"]["0"]["0"]["attention"]["query"]["kernel"]
    np.testing.assert_allclose(merged[f"{query}.kernel"], before + expected, atol=1e-6)
    assert np.abs(expected).max() > 1e-4 and f"{query}.adapter.a" not in merged
    # What goes on from it, or leaves it, is the model without adapters.
    onward = configure(
        text, tmp_path, "--run.name=onward", f"--training.start_from={result.folder}", "--training.seed=2"
    )
    params = experiment.build(onward).state.params
    np.testing.assert_array_equal(
        params["stack"]["runs"]["0"]["0"]["attention"]["query"]["kernel"], merged[f"{query}.kernel"]
    )
    _, departure = experiment.to_hf(result.folder, experiment.ToHFConfig(output=str(tmp_path / "hf")))
    # bdia is the ordinary network when it is evaluated, and float32 goes out: only integer streams are left behind
    assert departure is not None and 0 < departure.distance.largest < 1e-3 and departure.distance.kl < 1e-5
    assert departure.stock_loss == pytest.approx(departure.loss, rel=1e-4)
    with safe_open(tmp_path / "hf" / "model.safetensors", "numpy") as file:
        theirs = file.get_tensor("model.layers.1.self_attn.q_proj.weight")
    np.testing.assert_array_equal(theirs.T, merged[f"{query}.kernel"][1].reshape(32, 32))


def test_of_conversations_only_what_the_assistant_says_is_learned(tmp_path, capsys):
    chats = [
        [{"role": "user", "content": f"What is {i} squared?"}, {"role": "assistant", "content": f"It is {i * i}."}]
        for i in range(300)
    ]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    (tmp_path / "chat.jinja").write_text(
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    settings = (
        f"--data.chat_template={tmp_path / 'chat.jinja'}",
        "--data.text_field=messages",
        "--model.dtype=float32",
        "--model.exact=false",
        "--model.coupling=residual",
        "--memory.plan=inputs",
        "--training.steps=2",
    )
    config = configure(tmp_path / "chats.jsonl", tmp_path, *settings)
    ready = experiment.build(config)
    batch, params = ready.batches.batch(0), ready.state.params
    logits = ready.skeleton.merge(params)(
        batch["tokens"][:, :-1], segment_ids=batch["segment_ids"], positions=batch["positions"]
    )
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["tokens"][:, 1:])
    expected = float((losses * batch["weights"]).sum() / batch["weights"].sum())
    result = experiment.run(ready)
    (tmp_path / "chat.jinja").unlink()  # the run has its own
    first = read_metrics(result.folder / "metrics.jsonl")[0]
    assert first["loss"] == pytest.approx(expected, rel=1e-5)
    assert first["loss"] != pytest.approx(float(losses.mean()), rel=1e-5)
    (done,) = experiment.evaluate(result.folder, experiment.EvaluateConfig())
    learned = [b for chat in chats for b in f"{chat[1]['content']}\n".encode()]
    assert 0 < done.count < len(learned) and np.isfinite(done.loss)
    run = experiment.load_run(result.folder)
    prompt = experiment.chat_tokenizer(run, result.folder).encode("Hi")
    assert bytes(prompt.tolist()) == b"[user]Hi\n[assistant]"
    assert cli.main(["generate", str(result.folder), "--chat=true", "--prompt=Hi", "--max_new_tokens=4"]) == 0
    assert capsys.readouterr().out.startswith("Hi\n")
    without = dataclasses.replace(run, data=dataclasses.replace(run.data, chat_template=None))
    with pytest.raises(ConfigError, match="no chat template in .*: none of chat_template.json"):
        experiment.chat_tokenizer(without, tmp_path)


def test_parameters_are_exported_as_safetensors(finished, tmp_path, capsys):
    folder, state = finished[0].run.path, finished[2].outcome.state
    assert cli.main(["export", str(folder), f"--output={tmp_path / 'm.safetensors'}"]) == 0
    assert (
        f"m.safetensors: {sum(x.size for x in jax.tree.leaves(state.params)):,} parameters" in capsys.readouterr().out
    )
    with safe_open(tmp_path / "m.safetensors", "numpy") as file:
        assert json.loads(file.metadata()["config"])["model"]["d_model"] == 32
        names = set(file.keys())
        query = file.get_tensor("stack.runs.0.0.attention.query.kernel")
    assert (tmp_path / "m.safetensors").stat().st_mode == (folder / "metrics.jsonl").stat().st_mode
    assert len(names) == len(jax.tree.leaves(state.params)) and "embedding.table" in names
    np.testing.assert_array_equal(query, state.params["stack"]["runs"]["0"]["0"]["attention"]["query"]["kernel"])
    for output, message in ((tmp_path / "m.safetensors", "is there already"), (tmp_path / "no" / "m", "Cannot write")):
        with pytest.raises(CheckpointError, match=message):
            experiment.export(folder, output)
    assert {p.name for p in tmp_path.iterdir()} == {"m.safetensors"}


def tensorboard_values(folder):
    """{(name, step): value} of event files; a value that is there twice fails."""
    from tensorboardX.proto.event_pb2 import Event

    seen = {}
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        while data:  # length, checksum, event, checksum
            size = int.from_bytes(data[:8], "little")
            event, data = Event.FromString(data[12 : 12 + size]), data[16 + size :]
            for value in event.summary.value:
                assert (value.tag, event.step) not in seen
                seen[value.tag, event.step] = value.simple_value
    return seen


def wandb_values(folder):
    """The same of what wandb keeps until it is sent."""
    from wandb.proto.wandb_internal_pb2 import Record

    seen = {}
    for path in sorted(folder.glob("offline-run-*/*.wandb")):
        data, place, record = path.read_bytes(), 7, b""  # after the file's header
        while place < len(data):  # blocks of 32 KiB; checksum, length, what part of a record it is, the part
            if 2**15 - place % 2**15 < 7:
                place += 2**15 - place % 2**15
            size, part = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
            record += data[place + 7 : place + 7 + size]
            place += 7 + size
            if part in (1, 4):  # all of it, or its last part
                items = {
                    item.nested_key[0] if item.nested_key else item.key: json.loads(item.value_json)
                    for item in Record.FromString(record).history.item
                }
                record = b""
                for name, value in items.items():
                    if "/" not in name:  # step, and what wandb adds
                        continue
                    assert (name, items["step"]) not in seen
                    seen[name, items["step"]] = value
    return seen


def test_a_run_that_failed_before_its_first_step_may_begin_with_other_settings(text, tmp_path):
    pytest.importorskip("tensorboardX")
    ready = experiment.build(configure(text, tmp_path, "--training.tensorboard=true"))

    def fails(state, batch):
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        experiment.run(dataclasses.replace(ready, train_step=fails))
    other = configure(text, tmp_path, "--training.tensorboard=true", "--model.loss_tile=256")
    assert RunFolder(other.run.path, other).is_new


@pytest.mark.parametrize("setting, extra", [("tensorboard=true", "tensorboard"), ("wandb=p", "wandb")])
def test_a_tracker_that_is_not_installed_is_told_before_any_work(text, tmp_path, monkeypatch, setting, extra):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=rf"training.{extra} needs .* pip install {extra}"):
        experiment.build(configure(text, tmp_path, f"--training.{setting}"), dry=True)


@pytest.fixture(scope="module")
def tracked(text, tmp_path_factory):
    """The folder of a run with both trackers that was stopped after 5 steps, and went on to 10."""
    pytest.importorskip("tensorboardX")
    wandb = pytest.importorskip("wandb")
    folder = tmp_path_factory.mktemp("tracked")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        for steps in (5, 10):
            settings = ["--training.tensorboard=true", "--training.wandb=revjax", f"--training.steps={steps}"]
            config = configure(text, folder, *settings)
            experiment.run(experiment.build(config, allow_change=["training.steps"]))
    wandb.teardown()  # or it remembers its mode
    return folder / "a"


@pytest.mark.parametrize("place, values", [("tensorboard", tensorboard_values), ("wandb", wandb_values)])
def test_trackers_get_each_number_once(tracked, place, values):
    seen = values(tracked / place)
    for line in read_metrics(tracked / "metrics.jsonl"):
        assert seen["train/loss", line["step"]] == pytest.approx(line["loss"])
    for line in read_metrics(tracked / "validation.jsonl"):
        assert seen["validation/bits_per_byte", line["step"]] == pytest.approx(line["bits_per_byte"])
    assert {step for name, step in seen if name == "train/loss"} == set(range(1, 11))
    assert ("train/canary", 10) in seen and ("train/time", 1) not in seen


def test_a_run_that_goes_on_is_one_run_of_weights_and_biases(tracked):
    _, meta = Checkpointer(tracked / "checkpoints").restore()
    runs = [path.name for path in (tracked / "wandb").glob("offline-run-*")]
    assert len(runs) == 2 and all(name.endswith(f"-{meta['run_id']}") for name in runs)


def test_weights_and_biases_without_a_login_says_what_to_type(text, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    for name, value in (("WANDB_MODE", "online"), ("HOME", str(tmp_path)), ("NETRC", str(tmp_path / "no"))):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    config = configure(text, tmp_path, "--training.wandb=revjax")
    with pytest.raises(ConfigError, match="training.wandb: .*wandb login.* Or set WANDB_MODE=offline"):
        experiment.run(experiment.build(config))
    assert not (tmp_path / "a").exists()


def test_updates_in_the_backward_pass_are_refused_where_they_cannot_be_taken_back():
    in_backward = lambda how, **more: RunConfig(optimizer=OptimizerConfig(in_backward=how), **more)
    with pytest.raises(ConfigError, match="no gradients to add up: memory.accumulation must be 1, but got 2"):
        in_backward("two_sweeps", memory=MemoryConfig(accumulation=2))
    with pytest.raises(ConfigError, match="before training.spike_sigmas can refuse the update.*in_backward=two_sweeps"):
        in_backward("one_sweep", training=TrainingConfig(spike_sigmas=6.0))
    with pytest.raises(ConfigError, match="before model.dtype=float16 can refuse"):
        in_backward("one_sweep", model=DecoderConfig(dtype="float16"))
    with pytest.raises(ConfigError, match="training.on_trouble cannot be warn. Set --training.on_trouble=skip"):
        in_backward("two_sweeps", training=TrainingConfig(on_trouble="warn"))
    in_backward("two_sweeps", training=TrainingConfig(spike_sigmas=6.0))
