"""The README tells the truth: its Python runs, its files exist."""

import pathlib
import re
import shlex

README = pathlib.Path(__file__).parent.parent / "README.md"


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(), re.DOTALL)


def test_the_python_of_the_readme_runs(capsys):
    *own_block, without_nnx, language_model = blocks("python")
    for code in ("\n".join(own_block), without_nnx, language_model):  # the last two stand alone
        exec(compile(code, str(README), "exec"), {"__name__": "readme"})
    assert "exact; safe to train" in capsys.readouterr().out


def test_every_file_in_its_commands_exists():
    words = [word for block in blocks("sh") for word in shlex.split(block)]
    files = [word for word in words if word.endswith((".py", ".yaml"))]
    assert "scripts/train.py" in files and "configs/quickstart.yaml" in files
    missing = [file for file in files if not (README.parent / file).exists()]
    assert not missing
