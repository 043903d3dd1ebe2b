"""Configs are read strictly, from files, environment and command line in that order, and mistakes are located."""

import dataclasses
import math
import pathlib
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from revjax.config import dump, help_text, load, load_with_provenance
from revjax.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """A decoder."""

    d_model: int = 8  # width of the streams
    num_heads: int = 2
    num_layers: int = 4
    coupling: Literal["revnet", "midpoint"] = "revnet"

    def __post_init__(self):
        if self.d_model % self.num_heads:
            raise ValueError(f"num_heads must divide d_model, but got {self.num_heads} and {self.d_model}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimizer:
    learning_rate: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float | None = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    name: str = "run"
    model: Model = Model(num_layers=6)  # the section's own default, which is not the class's
    optimizer: Optimizer = dataclasses.field(default_factory=Optimizer)
    teacher: Model | None = None
    mesh: tuple[int, ...] = ()
    tags: list[str] = dataclasses.field(default_factory=list)
    folder: pathlib.Path | None = None
    resume: bool = False
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)
    stages: dict[str, Model] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Required:
    model: Model
    steps: int


def run(path=(), *overrides, **environ):
    return load(Run, path, overrides, environ)


@pytest.fixture
def write(tmp_path):
    def write(text, name="a.yaml"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text) if isinstance(text, bytes) else path.write_text(text)
        return path

    return write


# Values and where they come from.


def test_nothing_gives_the_defaults():
    assert run() == Run()


def test_a_section_keeps_its_own_defaults(write):
    assert run(write("model: {d_model: 16}")).model == Model(d_model=16, num_layers=6)


def test_later_and_closer_wins(write):
    write("{name: base, model: {num_layers: 1, d_model: 2}, optimizer: {learning_rate: 1}}", "base.yaml")
    a = write("{base: base.yaml, name: a, model: {num_layers: 2}}")
    b = write("{model: {num_layers: 3}}", "b.yaml")
    env = {"REVJAX__MODEL__NUM_LAYERS": "4"}
    layers = lambda *args: load(Run, *args).model.num_layers
    assert (layers(a, (), {}), layers([a, b], (), {}), layers([b, a], (), {})) == (2, 3, 2)
    assert layers([a, b], (), env) == 4
    assert layers([a, b], ["--model.num_layers=5"], env) == 5
    assert layers([a, b], ["--model.num_layers=5", "--model.num_layers", "6"], env) == 6
    assert run(a) == Run(name="a", model=Model(num_layers=2, d_model=2), optimizer=Optimizer(learning_rate=1.0))


def test_bases_are_relative_to_their_file_and_the_last_wins(write):
    write("{base: ../low.yaml, mesh: [1, 2]}", "sub/high.yaml")
    write("{name: low, mesh: [8], tags: [low]}", "low.yaml")
    write("name: other", "other.yaml")
    assert run(write("base: [sub/high.yaml, other.yaml]")) == Run(name="other", mesh=(1, 2), tags=["low"])


def test_provenance_names_the_place_of_every_value(write):
    path = write("name: a\nmodel:\n  d_model: 16\nmetrics: {loss: 1}")
    environ = {"REVJAX__RESUME": "true"}
    loaded = load_with_provenance(Run, path, ["--model.num_heads=4"], environ)
    expected = {
        "name": f"{path}:1",
        "model.d_model": f"{path}:3",
        "model.num_heads": "--model.num_heads",
        "model.num_layers": "default",
        "metrics.loss": f"{path}:4",
        "resume": "REVJAX__RESUME",
    }
    assert {k: loaded.provenance[k] for k in expected} == expected
    assert loaded.config.model.num_heads == 4


def test_a_config_is_described_as_yaml_with_the_place_of_every_value(write):
    path = write("model:\n  d_model: 64\n")
    loaded = load_with_provenance(Run, path, ["--model.num_heads=4"], {})
    text = loaded.describe()
    assert "  d_model: 64" in text and f"# {path}:2" in text and "# --model.num_heads" in text and "# default" in text
    assert load(Run, write(text, "b.yaml"), environ={}) == loaded.config


@pytest.mark.parametrize(
    "text, number",
    [("1e-3", 1e-3), ("1E5", 1e5), (".5", 0.5), ("-2", -2.0), ("1_000", 1000.0), ("0x10", 16.0), ("+3.", 3.0)],
)
def test_numbers_are_numbers(write, text, number):
    learning_rate = run(write(f"optimizer: {{learning_rate: {text}}}")).optimizer.learning_rate
    assert learning_rate == number and type(learning_rate) is float


@pytest.mark.parametrize("text", ["no", "on", "12:30", "2026-01-01", "0o7x", "1e", "<<", "e5", "'1e-3'"])
def test_what_yaml_1_1_takes_for_something_else_is_a_string(write, text):
    assert run(write(f"name: {text}")).name == text.strip("'")


def test_infinity_and_nan_are_floats(write):
    assert run(write("optimizer: {learning_rate: -.inf}")).optimizer.learning_rate == -math.inf
    assert math.isnan(run(write("optimizer: {learning_rate: .nan}")).optimizer.learning_rate)


@pytest.mark.parametrize(
    "words, expected",
    [
        (["--name=1e-3"], Run(name="1e-3")),
        (["--name", "a: b # c"], Run(name="a: b # c")),
        (["--name="], Run(name="")),
        (["--folder=null"], Run(folder=None)),
        (["--folder=runs/1"], Run(folder=pathlib.Path("runs/1"))),
        (["--mesh=2,4"], Run(mesh=(2, 4))),
        (["--mesh", "[2, 4]"], Run(mesh=(2, 4))),
        (["--mesh=2"], Run(mesh=(2,))),
        (["--mesh="], Run(mesh=())),
        (["--tags=1e-3,true"], Run(tags=["1e-3", "true"])),
        (["--optimizer.learning-rate", "-1e-3"], Run(optimizer=Optimizer(learning_rate=-1e-3))),
        (["--optimizer.clip=None"], Run(optimizer=Optimizer(clip=None))),
        (["--metrics.loss=2"], Run(metrics={"loss": 2.0})),
        (["--teacher.d_model=4"], Run(teacher=Model(d_model=4))),
        (["--stages.first.d_model=4"], Run(stages={"first": Model(d_model=4)})),
        (["--model={d_model: 4}", "--model.num_heads=1"], Run(model=Model(d_model=4, num_heads=1, num_layers=6))),
    ],
)
def test_the_command_line_reads_as_it_looks(words, expected):
    assert run((), *words) == expected


def test_an_empty_file_sets_nothing(write):
    assert run(write("")) == run(write("# only a comment")) == Run()


# Mistakes.


@pytest.mark.parametrize(
    "text, message",
    [
        (
            "model:\n  num_layer: 3",
            "a.yaml:2: unknown field 'model.num_layer'. Did you mean 'num_layers'? Known fields",
        ),
        (
            "modle: {}",
            "a.yaml:1: unknown field 'modle'. Did you mean 'model'? Known fields of the config: folder, mesh",
        ),
        ("zzz: 1", "a.yaml:1: unknown field 'zzz'. Known fields"),
        ("\n\nmodel: {num_layers: six}", "a.yaml:3: model.num_layers must be int, but got 'six' (str)."),
        ("model: {num_layers: true}", "model.num_layers must be int, but got True (bool)."),
        ("model: {num_layers: 1e3}", "model.num_layers must be int, but got 1000.0 (float). Write 1000."),
        ("model: {num_layers: 1.5}", "model.num_layers must be int, but got 1.5 (float)."),
        ("model: {num_layers: null}", "model.num_layers must be int, but got None."),
        ("model: 3", "a.yaml:1: model must be a mapping (Model), but got 3 (int)."),
        ("name: 3", "name must be str, but got 3 (int). Put it in quotes."),
        ("resume: 1", "resume must be bool, but got 1 (int)."),
        ("optimizer: {learning_rate: false}", "optimizer.learning_rate must be float, but got False (bool)."),
        ("optimizer: {clip: big}", "optimizer.clip must be float | None, but got 'big' (str)."),
        ("optimizer: {betas: [0.9]}", "optimizer.betas must be tuple[float, float], 2 values, but got [0.9] (list)."),
        ("optimizer: {learning_rate: 1" + "0" * 400 + "}", "learning_rate must be float"),
        ("mesh: [1, two]", "mesh[1] must be int, but got 'two' (str)."),
        ("mesh: 3", "mesh must be tuple[int, ...], but got 3 (int)."),
        ("metrics: [1]", "metrics must be dict[str, float], but got [1] (list)."),
        ("metrics: {a: b}", "metrics.a must be float, but got 'b' (str)."),
        ("teacher: {d_model: x}", "teacher.d_model must be int, but got 'x'"),
        (
            "model: {coupling: revnt}",
            "model.coupling must be 'revnet' | 'midpoint', but got 'revnt' (str). Did you mean 'revnet'?",
        ),
        ("model:\n  d_model: 7\n  num_heads: 2", "a.yaml:2, {dir}/a.yaml:3: model: num_heads must divide d_model"),
        (
            "model:\n  num_layers: 2\n  d_model: 7",
            "error: {dir}/a.yaml:3: model: num_heads must divide d_model, but got 2 and 7.",
        ),
        ("stages: {x: {d_model: 7}}", "a.yaml:1: stages.x: num_heads must divide d_model"),
    ],
)
def test_a_wrong_field_or_value_is_located(write, text, message):
    path = write(text)
    with pytest.raises(ConfigError) as error:
        run(path)
    assert message.replace("{dir}", str(path.parent)) in f"error: {error.value}"
    assert str(path) in str(error.value)
    assert len(str(error.value)) < 600


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pair:
    low: int = 0
    high: int = 1

    def __post_init__(self):
        if self.low >= self.high:
            raise ValueError("They must be in order.")


def test_an_error_that_names_no_field_names_every_place(write):
    path = write("high: 1")
    with pytest.raises(ConfigError) as error:
        load(Pair, path, ["--low=3"], environ={})
    assert str(error.value) == f"{path}:1, --low: They must be in order."


@pytest.mark.parametrize(
    "text, message",
    [
        ("name: a\nname: b", "a.yaml:2: the key 'name' is written twice, first at {path}:1"),
        ("model: {d_model: 1, d_model: 2}", "a.yaml:1: the key 'd_model' is written twice"),
        ("name: &x a\ntags: [*x]", "a.yaml:1: not valid YAML, column 7: anchors and aliases are not supported"),
        ("name: *.txt", "must be in quotes"),
        ("name: !!python/object/apply:os.system [true]", "a.yaml:1: the tag"),
        ("mesh: !!set {a, b}", "a.yaml:1: the tag"),
        ("name: !!int x", "a.yaml:1: 'x' is not a valid int"),
        ("a: 1\n---\nb: 2", "a.yaml:2: not valid YAML, column 1"),
        ("name: [1, 2", "a.yaml:1: not valid YAML"),
        ("\tname: a", "a.yaml:1: not valid YAML, column 1"),
        ("- name", "a.yaml:1: a config file must be a mapping"),
        ("1: a", "a.yaml:1: a key must be a string, but got 1"),
        ("base: 3", "a.yaml:1: `base` must be a file name or a list of them, but got 3"),
        ("base: {a: b}", "`base` must be a file name"),
        ("base: b.yaml", "a.yaml: `base:` asks for it: no config file"),
        ("base: a.yaml", "`base:` goes in a circle: {path} -> {path}"),
        ("name: " + "[" * 5000, "a.yaml"),
        (b"\xff\xfe\x00\x01\x02", "a.yaml"),
        (b"name: \x00", "not valid YAML"),
    ],
)
def test_a_bad_file_is_located(write, text, message):
    path = write(text)
    with pytest.raises(ConfigError) as error:
        run(path)
    assert message.format(path=path) in str(error.value)


def test_an_alias_bomb_is_refused_at_its_first_anchor(write):
    lines = ["a0: &a0 [x, x]"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    with pytest.raises(ConfigError, match="a.yaml:1: .*aliases are not supported"):
        run(write("\n".join(lines)))


def test_a_circle_of_bases_is_shown(write):
    write("base: b.yaml", "c.yaml")
    write("base: c.yaml", "b.yaml")
    with pytest.raises(ConfigError, match=r"circle: .*a.yaml -> .*b.yaml -> .*c.yaml -> .*b.yaml"):
        run(write("base: b.yaml"))


def test_two_bases_may_share_a_base(write):
    write("name: low", "low.yaml")
    for name in ("b.yaml", "c.yaml"):
        write("base: low.yaml", name)
    assert run(write("base: [b.yaml, c.yaml]")).name == "low"


def test_a_missing_file_suggests_the_nearest(write, tmp_path):
    write("", "small.yaml")
    with pytest.raises(ConfigError, match=r"no config file .*smal.yaml. Did you mean 'small.yaml'\?"):
        run(tmp_path / "smal.yaml")
    with pytest.raises(ConfigError, match="cannot read"):
        run(tmp_path)


@pytest.mark.parametrize(
    "words, message",
    [
        (["--model.num_layer=3"], "--model.num_layer: unknown field 'model.num_layer'. Did you mean 'num_layers'?"),
        (["--model.num_layers=x"], "--model.num_layers must be int, but got 'x' (str)."),
        (["--model.num-layers=x"], "--model.num-layers must be int, but got 'x' (str)."),
        (["--resume"], "--resume needs a value: write --resume=VALUE (for a switch, --resume=true)."),
        (["--resume", "--name=a"], "--resume needs a value"),
        (["small.yaml"], "Unexpected argument 'small.yaml'"),
        (["-x"], "Unexpected argument '-x'"),
        (["--"], "Unexpected argument '--'"),
        (["--model..d_model=3"], "--model..d_model is not the name of a field"),
        (["--=3"], "-- is not the name of a field"),
        (["--mesh=a,b"], "--mesh: mesh[0] must be int, but got 'a' (str)."),
        (["--mesh=[1"], "--mesh: "),
        (["--model=3"], "--model must be a mapping"),
        (["--model.d_model=7"], "--model.d_model: model: num_heads must divide d_model"),
    ],
)
def test_a_wrong_argument_is_named(words, message):
    with pytest.raises(ConfigError) as error:
        run((), *words)
    assert message in str(error.value)


def test_a_wrong_environment_variable_is_named():
    with pytest.raises(ConfigError, match="REVJAX__MODEL__NUM_LAYER: unknown field 'model.num_layer'.*num_layers"):
        run(REVJAX__MODEL__NUM_LAYER="3")
    assert run(REVJAX_LOG="debug", PATH="/bin") == Run()


def test_a_required_field_says_how_to_set_it(write):
    with pytest.raises(ConfigError, match=r"a.yaml: steps is required \(int\).*--steps=\.\.\."):
        load(Required, write("model: {}"), environ={})
    assert load(Required, overrides=["--steps=3"], environ={}) == Required(model=Model(), steps=3)


def test_a_field_type_that_cannot_be_read_is_the_programs_fault():
    bad = dataclasses.make_dataclass("Bad", [("x", complex, 0j)])
    with pytest.raises(TypeError, match="cannot have the type"):
        load(bad, overrides=["--x=1"], environ={})


# Writing, and help.

names = st.text(st.characters(codec="utf-8"), min_size=1)
models = st.builds(
    Model,
    d_model=st.integers(1, 10**6).map(lambda n: 2 * n),
    num_layers=st.integers(),
    coupling=st.sampled_from(["revnet", "midpoint"]),
)
floats = st.floats(allow_nan=False)
runs = st.builds(
    Run,
    name=st.one_of(
        st.text(), st.sampled_from(["1e-3", "null", "true", "no", "~", "- a", "a: b", " x", "#", "*a", "0x1"])
    ),
    model=models,
    optimizer=st.builds(Optimizer, learning_rate=floats, betas=st.tuples(floats, floats), clip=st.none() | floats),
    teacher=st.none() | models,
    mesh=st.lists(st.integers()).map(tuple),
    tags=st.lists(st.text()),
    folder=st.none() | st.sampled_from(["a/b", "/", "1"]).map(pathlib.Path),
    resume=st.booleans(),
    metrics=st.dictionaries(names, floats),
    stages=st.dictionaries(names, models, max_size=2),
)


@settings(deadline=None)  # which a busy machine would miss
@given(runs)
def test_what_is_dumped_loads_to_an_equal_config(tmp_path_factory, config):
    path = tmp_path_factory.getbasetemp() / "dumped.yaml"
    path.write_text(dump(config), encoding="utf-8")
    assert run(path) == config


@settings(deadline=None)
@given(st.text() | st.binary())
def test_any_file_loads_or_is_a_config_error(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    try:
        run(path)
    except ConfigError as e:
        assert "any.yaml" in str(e)


def test_help_shows_types_comments_and_defaults():
    text = help_text(Run, prog="revjax train", description="revjax train [CONFIG.yaml]\n\nTrains.")
    assert text.startswith("usage: revjax train [CONFIG.yaml]\n\nTrains.\n\nEach field can be set by")
    assert "--model.num_layers INT" in text and "width of the streams" in text and "(default: 6)" in text
    assert "--model.coupling revnet|midpoint" in text


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cat:
    kind: Literal["cat"] = "cat"
    lives: int = 9


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dog:
    kind: Literal["dog"] = "dog"
    tricks: int = 0  # that it knows


@dataclasses.dataclass(frozen=True, kw_only=True)
class Owner:
    pet: Cat | Dog = Cat(lives=7)


def test_one_of_several_sections_is_told_by_its_tag(tmp_path):
    owner = lambda *words: load(Owner, (), words, {}).pet
    assert owner() == Cat(lives=7) and owner("--pet.lives=3") == Cat(lives=3)
    assert owner("--pet.kind=dog") == Dog() and owner("--pet.kind=dog", "--pet.tricks=2") == Dog(tricks=2)
    assert owner("--pet.kind=cat") == Cat(lives=7)
    path = tmp_path / "owner.yaml"
    path.write_text(dump(Owner(pet=Dog(tricks=5))))
    assert load(Owner, path, [], {}).pet == Dog(tricks=5)


@pytest.mark.parametrize(
    "words, message",
    [
        (["--pet.kind=dgo"], "--pet.kind must be 'cat' | 'dog', but got 'dgo' (str). Did you mean 'dog'?"),
        (["--pet.tricks=1"], "--pet.tricks: unknown field 'pet.tricks'. Known fields of pet: kind, lives."),
        (["--pet.kind=dog", "--pet.tricks=x"], "--pet.tricks must be int, but got 'x' (str)."),
        (
            ["--tricks=1"],
            "--tricks: unknown field 'tricks'. Did you mean 'pet.tricks'? Known fields of the config: pet.",
        ),
    ],
)
def test_mistakes_in_one_of_several_sections_are_located(words, message):
    with pytest.raises(ConfigError) as error:
        load(Owner, (), words, {})
    assert str(error.value).startswith(message)


def test_help_shows_the_section_that_is_chosen():
    given = dict(prog="x", description="x")
    text, of_dog = help_text(Owner, **given), help_text(Owner, **given, default=Owner(pet=Dog(tricks=4)))
    assert "--pet.lives" in text and "(default: 7)" in text and "--pet.tricks" not in text
    assert "--pet.tricks" in of_dog and "that it knows (default: 4)" in of_dog and "--pet.lives" not in of_dog
