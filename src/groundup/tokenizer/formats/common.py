"""What the readers of several formats share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from groundup.runtime.errors import GroundupError, os_errors
from groundup.runtime.files import read_json
from groundup.tokenizer.vocabulary import Vocabulary

HIGHEST_ID = 1 << 24  # no vocabulary has sixteen million tokens; a damaged file may ask for the memory of a million


class UnreadableError(Exception):
    """The file is not one that can be read; the message says why, without a full stop."""


@contextmanager
def reading(path: Path, what: str) -> Iterator[None]:
    """Turn what goes wrong in the block into one line that names the file.

    Args:
        path: the file.
        what: what it should be.

    Raises:
        GroundupError: the block failed.
    """
    try:
        yield
    except UnreadableError as error:
        raise GroundupError(f"{path}: {error}.") from error
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise GroundupError(f"{path}: this is not a whole {what} ({reason}).") from error


def place_tokens(by_id: Mapping[int, bytes], names: Mapping[str, int]) -> tuple[bytes, ...]:
    """The bytes of all tokens by id: ordinary ones, and special or added ones by name.

    Raises:
        UnreadableError: an id is used twice, or is none.
    """
    holder: dict[int, str] = {}
    for name, number in names.items():
        if holder.setdefault(number, name) != name:
            raise UnreadableError(f"the tokens {holder[number]!r} and {name!r} share the id {number}")
        if by_id.get(number, name.encode()) != name.encode():
            raise UnreadableError(f"the id {number} is used twice, for {name!r} and for {by_id[number]!r}")
    everything = {**by_id, **{number: name.encode() for number, name in holder.items()}}
    if not everything:
        raise UnreadableError("it has no tokens")
    if set(map(type, everything)) != {int} or min(everything) < 0 or max(everything) >= HIGHEST_ID:
        wrong = next(n for n in everything if type(n) is not int or not 0 <= n < HIGHEST_ID)
        raise UnreadableError(f"{wrong!r} is not a token id")
    tokens = [b""] * (max(everything) + 1)
    for number, token in everything.items():
        tokens[number] = token
    return tuple(tokens)


def check_tokens(vocabulary: Vocabulary) -> None:
    """See that each byte has a token, and that no two ordinary tokens are alike.

    Raises:
        UnreadableError: it is not so.
    """
    ordinary = vocabulary.ordinary_ids()
    seen = {vocabulary.tokens[number]: number for number in ordinary}
    if len(seen) < len(ordinary):
        first, token = next((n, vocabulary.tokens[n]) for n in ordinary if seen[vocabulary.tokens[n]] != n)
        raise UnreadableError(f"the ids {first} and {seen[token]} stand for the same bytes, {token!r}")
    for byte in vocabulary.missing_bytes():
        raise UnreadableError(f"byte {byte} has no token; only byte-level BPE over all bytes can be read")


def check_merges(merges: Sequence[Any], ids: Mapping[str, int]) -> tuple[tuple[int, int], ...]:
    """Merges as pairs of ids; a file holds them as ``"left right"`` or, newer, as two strings.

    Raises:
        UnreadableError: one needs a token that is not there.
    """
    pairs = []
    for number, merge in enumerate(merges):
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        for token in (left, right, left + right):
            if token not in ids:
                raise UnreadableError(
                    f"merge {number}, {left!r} + {right!r}, needs {token!r}, which is not in the vocabulary"
                )
        pairs.append((ids[left], ids[right]))
    return tuple(pairs)


def config_beside(path: Path, vocabulary: Vocabulary) -> Vocabulary:
    """Add what the tokenizer_config.json (and chat_template.jinja) beside a file says of the vocabulary.

    Raises:
        GroundupError: one of them is damaged.
    """
    folder = path if path.is_dir() else path.parent
    told = read_config(folder)
    template = told.get("chat_template")
    if isinstance(template, list):  # several by name
        named = {entry["name"]: entry["template"] for entry in template if isinstance(entry, dict) and "name" in entry}
        template = named.get("default")
    written = folder / "chat_template.jinja"
    if written.is_file():
        with os_errors(written, "cannot read"):
            template = written.read_text(encoding="utf-8", errors="replace")
    return replace(
        vocabulary,
        bos_token=_known_name(told.get("bos_token"), vocabulary) or vocabulary.bos_token,
        eos_token=_known_name(told.get("eos_token"), vocabulary) or vocabulary.eos_token,
        chat_template=template if isinstance(template, str) else vocabulary.chat_template,
    )


def read_config(folder: Path) -> dict[str, Any]:
    """The tokenizer_config.json of a folder; empty where there is none.

    Raises:
        GroundupError: it is damaged.
    """
    path = folder / "tokenizer_config.json"
    told = read_json(path, "tokenizer configuration") if path.is_file() else {}
    if not isinstance(told, dict):
        raise GroundupError(f"{path}: this tokenizer configuration is damaged: it holds no names.")
    return told


def _known_name(token: Any, vocabulary: Vocabulary) -> str | None:
    name = token.get("content") if isinstance(token, dict) else token
    return name if isinstance(name, str) and name in vocabulary.special_tokens else None
