"""Text as it grows: whole characters only, and nothing of a stop text ever gets out."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from groundup.inference.text import TextStream
from groundup.tokenizer import Tokenizer

# Letters of one to four bytes, and words that the tokenizer has whole: several stop texts may be met in one token.
parts = st.sampled_from([*"abct中👋é\ufffd ", "at", " cat", " the", " mat"])
letters = st.lists(parts, max_size=30).map("".join)
stops = st.lists(st.lists(parts, min_size=1, max_size=4).map("".join), max_size=3)


def run(tokenizer: Tokenizer, tokens: list[int], stop: list[str]) -> tuple[list[str], bool]:
    """The pieces as they would be shown, and whether a stop text ended them."""
    stream, pieces = TextStream(tokenizer, stop), []
    for token in tokens:
        stopped = stream.push(token)
        pieces.append(stream.take())
        if stopped:
            break
    pieces.append(stream.take(final=True))
    assert stream.finished() == "".join(pieces)
    return pieces, stream.stopped


def byte_tokens(tokenizer: Tokenizer, raw: bytes) -> list[int]:
    by_byte = {tokenizer.token_bytes(i): i for i in range(256)}
    return [by_byte[bytes([byte])] for byte in raw]


@given(text=letters, stop=stops, by_bytes=st.booleans())
@settings(max_examples=400, deadline=None)
def test_no_stop_text_and_no_part_of_one_gets_out(
    tokenizer: Tokenizer, text: str, stop: list[str], by_bytes: bool
) -> None:
    tokens = byte_tokens(tokenizer, text.encode()) if by_bytes else tokenizer.encode(text)
    pieces, stopped = run(tokenizer, tokens, stop)
    shown = "".join(pieces)
    assert text.startswith(shown)
    assert stopped == any(one in text for one in stop)
    if not stopped:
        assert shown == text
        return
    assert not any(one in shown for one in stop)
    assert any(text.startswith(one, len(shown)) for one in stop)  # cut exactly where one begins
    if by_bytes:  # the first to be complete ends it
        end = min(text.index(one) + len(one) for one in stop if one in text)
        assert len(shown) in [text[:end].index(one) for one in stop if one in text[:end]]
    seen = ""
    for piece in pieces:  # and at no time was more shown than in the end
        seen += piece
        assert shown.startswith(seen)


@given(raw=st.binary(max_size=30), stop=stops)
@settings(max_examples=300, deadline=None)
def test_bytes_that_are_no_text_become_the_replacement_character(
    tokenizer: Tokenizer, raw: bytes, stop: list[str]
) -> None:
    text = raw.decode("utf-8", "replace")
    pieces, stopped = run(tokenizer, byte_tokens(tokenizer, raw), stop)
    assert stopped == any(one in text for one in stop)
    assert text.startswith("".join(pieces))
    assert stopped or "".join(pieces) == text


def test_half_a_character_waits_for_its_other_half(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer, [])
    shown = []
    for token in byte_tokens(tokenizer, "a👋b".encode()):
        stream.push(token)
        shown.append(stream.take())
    assert shown == ["a", "", "", "", "👋", "b"]


def test_what_could_become_a_stop_text_is_held_back_until_it_cannot(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer, ["###"])
    shown = []
    for token in byte_tokens(tokenizer, b"a##b###"):
        if stream.push(token):
            break
        shown.append(stream.take())
    assert shown == ["a", "", "", "##b", "", ""]
    assert stream.take(final=True) == ""
    assert stream.finished() == "a##b"


def test_of_several_stop_texts_in_one_token_the_first_counts(tokenizer: Tokenizer) -> None:
    (token,) = tokenizer.encode(" cat")
    stream = TextStream(tokenizer, ["t", "ca", "at"])
    assert stream.push(token)
    assert stream.finished() == " "
