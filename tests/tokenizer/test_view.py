"""A text cut into tokens, shown: nothing is lost, nothing runs, half characters and special tokens are told."""

from __future__ import annotations

import io
import itertools
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from groundup.tokenizer import Tokenizer
from groundup.tokenizer.describe import survey
from groundup.tokenizer.view import (
    PAGE_TOKENS,
    TERMINAL_STYLES,
    Piece,
    html_page,
    in_brief,
    pieces,
    plain_view,
    terminal_view,
)

HOSTILE = "<script>alert('x')</script> & \"quoted\" <|endoftext|>\x1b[31mred\x07 </pre>\u202e"


def page(tok: Tokenizer, text: str, grouping: str = "", name: str = "small") -> str:
    found = survey(tok, [("en", text), ("<b>zh", "中文")])
    return html_page(tok, name, "a <test>", found, pieces(tok, tok.encode(text, allow_special="all")), grouping)


class Page(HTMLParser):
    """What a browser makes of a page: the tags, the tokens with their notes, the text."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.tokens: list[tuple[str, str, str]] = []  # class, note, text
        self.text = ""
        self._open: list[str] = []
        self.feed(source)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        given = dict(attributes)
        if tag == "span" and "data-note" in given:
            self.tokens.append((given["class"] or "", given["data-note"] or "", ""))
            self._open.append("token")
        elif tag in ("span", "i"):
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in ("span", "i"):
            self._open.pop()

    def handle_data(self, data: str) -> None:
        self.text += data
        if "token" in self._open:
            kind, note, text = self.tokens[-1]
            self.tokens[-1] = (kind, note, text + data)


# ---- pieces


def test_pieces_are_the_tokens(small: Tokenizer) -> None:
    ids = small.encode("the cat<|end|> 中文 👋🏽", allow_special="all")
    shown = pieces(small, ids)
    assert [piece.id for piece in shown] == ids
    assert b"".join(piece.data for piece in shown) == "the cat<|end|> 中文 👋🏽".encode()
    assert [piece.data for piece in shown if piece.kind == "special"] == [b"<|end|>"]
    assert all(piece.kind == "text" for piece in shown[:2])


def test_half_characters_name_the_whole(small: Tokenizer) -> None:
    text = "é€𐍈x"  # none of them was in the training text: single bytes
    shown = pieces(small, small.encode(text))
    parts = [piece for piece in shown if piece.kind == "part"]
    assert sum(len(piece.data) for piece in shown) == len(text.encode())
    assert "".join(dict.fromkeys(piece.whole for piece in parts)) == "é€𐍈"
    assert shown[-1].kind == "text"
    assert all("part of " in piece.note for piece in parts)


def test_bytes_that_are_no_text_have_no_whole(small: Tokenizer) -> None:
    ids = [small.encode("€")[1], small.encode("a")[0]]
    assert [(piece.kind, piece.whole) for piece in pieces(small, ids)] == [("part", ""), ("text", "")]


@settings(max_examples=200, deadline=None)
@given(st.binary(min_size=1, max_size=12))
def test_every_token_is_printable(data: bytes) -> None:
    shown = "".join(run for run, _ in Piece(0, data, "part").marked)
    assert shown.isprintable()
    assert " " not in shown
    assert re.match(r"id 0 · \d+ bytes?: [0-9a-f ]+", Piece(0, data, "part").note)


def test_a_long_token_has_a_short_note() -> None:
    assert len(Piece(1, b" " * 5000, "text").note) < 120


# ---- terminal and plain


def test_plain_text_is_what_it_was_but_for_bars(small: Tokenizer) -> None:
    text = "the cat sat, naïve 中文"
    shown = pieces(small, small.encode(text))
    assert plain_view(shown).count("|") == len(shown)
    whole = [piece for piece in shown if piece.kind == "text"]
    assert "".join(plain_view([piece])[:-1] for piece in whole) == b"".join(piece.data for piece in whole).decode()


def test_line_breaks_and_tabs_are_visible(small: Tokenizer) -> None:
    shown = plain_view(pieces(small, small.encode("a\n\tb\x1b[0m")))
    assert shown.replace("|", "") == "a↵\n→b␛[0m"


def test_the_terminal_shows_colours_and_no_control_characters(small: Tokenizer) -> None:
    ids = small.encode("the cat\n" + HOSTILE, allow_special="all")
    view = terminal_view(pieces(small, ids))
    plain = view.plain
    assert "the·cat↵\n" in plain
    assert "\x1b" not in plain
    assert "\x07" not in plain
    assert "\u202e" not in plain
    styles = {str(span.style) for span in view.spans}
    assert all(any(style.endswith(colour) for style in styles) for colour in TERMINAL_STYLES)
    assert "bold reverse" in styles


@pytest.mark.parametrize("colours", ["standard", "256", "truecolor"])
def test_neighbours_can_be_told_apart_in_any_terminal(small: Tokenizer, colours: Any) -> None:
    stream = io.StringIO()
    view = terminal_view(pieces(small, [small.encode("a")[0]] * 20))
    Console(file=stream, force_terminal=True, color_system=colours, width=80, soft_wrap=True).print(view, end="")
    codes = re.findall(r"\x1b\[([\d;]+)m", stream.getvalue().replace("\x1b[0m", ""))
    assert len(codes) == 20
    assert len(set(codes)) == len(TERMINAL_STYLES)


def test_neighbours_differ_in_colour(small: Tokenizer) -> None:
    view = terminal_view(pieces(small, small.encode("thecatsatonthemat")))
    backgrounds = [str(span.style).split(" on ")[1] for span in view.spans]
    assert all(one != other for one, other in itertools.pairwise(backgrounds))


# ---- the page


def test_the_page_holds_every_token_and_its_note(small: Tokenizer) -> None:
    text = "the cat sat on\nthe mat <|end|> é"
    ids = small.encode(text, allow_special="all")
    seen = Page(page(small, text))
    assert len(seen.tokens) == len(ids)
    for token_id, (kind, note, shown) in zip(ids, seen.tokens, strict=True):
        assert note.startswith(f"id {token_id} · ")
        assert shown
        assert ("special" in kind) == (token_id in small.special_tokens.values())
    assert "".join(shown for _, _, shown in seen.tokens[:3]).startswith("the·cat")


def test_nothing_in_a_text_or_a_name_becomes_markup(small: Tokenizer) -> None:
    source = page(small, HOSTILE, grouping="language", name="<img src=x onerror=alert(1)>")
    seen = Page(source)
    assert {"script", "img", "b", "link", "iframe"} & set(seen.tags) == {"b"}  # the facts' own
    assert "<script" not in source
    assert "\x1b" not in source
    assert "<img" in seen.text
    assert seen.tags.count("pre") == 1


def test_the_page_needs_nothing_from_outside(small: Tokenizer) -> None:
    source = page(small, "the cat", grouping="language")
    assert not re.search(r"https?:|src=|@import|url\(", source)
    assert "default-src 'none'" in source
    assert "prefers-color-scheme: dark" in source


def test_the_page_has_groups_only_when_asked(small: Tokenizer) -> None:
    assert "By language" in Page(page(small, "the cat", grouping="language")).text
    assert "By language" not in Page(page(small, "the cat")).text
    assert "<b>zh" in Page(page(small, "the cat", grouping="language")).text


def test_a_long_text_is_cut_and_the_page_says_so(small: Tokenizer) -> None:
    ids = small.encode("x " * PAGE_TOKENS)
    found = survey(small, [("", "x " * PAGE_TOKENS)])
    seen = Page(html_page(small, "small", "long", found, pieces(small, ids)))
    assert len(seen.tokens) == PAGE_TOKENS
    assert f"{len(ids) - PAGE_TOKENS:,} more follow" in seen.text


@pytest.mark.browser
def test_the_page_in_a_browser(small: Tokenizer, tmp_path: Path) -> None:
    import shutil
    import subprocess

    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        pytest.skip("needs chromium, chromium-browser or google-chrome")
    (tmp_path / "page.html").write_text(page(small, "the cat\n" + HOSTILE, grouping="language"), encoding="utf-8")
    command = [program, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    target = (tmp_path / "page.html").as_uri()
    done = subprocess.run([*command, "--dump-dom", target], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.count("data-note=") == page(small, "the cat\n" + HOSTILE).count("data-note=")


def test_a_line_may_break_before_a_token_that_begins_with_a_space(small: Tokenizer) -> None:
    text = "the cat sat\non naïve"
    source = page(small, text)
    assert source.count("<wbr>") == sum(
        token[:1] in (b" ", b"\n") for token in map(small.token_bytes, small.encode(text))
    )
    assert re.search(r'<wbr><span class="t [^>]*><i>·</i>', source)


@pytest.mark.parametrize(
    ("token", "brief"),
    [
        (b" the", '" the"'),
        (b" " * 128, '" " × 128'),
        (b"\n" * 9, '"\\n" × 9'),
        (b"ab" * 40, '"' + "ab" * 16 + "…"),
        (b"\xe4\xb8", '"\\xe4\\xb8"'),
    ],
)
def test_a_token_in_brief(token: bytes, brief: str) -> None:
    assert in_brief(token) == brief
