"""A text cut into tokens, to look at: in colour in a terminal, and as one HTML page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from groundup.tokenizer.describe import Survey, escaped, longest_tokens, rarest_tokens, unused_tokens

if TYPE_CHECKING:
    from rich.text import Text

    from groundup.tokenizer.tokenizer import Tokenizer

TERMINAL_STYLES = ("on blue", "on dark_green", "on dark_magenta", "on turquoise4", "on grey37")
"""Backgrounds that neighbouring tokens take in turn: dark enough for white letters, and distinct in 16 colours too."""

PAGE_TOKENS = 20_000  # tokens that a page shows; a browser gets slow beyond

# White space is shown as a sign; control characters as the pictures Unicode has for them.
SIGNS = {" ": "·", "\t": "→", "\n": "↵"}
CONTROL_PICTURES = {code: 0x2400 + code for code in range(32)} | {127: 0x2421}


@dataclass(frozen=True)
class Piece:
    """One token of a text.

    Args:
        id: its id.
        data: its bytes.
        kind: "special"; "part" where its bytes do not end and begin with whole characters; else "text".
        whole: of a part, the characters that it is a part of.
    """

    id: int
    data: bytes
    kind: Literal["text", "part", "special"]
    whole: str = ""

    @property
    def marked(self) -> list[tuple[str, bool]]:
        r"""The token as printable text in runs: white space as signs (True), everything else as it is (False).

        Bytes that are half characters are written ``\xe4``, invisible characters ``\u200b``.
        """
        runs: list[tuple[str, bool]] = []
        for character in self.data.decode("utf-8", "backslashreplace"):
            sign = SIGNS.get(character)
            shown = sign or character.translate(CONTROL_PICTURES)
            if not shown.isprintable():
                shown = escaped(shown.encode())
            if runs and runs[-1][1] == (sign is not None):
                shown = runs.pop()[0] + shown
            runs.append((shown, sign is not None))
        return runs

    @property
    def begins_with_space(self) -> bool:
        """Whether the first character is white space that is shown as a sign."""
        return self.data[:1].decode("latin-1") in SIGNS

    @property
    def note(self) -> str:
        """What there is to say of the token in one line: id, bytes in hexadecimal, the characters it is a part of."""
        first = self.data[:24].hex(" ") + (" …" if len(self.data) > 24 else "")
        note = f"id {self.id} · {len(self.data)} {'byte' if len(self.data) == 1 else 'bytes'}: {first}"
        if self.kind == "special":
            return note + " · special token"
        return note + f" · part of {self.whole}" if self.kind == "part" and self.whole else note


def pieces(tok: Tokenizer, ids: Sequence[int]) -> list[Piece]:
    """The tokens of a text, one by one.

    Raises:
        GroundupError: an id is out of range.
    """
    special_ids = set(tok.special_tokens.values())
    tokens = [tok.token_bytes(number) for number in ids]
    joined = b"".join(tokens)
    found: list[Piece] = []
    start = 0
    for number, token in zip(ids, tokens, strict=True):
        end = start + len(token)
        if number in special_ids:
            found.append(Piece(number, token, "special"))
        elif _is_whole(token):
            found.append(Piece(number, token, "text"))
        else:
            found.append(Piece(number, token, "part", _characters_around(joined, start, end)))
        start = end
    return found


def _is_whole(token: bytes) -> bool:
    try:
        token.decode()
    except UnicodeDecodeError:
        return False
    return True


def _characters_around(joined: bytes, start: int, end: int) -> str:
    """The characters that the bytes from ``start`` to ``end`` are in; "" where they are not UTF-8."""
    # A character has at most 4 bytes, the first of which is no continuation byte (10xxxxxx).
    while start > 0 and joined[start] & 0xC0 == 0x80:
        start -= 1
    while end < len(joined) and joined[end] & 0xC0 == 0x80:
        end += 1
    around = joined[start:end].decode("utf-8", "replace")
    return "" if "\N{REPLACEMENT CHARACTER}" in around else around


# ---- in the terminal


def terminal_view(shown: Sequence[Piece]) -> Text:
    """Tokens on alternating backgrounds: white space visible, half characters underlined, special tokens inverse."""
    from rich.text import Text

    view = Text()
    for position, piece in enumerate(shown):
        style = f"white {TERMINAL_STYLES[position % len(TERMINAL_STYLES)]}"
        style = {"text": style, "part": f"{style} underline", "special": "bold reverse"}[piece.kind]
        for run, is_space in piece.marked:
            # A line break is shown, and made.
            view.append(run.replace("↵", "↵\n") if is_space else run, style=f"{style} dim" if is_space else style)
    return view


def plain_view(shown: Sequence[Piece]) -> str:
    """Tokens with a bar after each, for where there are no colours; spaces stay spaces."""
    return "".join(
        "".join(run.replace("·", " ").replace("↵", "↵\n") if is_space else run for run, is_space in piece.marked) + "|"
        for piece in shown
    )


# ---- as a page


LONGEST_SHOWN = 32  # characters of a token in a list


def in_brief(token: bytes) -> str:
    """A token in quotes on one line: a run of one byte as that and how often, anything else cut where it is long."""
    if len(token) > 8 and len(set(token)) == 1:
        return f'"{escaped(token[:1])}" × {len(token)}'
    text = escaped(token)
    return f'"{text}"' if len(text) <= LONGEST_SHOWN else f'"{text[:LONGEST_SHOWN]}…'


@dataclass(frozen=True)
class Listed:
    """A token in a list: its id, its text in brief, and what is said of it."""

    id: int
    text: str
    figure: str


def listed_longest(tok: Tokenizer, count: int) -> list[Listed]:
    """The longest tokens, with their bytes."""
    return [
        Listed(number, in_brief(token), f"{len(token):,} bytes")
        for number, token in _with_bytes(tok, longest_tokens(tok, count))
    ]


def listed_rarest(tok: Tokenizer, found: Survey, count: int) -> list[Listed]:
    """The rarest tokens of a survey, with how often they occur."""
    rarest = rarest_tokens(tok, found.occurrences, count)
    return [
        Listed(number, in_brief(token), f"{found.occurrences[number]:,}×") for number, token in _with_bytes(tok, rarest)
    ]


def _with_bytes(tok: Tokenizer, ids: Sequence[int]) -> Iterator[tuple[int, bytes]]:
    return ((number, tok.token_bytes(number)) for number in ids)


def html_page(tok: Tokenizer, name: str, source: str, found: Survey, shown: Sequence[Piece], grouping: str = "") -> str:
    """One page that needs no script, no network and no other file: figures, the text in tokens, lists of tokens.

    Args:
        tok: the tokenizer.
        name: what the tokenizer is called.
        source: what the text is called.
        found: the survey of the text.
        shown: the tokens of its beginning; at most ``PAGE_TOKENS`` are shown.
        grouping: what the survey's groups are, "language" or "script"; no table of them where it is empty.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("groundup.tokenizer"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("inspect.html.j2").render(
        name=name,
        source=source,
        vocab_size=tok.vocab_size,
        special_tokens=tok.special_tokens,
        total=found.total,
        groups=found.groups if grouping else {},
        grouping=grouping,
        tightest=max((group.bytes_per_token for group in found.groups.values()), default=0.0),
        unused=unused_tokens(tok, found.occurrences),
        ordinary=tok.vocab_size - len(set(tok.special_tokens.values())),
        pieces=shown[:PAGE_TOKENS],
        left_out=found.total.tokens - min(len(shown), PAGE_TOKENS),
        longest=listed_longest(tok, 30),
        rarest=listed_rarest(tok, found, 30),
        colours=len(TERMINAL_STYLES),
    )
