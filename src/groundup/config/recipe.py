"""A run is a YAML file: find it, read it, let flags override it, check every key, save what it came to."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
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
    """YAML 1.2's numbers: ``3e-4`` is a number, as everybody writes it, not text as YAML 1.1 has it."""


_Loader.yaml_implicit_resolvers = {
    letter: list(rules) for letter, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)


def recipe_files() -> dict[str, Path]:
    """The recipes that come with groundup, by name: from the source tree, or packed in the wheel."""
    package = Path(__file__).resolve().parent.parent
    for folder in (package / "recipes", package.parent.parent / "recipes"):
        if folder.is_dir():
            return {path.stem: path for path in sorted(folder.glob("*.yaml"))}
    return {}


def find_recipe(name: str) -> Path:
    """The file of a recipe given by path, or by the name of one that comes with groundup.

    Raises:
        UsageError: there is no such file and no such recipe.
    """
    path = Path(name)
    if path.is_file():
        return path
    known = recipe_files()
    stem = path.name.removesuffix(".yaml")
    if path.parent.name in ("", "recipes") and stem in known:
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
        raise UsageError(f"{path}{line}: not valid YAML ({getattr(error, 'problem', None) or error}).") from error
    if content is None:
        content = {}
    if not isinstance(content, dict):
        raise UsageError(f"{path}: a recipe is a mapping of keys to values, this is a {type(content).__name__}.")
    keys = keys_of(cls)
    parser = make_parser("recipe", "")
    parser.add_class_arguments(cls)
    values = parse_keys(parser, flatten({str(key): value for key, value in content.items()}, keys), keys, str(path))
    return Given(values, dict.fromkeys(values, str(path)))


def parse_recipe_flags(arguments: Sequence[str], cls: type, command: str, description: str) -> Given:
    """Flags over the keys of ``cls``, only those that were given.

    Raises:
        UsageError: an unknown flag, or a value of the wrong type.
        SystemExit: after printing ``--help``.
    """
    keys = keys_of(cls)
    parser = make_parser(command, description)
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
        named = (
            next((sources[key] for key in sources if key in str(error) and sources[key] != "flag"), None)
            if sources
            else None
        )
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
    lines = yaml.safe_dump(nest(values), sort_keys=False, allow_unicode=True, width=1000).splitlines()
    if not notes:
        return "\n".join(lines) + "\n"
    section, noted = "", []
    for line in lines:
        indent, _, _rest = line.partition(":")
        name = indent.strip()
        key = f"{section}.{name}" if line.startswith(" ") else name
        section = name if not line.startswith(" ") and line.endswith(":") else section if line.startswith(" ") else ""
        noted.append(f"{line}  # {notes[key]}" if key in notes else line)
    return "\n".join(noted) + "\n"


def save_recipe(path: Path, values: Mapping[str, Any], notes: Mapping[str, str] | None = None) -> None:
    """Write a resolved recipe; reading it back gives the same values."""
    write_atomic(path, dump_recipe(values, notes))
