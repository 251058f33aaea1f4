"""Keys, and the flags that are the same words."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from groundup.config import flatten, keys_of, make_parser, nest, parse_flags
from groundup.config.schema import describe_type, normalise_flags
from groundup.runtime import UsageError
from groundup.training import PretrainRecipe


@dataclass(frozen=True)
class Engine:
    """The engine.

    Args:
        power: how strong it is
        fuel_kind: what it burns
        start_stop: whether it stops at lights
    """

    power: float = 1.0
    fuel_kind: Literal["petrol", "wood"] = "petrol"
    start_stop: bool = False


@dataclass(frozen=True)
class Radio:
    """The radio.

    Args:
        power: how loud it is
        stations: where to
        presets: their numbers
    """

    power: int = 3
    stations: list[str] = field(default_factory=list)
    presets: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Car:
    """A car.

    Args:
        doors: how many
        name: what it is called
        sold: whether it is
        engine: the engine
        radio: the radio
    """

    doors: int = 4
    name: str | None = None
    sold: bool = False
    engine: Engine = field(default_factory=Engine)
    radio: Radio = field(default_factory=Radio)


KEYS = keys_of(Car)


def parse(*flags: str) -> dict[str, Any]:
    """What was given, by key."""
    parser = make_parser("drive", "Drive.")
    parser.add_class_arguments(Car)
    return flatten(parse_flags(parser, flags, KEYS, defaults=False).as_dict(), KEYS)


def test_keys_are_dotted_in_the_order_of_the_fields() -> None:
    expected = {
        "doors": int, "name": str | None, "sold": bool,
        "engine.power": float, "engine.fuel_kind": Literal["petrol", "wood"], "engine.start_stop": bool,
        "radio.power": int, "radio.stations": list[str], "radio.presets": list[int],
    }  # fmt: skip
    assert list(KEYS.items()) == list(expected.items())


def test_a_function_has_keys_too() -> None:
    def drive(road: str, speed: float = 1.0) -> None: ...

    assert keys_of(drive) == {"road": str, "speed": float}


def test_the_words_of_the_design_are_keys_of_the_recipe() -> None:
    words = {key.rsplit(".", 1)[-1] for key in keys_of(PretrainRecipe)}
    assert words >= {
        "n_layer", "n_head", "n_kv_head", "n_embd", "context_length", "vocab_size", "max_tokens", "learning_rate",
        "batch_tokens", "data", "out", "seed", "max_steps", "minutes", "save_every", "resume", "device", "limit",
        "data_dir",
    }  # fmt: skip
    assert "model" not in keys_of(PretrainRecipe)


@given(st.dictionaries(st.sampled_from(list(KEYS)), st.integers()))
def test_nesting_and_flattening_undo_each_other(flat: dict[str, int]) -> None:
    assert flatten(nest(flat), KEYS) == flat


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--doors", "2"], {"doors": 2}),
        (["--doors=2"], {"doors": 2}),
        (["--doors", "-2"], {"doors": -2}),
        (["--fuel-kind", "wood"], {"engine.fuel_kind": "wood"}),
        (["--fuel_kind=wood"], {"engine.fuel_kind": "wood"}),
        (["--engine.fuel-kind=wood"], {"engine.fuel_kind": "wood"}),
        (["--engine.power", "3e-4"], {"engine.power": 3e-4}),
        (["--engine.power=2"], {"engine.power": 2.0}),
        (["--sold"], {"sold": True}),
        (["--sold", "false"], {"sold": False}),
        (["--sold", "True"], {"sold": True}),
        (["--sold", "--doors", "3"], {"sold": True, "doors": 3}),
        (["--start-stop", "--sold=false"], {"engine.start_stop": True, "sold": False}),
        (["--name", "5"], {"name": "5"}),
        (["--name", "1e3"], {"name": "1e3"}),
        (["--name", "[1, 2]"], {"name": "[1, 2]"}),
        (["--name", "a: b"], {"name": "a: b"}),
        (["--name", "--doors=2"], None),
        (["--name=--doors=2"], {"name": "--doors=2"}),
        (["--name="], {"name": ""}),
        (["--name", "# not a comment"], {"name": "# not a comment"}),
        (["--name", "'a'"], {"name": "'a'"}),
        (["--name", "~"], {"name": "~"}),
        (["--name", "null"], {"name": None}),
        (["--stations", '["a", "b\\n"]'], {"radio.stations": ["a", "b\n"]}),
        (["--presets", "[1, 2]"], {"radio.presets": [1, 2]}),
        (["--doors=2", "--doors=3"], {"doors": 3}),
        ([], {}),
    ],
)
def test_flags(flags: list[str], expected: dict[str, Any] | None) -> None:
    if expected is None:
        with pytest.raises(UsageError, match="--name needs a value"):
            parse(*flags)
    else:
        found = parse(*flags)
        assert found == expected
        assert {key: type(value) for key, value in found.items()} == {
            key: type(value) for key, value in expected.items()
        }


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--power", "3"], "--power could mean engine.power or radio.power. Write it out."),
        (["--door", "3"], "--door is not a known flag. Did you mean doors?"),
        (["--engine.powr=3"], "--engine.powr is not a known flag. Did you mean engine.power?"),
        (["--engine", "x.yaml"], "--engine is not a known flag."),
        (["--stations+", "x"], "--stations+ is not a known flag. Did you mean radio.stations?"),
        (["--=3"], "-- is not a known flag."),
        (["--doors", "two"], "drive: doors = 'two' should be a whole number."),
        (["--doors", "2.0"], "drive: doors = '2.0' should be a whole number."),
        (["--doors"], "drive: --doors needs a value: a whole number."),
        (["--sold=maybe"], "drive: sold = 'maybe' should be true or false."),
        (["--fuel-kind", "coal"], "drive: engine.fuel_kind = 'coal' should be one of petrol, wood."),
        (["--engine.power", "much"], "drive: engine.power = 'much' should be a number."),
        (["--engine.power", "nan"], "drive: engine.power = 'nan' should be a number."),
        (["--engine.power", ".inf"], "drive: engine.power = inf should be a number, and a finite one."),
        (["--presets", "1"], "drive: radio.presets = '1' should be a list of whole numbers, such as [1, 2]."),
        (["--stations", "a"], 'drive: radio.stations = \'a\' should be a list of texts, such as ["one", "two"].'),
        (["extra"], "drive: unrecognized arguments: extra. See --help."),
        (["-x", "3"], "drive: unrecognized arguments: -x 3. See --help."),
    ],
)
def test_a_wrong_flag_is_one_line(flags: list[str], message: str) -> None:
    with pytest.raises(UsageError) as raised:
        parse(*flags)
    assert str(raised.value) == message or (
        str(raised.value).startswith(message) and "Did you mean" in str(raised.value).removeprefix(message)
    )


def test_after_two_dashes_nothing_is_a_flag() -> None:
    assert normalise_flags(["--n-x=1", "--", "--what-ever"], {"n_x": int}) == ["--n_x=1", "--", "--what-ever"]


@pytest.mark.parametrize(
    ("hint", "words"),
    [
        (int, "a whole number"), (float | None, "a number or null"), (bool, "true or false"),
        (Literal["a", "b"], "one of a, b"), (list[float], "a list of numbers, such as [1, 2]"), (Engine, "Engine"),
    ],
)  # fmt: skip
def test_types_in_words(hint: Any, words: str) -> None:
    assert describe_type(hint) == words


def test_help_shows_each_flag_once_with_dashes_its_help_and_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        parse("--help")
    assert leaving.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "what it burns (type: Literal['petrol', 'wood'], default: petrol)" in shown
    options = shown.split("options:", 1)[1]
    assert all(options.count(f"--{key.replace('_', '-')} ") == 1 for key in KEYS)
    assert "_" not in " ".join(word for word in shown.split() if word.startswith("--"))
    assert "stations+" not in shown
    assert "--engine ENGINE" not in options
    assert "--engine CONFIG" not in options
