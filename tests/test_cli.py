"""A mistake is one message, exit code 2 and nothing written; Ctrl-C leaves a checkpoint that loads."""

import contextlib
import gzip
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import jax
import pytest

from revjax import cli, experiment
from revjax.cli.terminal import shown, visible
from revjax.config import load
from revjax.data import FileTokenizer
from revjax.experiment.doctor import _extra, known_problems
from revjax.models import CheckReport, Report

ROOT = pathlib.Path(__file__).parents[1]
TINY = str(ROOT / "configs" / "tiny.yaml")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder, in which the command runs."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def message_of(capsys, argv):
    """The one message of a command that ends with exit code 2."""
    code = cli.main(argv)
    out, err = capsys.readouterr()
    assert code == 2 and out == "" and "Traceback" not in err and err.startswith("error: "), (code, out, err)
    return err


@pytest.mark.parametrize(
    "words, message",
    [
        (["--model.num_layer=4"], "--model.num_layer: unknown field 'model.num_layer'. Did you mean 'num_layers'?"),
        (["--model.num_layers=four"], "error: --model.num_layers must be int, but got 'four' (str)."),
        (["--model.num_heads=3"], "num_heads must divide d_model, but got num_heads=3 and d_model=32."),
        (["--model.window=0"], "window must be at least 1, or null for its default, but got 0."),
        (["--model.vocab_size=128"], "The tokenizer 'bytes' has 256 tokens, but the model knows 128."),
        (["--data.tokenizer=blank"], "Cannot read the tokenizer blank/tokenizer.json (data.tokenizer): No such file"),
        (
            ["--data.tokenizer=notes.json"],
            "No such file or directory. To make one of your own text: revjax tokenizer train TEXT --vocab_size=4096 "
            "--output=notes.json",
        ),
        (["--data.tokenizer=binary/a.bin"], "binary/a.bin (data.tokenizer) is not a tokenizer.json"),
        (["--training.ema_decay=2"], "ema_decay must be between 0 and 1"),
        (["--data.source=no/such/place"], "There is no file or folder 'no/such/place' (data.source)"),
        (["--data.source=empty"], "No text for data.source 'empty': no file is there."),
        (["--data.source=blank"], "No text in blank/a.txt: all are documents without text."),
        (["--data.source=binary"], "No text in binary/a.bin: 1 not UTF-8 text."),
        (["--data.source=short"], "needs 65 (sequence_length + 1)"),
        (["--run.name=file"], "file is a file, but a run needs a folder."),
        (["--run.name=other"], "is not the folder of a run: it has no config.yaml, but thesis.tex."),
        (["--run.name=another"], "holds a run with another configuration: model.d_model was 128 and is now 32"),
        (["--steps"], "There is no option --steps. Write: revjax train"),
        (["--dryrun"], "There is no option --dryrun. Did you mean '--dry-run'?"),
        (["--log-format=xml"], "--log-format is json or text, but got 'xml'."),
        (["--num_layers=3"], "unknown field 'num_layers'. Did you mean 'model.num_layers'?"),
        (["--optimizer.name=adam"], "There is no optimizer 'adam'. Did you mean 'adamw'?"),
        (
            ["--optimizer.name=own_optimizers:one"],
            "The optimizer 'own_optimizers:one' must take (config, schedule): too many positional",
        ),
        (
            ["--optimizer.name=own_optimizers:two"],
            "The optimizer 'own_optimizers:two' must return an optax transformation, but got int.",
        ),
        (
            ["--model.coupling=revnett"],
            "error: --model.coupling: model: coupling: A coupling is one of revnet, midpoint, leapfrog, momentum, "
            "near-residual, bdia, residual, or package.module:function for one of your own, but got 'revnett'. Did you "
            "mean 'revnet'?",
        ),
        (["--model.coupling=revnet:2"], "takes no number, but got 'revnet:2'.\n"),
        (["--model.coupling=no.such:thing"], "The coupling 'no.such:thing' cannot be imported"),
    ],
)
def test_a_mistake_is_one_message_and_nothing_written(here, capsys, monkeypatch, words, message):
    monkeypatch.setattr("sys.dont_write_bytecode", True)
    (here / "own_optimizers.py").write_text("def one(config): ...\ndef two(config, schedule): return 3\n")
    for name in ("empty", "blank", "binary", "short", "runs/other", "runs/another"):
        (here / name).mkdir(parents=True)
    (here / "blank" / "a.txt").write_text("")
    (here / "binary" / "a.bin").write_bytes(b"\xff\xfe\xfd")
    (here / "short" / "a.txt").write_text("too short")
    (here / "runs" / "file").write_text("")
    (here / "runs" / "other" / "thesis.tex").write_text("")
    (here / "runs" / "another" / "config.yaml").write_text("run: {name: another}\n")
    (here / "runs" / "another" / "metrics.jsonl").write_text('{"step": 1}\n')
    before = sorted(here.rglob("*"))
    assert message in message_of(capsys, ["train", TINY, *words])
    assert sorted(here.rglob("*")) == before


def test_a_file_is_named_with_its_line(here, capsys):
    (here / "mine.yaml").write_text(f"base: {TINY}\nmodel:\n  d_modle: 64\n")
    message = message_of(capsys, ["train", "mine.yaml"])
    assert "mine.yaml:3: unknown field 'model.d_modle'. Did you mean 'd_model'?" in message
    assert "no config file tiny.yml" in message_of(capsys, ["train", "tiny.yml"])


@pytest.mark.parametrize(
    "words, message",
    [
        ([], "Expected one name, but got none. Write: revjax generate runs/NAME"),
        (["runs/missing"], "There is no run in runs/missing"),
        (["."], "error: . is not the folder of a run: it has no config.yaml, but nothing. Give the folder of a run."),
        (["runs/missing", "--max_new_tokens=0"], "error: --max_new_tokens: max_new_tokens must be at least 1"),
        (["runs/missing", "--promt=a"], "unknown field 'promt'. Did you mean 'prompt'?"),
    ],
)
def test_generating_from_nothing_is_an_error_in_words(here, capsys, words, message):
    assert message in message_of(capsys, ["generate", *words])


def test_commands_are_listed_and_misspelt_ones_corrected(capsys):
    assert cli.main(["--help"]) == 0
    listed = capsys.readouterr().out
    assert all(f"  {name} " in listed for name in ("train", "generate", "check"))
    assert cli.main(["trian"]) == 2
    assert "Did you mean 'train'?" in capsys.readouterr().err
    assert cli.main(["--version"]) == 0 and capsys.readouterr().out.startswith("revjax ")


@pytest.mark.parametrize("plot, why", [("no/such/a.png", "No such file"), ("a.xyz", "Format 'xyz' is not supported")])
def test_a_plot_that_cannot_be_written_is_one_message(here, capsys, plot, why):
    (here / "runs" / "a").mkdir(parents=True)
    (here / "runs" / "a" / "config.yaml").write_text("")
    assert cli.main(["runs", f"--plot={plot}"]) == 2
    assert f"Cannot write the plot to {plot!r} (--plot): {why}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command, field", [("train", "--model.num-layers"), ("generate", "--temperature"), ("check", "--model.coupling")]
)
def test_help_explains_every_field(capsys, command, field):
    assert cli.main([command, "--help"]) == 0
    assert field in capsys.readouterr().out.replace("num_layers", "num-layers")


def test_a_reader_that_has_seen_enough_ends_a_command_in_silence():
    script = [sys.executable, str(ROOT / "scripts" / "train.py"), "--help"]
    with subprocess.Popen(script, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b"" and process.wait() == 141


INTERRUPTED_IN_A_CALLBACK = """
import gc, os, signal, time
from revjax.cli import call
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's job in the background begins without
def in_a_callback(phase, info):
    gc.callbacks.remove(in_a_callback)
    os.kill(os.getpid(), signal.SIGINT)
def command(words):
    print("so far")
    gc.callbacks.append(in_a_callback)
    gc.collect()
    time.sleep(60)
    return 0
raise SystemExit(call(command))
"""


def test_an_interrupt_ends_a_command_also_where_python_drops_it():
    done = subprocess.run([sys.executable, "-c", INTERRUPTED_IN_A_CALLBACK], capture_output=True, text=True, timeout=50)
    assert done.returncode == 130 and done.stderr == "\nInterrupted.\n" and done.stdout == "so far\n"


def test_a_run_whose_log_is_broken_is_named_and_the_others_are_shown(here, capsys):
    for name, log in (("a", '{"step": 1}\n{"st\n{"step": 3}\n'), ("b", "")):
        (here / "runs" / name).mkdir(parents=True)
        (here / "runs" / name / "config.yaml").write_text("")
        (here / "runs" / name / "metrics.jsonl").write_text(log)
    assert cli.main(["runs"]) == 2
    out, err = capsys.readouterr()
    assert "runs/a/metrics.jsonl:2 is not JSON" in err and "\nb " in out and "\na " not in out


def test_training_needs_a_config(capsys):
    assert "Give a config, such as configs/quickstart.yaml." in message_of(capsys, ["train"])


def test_the_resolved_config_can_be_printed(capsys):
    assert cli.main(["train", TINY, "--print-config", "--model.num_layers=7"]) == 0
    out = capsys.readouterr().out
    assert "num_layers: 7 " in out and "# --model.num_layers" in out and "tiny.yaml:" in out


def test_a_dry_run_tells_what_a_run_needs_and_writes_nothing(tmp_path, capsys):
    words = ["train", TINY, "--dry-run", f"--run.folder={tmp_path}", "--training.ema_decay=0.99"]
    assert cli.main(words) == 0
    out, err = capsys.readouterr()
    what_takes_long = "compiling the training step.*is ready after .* s\n.*compiling its gradient in three ways"
    assert re.search(what_takes_long, err, re.DOTALL)
    assert "parameters 140 kB, optimizer 280 kB, running mean 140 kB" in out
    assert "with jax.checkpoint" in out and "of temporary bytes in all" in out
    assert list(tmp_path.iterdir()) == []


def test_a_plan_fits_its_budget_and_the_smallest_budget_is_told(tmp_path, capsys):
    assert cli.main(["plan", TINY, "--budget=100kB"]) == 2
    err = capsys.readouterr().err
    least = re.search(r"error: Nothing fits into 100 kB: .* Give a budget of (\d+MB), or a smaller", err)
    assert least and "Traceback" not in err
    plot = tmp_path / "plan.png"
    assert cli.main(["plan", TINY, f"--budget={least[1]}", "--json", f"--plot={plot}"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["chosen"]["compiled"] and found["chosen"]["bytes"] <= found["budget"] == int(least[1][:-2]) * 10**6
    assert plot.stat().st_size > 10_000
    overrides = [f"--{name}={value}" for name, value in found["settings"].items()]
    config = load(experiment.RunConfig, [TINY], overrides)
    assert config.memory.plan == found["chosen"]["plan"]
    assert cli.main(["plan", TINY, "--budget=balanced"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^> .*compiled", out, re.M) and "--memory.plan=" in out
    assert cli.main(["plan", TINY, f"--budget={least[1]}", "--time"]) == 0
    out = capsys.readouterr().out
    timed = re.findall(r"^(.).* compiled +[\d.]+ +([\d.e-]+) s$", out, re.M)
    assert f"timed        {len(timed)} of them" in out
    assert [float(s) for mark, s in timed if mark == ">"] == [min(float(s) for _, s in timed)]


@pytest.mark.slow
@pytest.mark.parametrize("what, field", experiment.SIZES.items())
def test_the_longest_context_the_deepest_model_and_the_largest_batch_for_a_budget(capsys, what, field):
    learned = "--model.positions=learned"  # which end with the context
    words = ["plan", TINY, learned, f"--maximize={what}", "--budget=12MB", "--hardware=h100"]
    assert cli.main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["chosen"]["compiled"] and 11e6 < found["chosen"]["bytes"] <= found["budget"] == 12_000_000
    overrides = [learned, *(f"--{name}={value}" for name, value in found["settings"].items())]
    config = load(experiment.RunConfig, [TINY], overrides)
    assert getattr(getattr(config, field.partition(".")[0]), field.partition(".")[2]) == int(found["settings"][field])


def test_what_cannot_be_maximized_is_one_message(capsys):
    assert "There is no size 'depth'." in message_of(capsys, ["plan", TINY, "--maximize=depth", "--budget=1GB"])
    assert "needs a budget in bytes" in message_of(capsys, ["plan", TINY, "--maximize=batch", "--budget=balanced"])
    assert "There is no option --buget. Did you mean '--budget'?" in message_of(capsys, ["plan", TINY, "--buget=1GB"])
    assert "--time takes no value" in message_of(capsys, ["plan", TINY, "--time=3"])
    assert "no others to time" in message_of(capsys, ["plan", TINY, "--time", "--budget=aggressive"])
    assert "There is no option --tim. Did you mean '--time'?" in message_of(capsys, ["profile", TINY, "--tim"])
    assert "--time is for one size" in message_of(capsys, ["plan", TINY, "--maximize=batch", "--time"])
    assert "timed on the device that is here" in message_of(capsys, ["plan", TINY, "--time", "--hardware=h200"])
    assert "There is no hardware 'h20'. Did you mean 'h200'" in message_of(capsys, ["plan", TINY, "--hardware=h20"])
    assert cli.main(["plan", TINY, "--maximize=layers", "--budget=50kB"]) == 2
    assert "\nerror: Nothing fits into 50 kB: the least" in capsys.readouterr().err


@pytest.mark.parametrize("budget", ["40gigs", "-1GB", "0", "most"])
def test_a_budget_that_is_none_is_one_message(capsys, budget):
    assert f"The budget {budget!r}: Bytes" in message_of(capsys, ["plan", TINY, f"--budget={budget}"])


def test_a_budget_without_a_unit_is_asked_for_one(capsys):
    assert "The budget '40': 40 bytes are meant? It has no unit: write 40GB or 40MB." in message_of(
        capsys, ["plan", TINY, "--budget=40"]
    )


def test_a_profile_says_where_the_memory_of_a_step_goes(tmp_path, capsys):
    assert cli.main(["profile", TINY, f"--run.folder={tmp_path}"]) == 0
    out = capsys.readouterr().out
    assert "at the highest point, in the backward loop; XLA reserves" in out and "revjax/nn/flash.py:" in out
    assert re.search(r"^advice .*\n +--\S+ +-\S+ .B +1\.\d\d of the time$", out, re.M)
    folder = tmp_path / "profiles" / "tiny"
    assert (folder / "memory.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((folder / "memory.json").read_text())["temp_bytes"] > 0
    assert [path.name for path in tmp_path.iterdir()] == ["profiles"] and len(list(folder.iterdir())) == 2
    assert cli.main(["profile", TINY, f"--run.folder={tmp_path}", "--time"]) == 0
    assert re.search(r"^time .* ms a step .*\n.*forward +backward +(loss +)?rest +all", capsys.readouterr().out, re.M)
    times = json.loads((folder / "time.json").read_text())
    assert {"attention", "MLP", "loss", "optimizer"} <= times["by_category"].keys()
    assert times["by_category"]["attention"]["backward"] > 0 and "backward" not in times["by_category"]["optimizer"]
    assert (folder / "time.png").read_bytes().startswith(b"\x89PNG")
    assert "traceEvents" in json.loads(gzip.decompress((folder / "trace.json.gz").read_bytes()))
    (tmp_path / "file").write_text("")
    assert cli.main(["profile", TINY, f"--output={tmp_path}/file/x"]) == 2
    assert "Cannot write to" in capsys.readouterr().err
    assert cli.main(["profile", TINY, f"--output={tmp_path}/new", "--data.source=no/such/place"]) == 2
    assert not (tmp_path / "new").exists()


@pytest.mark.optimized
def test_the_doctor_says_what_is_there_and_what_does_harm(capsys):
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "every stream rebuilt to the bit" in out and "problems     none found" in out
    assert all(name in out for name in ("jaxlib", "cpu:0", "cores", "xla: ", "; at most 4,295 MB", "may be deleted"))
    assert re.search(r"\nproducts     [\d,]+ GFLOP/s in bfloat16, [\d,]+ GFLOP/s in float32", out)
    assert _extra("no-such-package", "data") == "no-such-package is not there: pip install -e '.[data]'"
    flags = {"XLA_FLAGS": "--xla_cpu_enable_fast_math=true", "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.9"}
    assert [problem.split(" ")[0] for problem in known_problems(flags)] == [*flags]
    assert known_problems({}) == []
    jax.config.update("jax_disable_most_optimizations", True)  # each test sets it anew
    assert ["tanh" in problem for problem in known_problems({})] == [True]


def test_the_doctor_tells_by_its_exit_code_that_a_model_is_not_exact(capsys, monkeypatch):
    monkeypatch.setattr(Report, "describe", lambda report, model: "Layer 3 was not rebuilt.")
    assert cli.main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "exact        no: see below" in out and "A small model is not exact here: Layer 3 was not rebuilt." in out


def test_a_script_named_like_a_module_of_python_does_not_hide_it():
    code = "import cProfile, profile; assert profile.Profile and cProfile.run"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT / "scripts", check=True)


def test_a_log_for_machines_is_one_json_object_a_line(tmp_path, capfd):
    words = ["train", TINY, f"--run.folder={tmp_path}", "--training.steps=2", "--log-format=json"]
    assert cli.main(words) == 0
    lines = [json.loads(line) for line in capfd.readouterr().err.splitlines()]
    assert {"time", "level", "message"} <= set(lines[0]) and any("bits_per_byte" in line for line in lines)


def test_every_script_calls_its_command():
    for name in ("train", "generate", "evaluate", "export", "convert", "tokenizer", "runs", "check", "benchmark"):
        text = (ROOT / "scripts" / f"{name}.py").read_text()
        assert f"from revjax.cli.{name} import {name}" in text and f"call({name})" in text


@pytest.mark.parametrize("faults, code", [([], 0), (["Block returns x + f(x)."], 1)])
def test_check_tells_by_its_exit_code(capsys, monkeypatch, faults, code):
    report = CheckReport(faults=faults, notes=[], rows=[], gradient_error=0.0, difference_error=0.0)
    monkeypatch.setattr(experiment, "check_model", lambda config: report)
    assert cli.main(["check", TINY]) == code
    assert capsys.readouterr().out.strip() == str(report).strip()


@pytest.mark.slow
@pytest.mark.optimized
@pytest.mark.parametrize("name", ["tiny", "digits", "denoise-text"])  # tokens, images, and two texts
def test_a_shipped_model_passes_its_check(capsys, name):
    small = ["--model.d_model=32", "--model.num_layers=2", "--model.num_heads=2"]
    assert cli.main(["check", str(ROOT / "configs" / f"{name}.yaml"), *small]) == 0
    said = capsys.readouterr()
    assert "verdict: exact; safe to train" in said.out and "check 4 of 4" in said.err


def test_ctrl_c_leaves_a_checkpoint_that_generates(tmp_path, capsys):
    """A process of its own: the signal goes to whoever runs the script."""
    command = [sys.executable, str(ROOT / "scripts" / "train.py"), TINY, "--training.steps=1000000"]
    environ = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    with subprocess.Popen(
        command, cwd=tmp_path, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        metrics, deadline = tmp_path / "runs" / "tiny" / "metrics.jsonl", time.monotonic() + 300
        while time.monotonic() < deadline and process.poll() is None:
            if metrics.exists() and metrics.read_bytes().count(b"\n") > 3:
                process.send_signal(signal.SIGINT)
                break
            time.sleep(0.1)
        out, err = (text.decode() for text in process.communicate(timeout=120))
    assert process.returncode == 130, err
    assert "Traceback" not in err and "SIGINT: ending after this step, with a checkpoint" in err
    assert "35,008 parameters" in out and "with jax.checkpoint" in out and "interrupted after step" in out
    assert experiment.load_run(tmp_path / "runs" / "tiny").model.config.d_model == 32
    assert cli.main(["generate", str(tmp_path / "runs" / "tiny"), "--prompt=def ", "--max_new_tokens=4"]) == 0
    assert capsys.readouterr().out.startswith("def ")


def test_only_a_terminal_gets_control_characters_as_escapes(monkeypatch):
    text = "def f():\n\t\x1b[2J\x08\x07é\x9b\x7f\r"
    assert visible(text) == "def f():\n\t\\x1b[2J\\x08\\x07é\\x9b\\x7f\\x0d"
    controller, terminal = os.openpty()
    with open(terminal, "w") as out, os.fdopen(controller, "rb"):
        monkeypatch.setattr("sys.stdout", out)
        assert shown(text) == visible(text)
    with open(os.devnull, "w") as out:
        monkeypatch.setattr("sys.stdout", out)
        assert shown(text) == text


@pytest.mark.slow
def test_a_model_that_writes_control_characters_does_not_garble_a_terminal(tmp_path):
    """A run whose prompt has one stands for a model that writes one."""
    words = [TINY, f"--run.folder={tmp_path}", "--training.steps=1", "--training.sample_prompt=a\x1b[2J"]
    environ = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    for command in (["train", *words], ["generate", f"{tmp_path}/tiny", "--prompt=a\x1b[2J", "--max_new_tokens=4"]):
        controller, terminal = os.openpty()
        command = [sys.executable, str(ROOT / "scripts" / f"{command[0]}.py"), *command[1:]]
        with subprocess.Popen(command, env=environ, stdout=terminal, stderr=subprocess.DEVNULL) as process:
            os.close(terminal)
            out = _all_of(controller)
        assert process.returncode == 0 and b"a\\x1b[2J" in out and b"\x1b" not in out
    piped = subprocess.run(command, env=environ, capture_output=True)
    assert b"a\x1b[2J" in piped.stdout


def _all_of(controller):
    """What comes out of a terminal until nobody writes to it."""
    out = b""
    with os.fdopen(controller, "rb", buffering=0) as file, contextlib.suppress(OSError):  # the end, on Linux
        while piece := file.read(4096):
            out += piece
    return out


def test_a_tokenizer_is_trained_and_nothing_is_overwritten(here, capsys):
    (here / "notes").mkdir()
    (here / "notes" / "a.txt").write_text("".join(f"{i} squared is {i * i}.\n" for i in range(300)))
    assert cli.main(["tokenizer", "train", "notes", "--vocab_size=300", "--output=t.json"]) == 0
    assert "--data.tokenizer=t.json --model.vocab_size=300" in capsys.readouterr().out
    trained = (here / "t.json").read_bytes()
    assert FileTokenizer(here / "t.json").vocab_size == 300 and {p.name for p in here.iterdir()} == {"notes", "t.json"}
    for words, message in (
        (["train", "notes", "--output=t.json"], "t.json is there already"),
        (["train", "nowhere"], "no file or folder 'nowhere'"),
        (["train", "notes", "--vocab_size=300", "--output=no/such/place.json"], "Cannot write no/such/place.json"),
        (["notes"], "Expected 'train', but got notes"),
        (["train"], "Expected one name, but got none"),
        (["train", "notes", "--vocab_size=9000"], "gives only"),
    ):
        assert message in message_of(capsys, ["tokenizer", *words])
    assert (here / "t.json").read_bytes() == trained
