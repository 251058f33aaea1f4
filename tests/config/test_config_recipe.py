"""A run is a file: read, checked, overridden by flags, saved and read again."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from groundup.config import (
    Given,
    build,
    dump_recipe,
    find_recipe,
    flatten,
    keys_of,
    parse_recipe_flags,
    read_recipe,
    recipe_files,
    save_recipe,
)
from groundup.posttraining import FinetuneRecipe
from groundup.runtime import GroundupError, UsageError
from groundup.training import PretrainRecipe

KEYS = keys_of(PretrainRecipe)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return tmp_path / "mine.yaml"


def read(path: Path, text: str | bytes) -> dict[str, Any]:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    found = read_recipe(path, PretrainRecipe)
    assert found.sources == dict.fromkeys(found.values, str(path))
    return dict(found.values)


# ---- reading


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", {}),
        ("# nothing but a comment\n", {}),
        ("---\n", {}),
        ("seed: 3\nmodel:\n  n_layer: 2\n", {"seed": 3, "model.n_layer": 2}),
        ("model:\n", {}),
        ("model: {}\noptim:\n  # learning_rate: 3\n", {}),
        ("model.n_layer: 2\n", {"model.n_layer": 2}),
        ("model:\n  n_layer: '2'\n", {"model.n_layer": 2}),
        ("model:\n  n_layer:\n  n_ff: null\nseed: null\n", {"model.n_ff": None}),
        ("optim:\n  learning_rate: 3e-4\n", {"optim.learning_rate": 3e-4}),
        ("optim: {learning_rate: 1E-3, eps: 1.e-8, beta1: .9, weight_decay: 0}",
         {"optim.learning_rate": 1e-3, "optim.eps": 1e-8, "optim.beta1": 0.9, "optim.weight_decay": 0.0}),
        ("eval_tokens: 65_536\n", {"eval_tokens": 65_536}),
        ("minutes: 5\ndepth: null\n", {"minutes": 5.0, "depth": None}),
        ("out: 2026-01-31\n", {"out": "2026-01-31"}),
        ("out: 2026-13-45\n", {"out": "2026-13-45"}),
        ("budget: 5m\n", {"budget": "5m"}),
        ("compile: yes\nresume: off\n", {"compile": True, "resume": False}),
        ("sample:\n  prompts: [\"ROMEO:\\n\", 'it''s']\n  temperatures: [0, 0.5]\n",
         {"sample.prompts": ["ROMEO:\n", "it's"], "sample.temperatures": [0.0, 0.5]}),
    ],
)  # fmt: skip
def test_a_file_is_read(text: str, expected: dict[str, Any], recipe: Path) -> None:
    found = read(recipe, text)
    assert found == expected
    for key, value in found.items():
        assert type(value) is type(expected[key]), key


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("modle:\n  n_layer: 2\n", ": unknown key modle.n_layer. Did you mean model.n_layer?"),
        ("model:\n  n_layers: 2\n", ": unknown key model.n_layers. Did you mean model.n_layer?"),
        ("learningrate: 3\n", ": unknown key learningrate. Did you mean optim.learning_rate?"),
        ("seed:\n  deeper: 3\n", ": seed = {'deeper': 3} should be a whole number."),
        ("5: 3\n", ": unknown key 5."),
        ("model:\n  n_layer: two\n", ": model.n_layer = 'two' should be a whole number."),
        ("model:\n  n_layer: 2.5\n", ": model.n_layer = 2.5 should be a whole number."),
        ("model:\n  n_layer: true\n", ": model.n_layer = True should be a whole number."),
        ("modle:\n", ": unknown key modle."),
        ("model:\n  n_layer: [2]\n", ": model.n_layer = [2] should be a whole number."),
        ("optim:\n  learning_rate: fast\n", ": optim.learning_rate = 'fast' should be a number."),
        ("optim:\n  learning_rate: .nan\n", ": optim.learning_rate = nan should be a number, and a finite one."),
        ("minutes: -.inf\n", ": minutes = -inf should be a number or null, and a finite one."),
        ("compile: maybe\n", ": compile = 'maybe' should be true or false or null."),
        ("precision: float8\n", ": precision = 'float8' should be one of auto, float32, tf32, bfloat16, float16."),
        ("out: 5\n", ": out = 5 should be text."),
        ("sample:\n  prompts: one\n",
         ": sample.prompts = 'one' should be a list of texts, such as [\"one\", \"two\"]."),
        ("sample:\n  temperatures: [0.1, .inf]\n",
         ": sample.temperatures = [0.1, inf] should be a list of numbers, such as [1, 2], and a finite one."),
        ("model: 5\n", ": model = 5 should be a section of keys, such as model.vocab_size."),
        ("model: [n_layer]\n", ": model = ['n_layer'] should be a section of keys, such as model.vocab_size."),
        ("optim: fast\n", ": optim = 'fast' should be a section of keys, such as optim.optimizer."),
        ("- a\n- b\n", ": a recipe is a mapping of keys to values, this is a list."),
        ("just words\n", ": a recipe is a mapping of keys to values, this is a str."),
        ("seed: 1\nmodel: [1, 2\nout: x\n", " line 3: not valid YAML (expected ',' or ']', but got ':')."),
        ("seed: 1\n\tout: x\n", " line 2: not valid YAML (found character '\\t' that cannot start any token)."),
        ("seed: 1\nout: x\nseed: 2\n", " line 3: not valid YAML (seed stands here twice)."),
        ("model:\n  n_head: 2\nout: x\nmodel:\n  n_layer: 2\n", " line 4: not valid YAML (model stands here twice)."),
        ("seed: !!python/object/apply:os.getcwd []\n", " line 1: not valid YAML (could not determine a constructor "),
        ("seed: 0x_\n", ": not valid YAML (invalid literal for int() with base 16: '')."),
        (b"out: caf\xe9\n", ": a recipe is UTF-8 text; byte 8 is not."),
        ("seed: 1\0\n", ": not valid YAML "),
    ],
)  # fmt: skip
def test_a_wrong_file_is_one_line_with_its_name(text: str | bytes, message: str, recipe: Path) -> None:
    with pytest.raises(UsageError) as raised:
        read(recipe, text)
    assert str(raised.value).startswith(f"{recipe}{message}")
    assert "\n" not in str(raised.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(GroundupError, match=f"cannot read the recipe {tmp_path}: this is a folder"):
        read_recipe(tmp_path, PretrainRecipe)


# ---- finding


def test_every_recipe_that_comes_with_groundup_is_valid(root: Path) -> None:
    files = recipe_files()
    assert set(files) == {path.stem for path in (root / "recipes").glob("*.yaml")} >= {"demo", "shakespeare"}
    kinds: dict[type, dict[str, Path]] = {cls: recipe_files(cls) for cls in (PretrainRecipe, FinetuneRecipe)}
    assert sorted(name for kind in kinds.values() for name in kind) == sorted(files)  # each is of one kind
    assert set(kinds[FinetuneRecipe]) == {"sft-demo", "classify-spam"}
    for cls, of_kind in kinds.items():
        for path in of_kind.values():
            given_ = read_recipe(path, cls)
            assert given_.values
            build(cls, given_.values, given_.sources)
    with pytest.raises(UsageError, match=r"sft-demo: no such recipe\..* Recipes that come with groundup: demo, "):
        find_recipe("sft-demo", PretrainRecipe)


def test_a_recipe_is_found_by_name_and_by_path(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(recipe.parent)
    demo = recipe_files()["demo"]
    for name in ("demo", "demo.yaml", "recipes/demo.yaml", "./recipes/demo", str(demo)):
        assert find_recipe(name) == demo
    recipe.touch()
    assert find_recipe("mine.yaml") == Path("mine.yaml")
    (recipe.parent / "demo").mkdir()
    assert find_recipe("demo") == demo, "a folder of that name is no recipe"
    (recipe.parent / "demo.yaml").touch()
    assert find_recipe("demo.yaml") == Path("demo.yaml"), "one's own file comes first"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("dmo", "dmo: no such recipe. Did you mean demo? Recipes that come with groundup: classify-spam, demo, "),
        ("shakespear.yaml", "shakespear.yaml: no such recipe. Did you mean shakespeare?"),
        ("other/recipes/demo.yaml", "other/recipes/demo.yaml: no such recipe."),
        ("nothing-like-it", "nothing-like-it: no such recipe. Recipes that come with groundup: "),
        ("folder", "folder: this is a folder, a recipe is a YAML file."),
    ],
)
def test_a_recipe_that_is_not_there(name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    with pytest.raises(UsageError) as raised:
        find_recipe(name)
    assert str(raised.value).startswith(message)


# ---- flags over files


def test_flags_override_the_file(recipe: Path) -> None:
    recipe.write_text("seed: 3\nminutes: 5\nmodel:\n  n_layer: 2\n  n_head: 4\n")
    flags = parse_recipe_flags(["--seed=4", "--n-layer", "6", "--qk-norm=false"], PretrainRecipe, "pretrain", "")
    given_ = flags.over(read_recipe(recipe, PretrainRecipe))
    assert given_.values == {
        "seed": 4, "minutes": 5.0, "model.n_layer": 6, "model.n_head": 4, "model.qk_norm": False,
    }  # fmt: skip
    assert given_.sources["seed"] == given_.sources["model.qk_norm"] == "flag"
    assert given_.sources["minutes"] == given_.sources["model.n_head"] == str(recipe)
    built = build(PretrainRecipe, given_.values, given_.sources)
    assert (built.seed, built.minutes, built.model.n_layer, built.model.qk_norm) == (4, 5.0, 6, False)
    assert built.optim == PretrainRecipe().optim, "what nobody gave keeps its default"


def test_only_given_flags_are_given() -> None:
    assert parse_recipe_flags([], PretrainRecipe, "pretrain", "") == Given()


def test_what_a_command_takes_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_recipe_flags(["--help"], PretrainRecipe, "pretrain", "Train.", takes="[RECIPE]")
    shown = capsys.readouterr().out
    assert shown.startswith("usage: groundup pretrain [RECIPE] [--KEY VALUE …] [--print-config]\n\nTrain.\n")


# ---- building


def test_the_example_of_the_design(tmp_path: Path) -> None:
    path = tmp_path / "recipes" / "mine.yaml"
    path.parent.mkdir()
    path.write_text("model:\n  n_head: 7\n  n_embd: 384\n")
    given_ = read_recipe(path, PretrainRecipe)
    with pytest.raises(UsageError) as raised:
        build(PretrainRecipe, given_.values, given_.sources)
    assert str(raised.value) == (
        f"{path}: model.n_head = 7 does not divide model.n_embd = 384. "
        "Heads that would: 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48."
    )


def test_a_contradiction_names_the_file_only_where_the_file_made_it() -> None:
    def complaint(values: dict[str, Any], sources: dict[str, str]) -> str:
        with pytest.raises(UsageError) as raised:
            build(PretrainRecipe, values, sources)
        return str(raised.value)

    values = {"out": "x", "model.dropout": 2.0}
    assert complaint(values, {"out": "a.yaml", "model.dropout": "flag"}).startswith("model.dropout = 2.0 must")
    assert complaint(values, {"out": "a.yaml", "model.dropout": "b.yaml"}).startswith("b.yaml: model.dropout = 2.0")
    heads = {"model.n_head": 7, "model.n_embd": 384}
    assert complaint(heads, {"model.n_head": "flag", "model.n_embd": "a.yaml"}).startswith("a.yaml: model.n_head = 7")
    assert complaint(heads, {}).startswith("model.n_head = 7")


# ---- saving


def values_of(hint: Any) -> st.SearchStrategy[Any]:
    """Any value that a key of this type may have."""
    text = st.text(st.characters(codec="utf-8"), max_size=20) | st.sampled_from(
        ["3e-4", "1.", "null", "~", "yes", "0x_", "2026-01-31", "12:30:45", "=", "# no comment", "a: b", "- c", "'",
         "%", "a # b", "ROMEO:\n", "\n", "x\ny: z\n", "\x85", "a\u2028b", "\x0b\x0c\x1c", "\ufeff", "😀",
         " a ", "long " * 300]
    )  # fmt: skip
    simple = {int: st.integers(), bool: st.booleans(), str: text, type(None): st.none()}
    if hint in simple:
        return simple[hint]
    if hint is float:
        return st.floats(allow_nan=False, allow_infinity=False)
    if get_origin(hint) is Literal:
        return st.sampled_from(get_args(hint))
    if get_origin(hint) is list:
        return st.lists(values_of(get_args(hint)[0]), max_size=4)
    if get_origin(hint) is dict:
        return st.dictionaries(text, values_of(get_args(hint)[1]), max_size=4)
    return st.one_of(*(values_of(part) for part in get_args(hint)))


@given(st.fixed_dictionaries({}, optional={key: values_of(hint) for key, hint in KEYS.items()}), st.booleans())
@settings(max_examples=40, deadline=None)
def test_what_is_saved_is_read_again(
    tmp_path_factory: pytest.TempPathFactory, values: dict[str, Any], noted: bool
) -> None:
    path = tmp_path_factory.mktemp("saved") / "recipe.yaml"
    notes = {key: f"the formula of {key}: a # b\nand more" for key in values} if noted else None
    save_recipe(path, values, notes)
    assert read_recipe(path, PretrainRecipe).values == values


@pytest.mark.parametrize("key", KEYS)
def test_every_key_is_saved_with_the_value_it_has_by_default(key: str, recipe: Path) -> None:
    default = flatten(dataclasses.asdict(PretrainRecipe()), KEYS)[key]
    recipe.write_text(dump_recipe({key: default}))
    assert read_recipe(recipe, PretrainRecipe).values == {key: default}


def test_a_saved_recipe_is_for_reading() -> None:
    values = {
        "data": "stdlib", "optim.learning_rate": 3e-4, "sample.prompts": ["ROMEO:\n", "Once upon"],
        "sample.max_tokens": 7, "model.n_layer": 4, "minutes": None,
    }  # fmt: skip
    notes = {"model.n_layer": "N = sqrt(C/120)", "sample.prompts": "classic", "data": "yours"}
    assert dump_recipe(values, notes) == (
        "data: stdlib  # yours\n"
        "optim:\n  learning_rate: 0.0003\n"
        'sample:\n  prompts:  # classic\n  - "ROMEO:\\n"\n  - Once upon\n  max_tokens: 7\n'
        "model:\n  n_layer: 4  # N = sqrt(C/120)\n"
        "minutes: null\n"
    )
    assert dump_recipe({}) == ""


def test_a_saved_recipe_replaces_the_one_before_as_a_whole(recipe: Path) -> None:
    save_recipe(recipe, {"seed": 1, "out": "x" * 10_000})
    save_recipe(recipe, {"seed": 2})
    assert recipe.read_text() == "seed: 2\n"
    assert [path.name for path in recipe.parent.iterdir()] == ["mine.yaml"]
