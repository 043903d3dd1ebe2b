"""The layers of revjax, read from its own imports (no third-party linter needed)."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1]

# Lowest first. A module may import from lines above its own, and from its own subpackage.
# Names on one line are siblings: they may not import one another.
LAYERS = [
    {"errors"},  # below the other leaf modules: config and data raise its exceptions
    {"logging", "config", "sharding"},
    {"core", "nn"},
    {"models", "checkpoint"},
    {"memory", "data"},
    {"training", "conversion", "generation"},
    {"experiment"},
    {"serving", "benchmarking"},
    {"cli"},
]
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}


def modules(package: pathlib.Path) -> dict[pathlib.Path, str]:
    """Every source file below the top level of `package`, with the first-level name that it belongs to.

    `package/__init__.py` and `package/__main__.py` stand above all layers, and are left out.
    """
    paths = sorted(package.rglob("*.py"))
    assert paths, f"no Python files under {package}"
    names = {p: p.relative_to(package).with_suffix("").parts[0] for p in paths}
    return {p: name for p, name in names.items() if name not in ("__init__", "__main__")}


def imports(path: pathlib.Path, package: pathlib.Path) -> dict[str, int]:
    """First-level names of `package` that the file at `path` imports, absolutely or relatively, with a line.

    The package itself (`import revjax`, `from revjax import reversible_scan`) is the name "".
    """
    parts = (package.name, *path.relative_to(package).with_suffix("").parts)
    found = {}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(parts[: -node.level]) if node.level else ""
            module = ".".join(filter(None, [base, node.module]))
            targets = [f"{module}.{alias.name}" for alias in node.names]
        else:
            continue
        for target in targets:
            first, _, rest = target.partition(".")
            if first == package.name:
                name = rest.partition(".")[0]
                is_module = (package / name).is_dir() or (package / f"{name}.py").is_file()
                found.setdefault(name if name and is_module else "", node.lineno)
    return found


def unplaced(package: pathlib.Path) -> list[str]:
    return [
        f"{package.name}.{name} has no place: add {name!r} to LAYERS in tests/test_architecture.py, "
        "on a line above whatever it is imported by and below whatever it imports"
        for name in sorted(set(modules(package).values()) - set(RANK))
    ]


def wrong_imports(package: pathlib.Path) -> list[str]:
    wrong = []
    for path, here in modules(package).items():
        for there, line in imports(path, package).items():
            at = f"{path.relative_to(package.parent)}:{line}"
            if not there:
                wrong.append(f"{at} imports the top of {package.name}: import from the module that defines the name")
            elif there != here and RANK.get(there, 99) >= RANK.get(here, 99):
                relation = "a sibling of" if RANK.get(there) == RANK.get(here) else "not below"
                wrong.append(f"{at} imports {package.name}.{there}, which is {relation} {here!r} in LAYERS")
    return wrong


def test_every_module_has_a_place():
    assert not unplaced(ROOT / "revjax"), "\n".join(unplaced(ROOT / "revjax"))


def test_imports_point_down():
    assert not wrong_imports(ROOT / "revjax"), "\n".join(wrong_imports(ROOT / "revjax"))


# The same checks, seen to fail on a planted package.


@pytest.fixture
def plant(tmp_path):
    def plant(**files):
        package = tmp_path / "planted"
        files = {"__init__": "from .core.scan import x\n", "core.scan": "x = 1\n", "models.stack": "", **files}
        for name, text in files.items():
            path = package / f"{name.replace('.', '/')}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return package

    return plant


@pytest.mark.parametrize(
    "text",
    [
        "",
        "import jax, planted_elsewhere",
        "from . import coupling",
        "from ..errors import ConfigError",
        "from planted.errors import ConfigError",
        "import planted.errors as errors",
    ],
)
def test_imports_within_a_name_and_downward_pass(plant, text):
    package = plant(**{"core.plan": text, "core.coupling": "", "errors": ""})
    assert wrong_imports(package) == [] and unplaced(package) == []


@pytest.mark.parametrize(
    "text, message",
    [
        ("from ..models import stack", "planted/core/bad.py:1 imports planted.models, which is not below 'core'"),
        ("from ..models.stack import S", "imports planted.models"),
        ("from .. import models", "imports planted.models"),
        ("import planted.models.stack", "imports planted.models"),
        ("from planted.models.stack import S", "imports planted.models"),
        ("def f():\n    from ..models import stack", "bad.py:2 imports planted.models"),
        ("from ..nn import mlp", "imports planted.nn, which is a sibling of 'core'"),
        ("from planted import x", "imports the top of planted: import from the module that defines"),
        ("import planted", "imports the top of planted"),
        ("from ..newcomer import y", "imports planted.newcomer"),
    ],
)
def test_a_planted_import_is_found(plant, text, message):
    (wrong,) = wrong_imports(plant(**{"core.bad": text, "nn.mlp": "", "newcomer": ""}))
    assert message in wrong


def test_a_planted_module_without_a_place_is_found(plant):
    (missing,) = unplaced(plant(newcomer=""))
    assert "planted.newcomer has no place: add 'newcomer' to LAYERS" in missing
