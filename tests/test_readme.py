"""The README tells the truth: its Python runs, its files exist."""

import pathlib
import re
import shlex

import pytest

README = pathlib.Path(__file__).parent.parent / "README.md"
GUIDE = README.parent / "docs" / "your-own-model.md"


def blocks(language, page=README):
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)


def test_the_python_of_the_readme_runs(capsys):
    *own_block, without_nnx, language_model = blocks("python")
    for code in ("\n".join(own_block), without_nnx, language_model):  # the last two stand alone
        exec(compile(code, str(README), "exec"), {"__name__": "readme"})
    assert "exact; safe to train" in capsys.readouterr().out


@pytest.mark.slow
def test_the_python_of_the_guide_runs_as_one_script(capsys):
    code = "\n".join(blocks("python", GUIDE))
    exec(compile(code, str(GUIDE), "exec"), {"__name__": "guide"})
    out = capsys.readouterr().out
    assert "exact; safe to train" in out
    shallow, deep = map(float, re.search(r"plan nothing: (\S+) kB with 8 layers, (\S+) kB", out).groups())
    # Of a layer remain keys, counts and checksums of four rows, 0.06 kB for each branch; one stream of it is 12 kB.
    assert deep - shallow <= 0.15 * (64 - 8)
    same, near, other = (float(off) for off in re.findall(r"off by (\S+)", out))
    assert same < 0.01 < near < 0.5 * other  # the ordinary network, in bf16 as it is and compiled; near it; another


def test_every_file_in_its_commands_exists():
    words = [word for block in blocks("sh") for word in shlex.split(block)]
    files = [word for word in words if word.endswith((".py", ".yaml"))]
    assert "scripts/train.py" in files and "configs/quickstart.yaml" in files
    missing = [file for file in files if not (README.parent / file).exists()]
    assert not missing
