"""A run is a YAML file: find it, read it, let flags override it, check every key, save what it came to."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import yaml

from groundup.config.schema import flatten, keys_of, make_parser, nest, parse_flags, parse_keys
from groundup.runtime import UsageError, os_errors, write_atomic
from groundup.runtime.errors import nearest

T = TypeVar("T")


@dataclass(frozen=True)
class Given:
    """What a person set, by dotted key, and where: everything else may be derived.

    Args:
        values: the value of each key that was set.
        sources: for each of them, the file or ``flag`` that set it.
    """

    values: Mapping[str, Any] = field(default_factory=dict)
    sources: Mapping[str, str] = field(default_factory=dict)

    def over(self, other: Given) -> Given:
        """These values laid over another's."""
        return Given({**other.values, **self.values}, {**other.sources, **self.sources})


class _Loader(yaml.SafeLoader):
    """Plain values of YAML 1.2: ``3e-4`` is a number, ``2026-01-31`` is text. A key that stands twice is refused."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value} stands here twice", key.start_mark)
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else id(key))
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes what :class:`_Loader` would read as something else, and keeps every text on one line."""


_Loader.yaml_implicit_resolvers = {
    letter: [(tag, rule) for tag, rule in rules if not tag.endswith(":timestamp")]
    for letter, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)
_Dumper.yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = '"' if text.splitlines() not in ([], [text]) else None  # line breaks are escaped between double quotes
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)


def recipe_files(cls: type | None = None) -> dict[str, Path]:
    """The recipes that come with groundup, by name: from the source tree, or packed in the wheel.

    Args:
        cls: the dataclass of a kind of recipe: those alone that have no other keys, and name a task where it has one.
    """
    package = Path(__file__).resolve().parent.parent
    for folder in (package / "recipes", package.parent.parent / "recipes"):
        if folder.is_dir():
            found = {path.stem: path for path in sorted(folder.glob("*.yaml"))}
            return {name: path for name, path in found.items() if cls is None or _is_of(path, cls)}
    return {}


def _is_of(path: Path, cls: type) -> bool:
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (OSError, ValueError, yaml.YAMLError):
        return False
    keys = {key.partition(".")[0] for key in keys_of(cls)}
    return isinstance(content, dict) and set(content) <= keys and ("task" in content) == ("task" in keys)


def find_recipe(name: str, cls: type | None = None) -> Path:
    """The file of a recipe given by path, or by the name of one that comes with groundup.

    Args:
        cls: the dataclass of the kind that is wanted.

    Raises:
        UsageError: there is no such file and no such recipe.
    """
    path = Path(name)
    if path.is_file():
        return path
    known, stem = recipe_files(cls), path.name.removesuffix(".yaml")
    if path.parent in (Path(), Path("recipes")) and stem in known:
        return known[stem]
    if path.is_dir():
        raise UsageError(f"{name}: this is a folder, a recipe is a YAML file.")
    raise UsageError(
        f"{name}: no such recipe.{nearest(stem, known)} Recipes that come with groundup: {', '.join(known)}."
    )


def read_recipe(path: Path, cls: type) -> Given:
    """Read and check a recipe file against the dataclass it fills.

    Raises:
        UsageError: not YAML, an unknown key (the nearest is named), or a value of the wrong type.
        GroundupError: the file cannot be read.
    """
    with os_errors(path, "cannot read the recipe"):
        raw = path.read_bytes()
    try:
        content = yaml.load(raw.decode("utf-8"), Loader=_Loader)
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: a recipe is UTF-8 text; byte {error.start} is not.") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        reason = " ".join(str(error).split())
        raise UsageError(f"{path}{line}: not valid YAML ({getattr(error, 'problem', None) or reason}).") from error
    except ValueError as error:  # a number that only looks like one, such as 0x_
        raise UsageError(f"{path}: not valid YAML ({error}).") from error
    if content is None:
        content = {}
    if not isinstance(content, dict):
        raise UsageError(f"{path}: a recipe is a mapping of keys to values, this is a {type(content).__name__}.")
    keys = keys_of(cls)
    parser = make_parser("recipe", "")
    parser.add_class_arguments(cls)
    values = parse_keys(parser, flatten({str(key): value for key, value in content.items()}, keys), keys, str(path))
    return Given(values, dict.fromkeys(values, str(path)))


def parse_recipe_flags(
    arguments: Sequence[str], cls: type, command: str, description: str, *, takes: str = ""
) -> Given:
    """Flags over the keys of ``cls``, only those that were given.

    Args:
        takes: what the command takes before its flags, for the help: ``[RECIPE]``.

    Raises:
        UsageError: an unknown flag, or a value of the wrong type.
        SystemExit: after printing ``--help``.
    """
    keys = keys_of(cls)
    usage = " ".join(["groundup", command, *takes.split(), "[--KEY VALUE …] [--print-config]"])
    epilog = "--print-config prints what recipe and flags come to, and stops. KEY may be its last part: --n-layer 6."
    parser = make_parser(command, description, usage=usage, epilog=epilog)
    parser.add_class_arguments(cls)
    parsed = parse_flags(parser, arguments, keys, defaults=False)
    values = flatten(parsed.as_dict(), keys)
    return Given(values, dict.fromkeys(values, "flag"))


def build(cls: type[T], values: Mapping[str, Any], sources: Mapping[str, str] | None = None) -> T:
    """Make the dataclass from dotted keys; what is absent takes its default.

    A contradiction that the dataclasses find themselves is reported with the file that set one of the keys it names.

    Raises:
        UsageError: an unknown key, a wrong type, or a contradiction.
    """
    keys = keys_of(cls)
    parser = make_parser("recipe", "")
    parser.add_class_arguments(cls)
    checked = parse_keys(parser, values, keys, "recipe")
    try:
        return cls(**_construct(cls, checked))
    except UsageError as error:
        words = re.findall(r"[\w.]*\w", str(error))
        named = next((place for key, place in (sources or {}).items() if key in words and place != "flag"), None)
        raise UsageError(f"{named}: {error}" if named else str(error)) from error


def _construct(cls: type, flat: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments for ``cls``, nested dataclasses built first."""
    hints = get_type_hints(cls)
    arguments: dict[str, Any] = {}
    for entry in dataclasses.fields(cls):
        hint = hints[entry.name]
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            prefix = f"{entry.name}."
            inner = {key.removeprefix(prefix): value for key, value in flat.items() if key.startswith(prefix)}
            arguments[entry.name] = hint(**_construct(hint, inner))
        elif entry.name in flat:
            arguments[entry.name] = flat[entry.name]
    return arguments


def dump_recipe(values: Mapping[str, Any], notes: Mapping[str, str] | None = None) -> str:
    """A recipe as YAML text, in the order given, with a comment behind each key that ``notes`` explains."""
    leaves = {key: _Leaf(value) if isinstance(value, dict) else value for key, value in values.items()}
    return "".join(f"{line}\n" for line in _recipe_lines(nest(leaves), notes or {}, "", ""))


class _Leaf(dict[str, Any]):
    """A mapping that is a key's value, not a section of keys."""


def _recipe_lines(nested: Mapping[str, Any], notes: Mapping[str, str], section: str, indent: str) -> Iterator[str]:
    for name, value in nested.items():
        key = f"{section}{name}"
        if isinstance(value, dict) and not isinstance(value, _Leaf):
            yield f"{indent}{name}:"
            yield from _recipe_lines(value, notes, f"{key}.", f"{indent}  ")
            continue
        plain = dict(value) if isinstance(value, _Leaf) else value
        text = yaml.dump({name: plain}, Dumper=_Dumper, allow_unicode=True, width=math.inf)
        first, *rest = text.rstrip("\n").split("\n")
        yield f"{indent}{first}  # {' '.join(notes[key].split())}" if key in notes else f"{indent}{first}"
        yield from (f"{indent}{line}" for line in rest)


def save_recipe(path: Path, values: Mapping[str, Any], notes: Mapping[str, str] | None = None) -> None:
    """Write a resolved recipe; reading it back gives the same values."""
    write_atomic(path, dump_recipe(values, notes))
