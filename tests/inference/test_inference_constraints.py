"""Constrained answers: against hand-written checks, enumerated languages, and what a stranger might send."""

from __future__ import annotations

import gc
import json
import random
import re
import sys
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from groundup.inference.constraints import MAX_BYTES, MAX_DEPTH, Constraint, check_limits
from groundup.runtime import UsageError
from groundup.tokenizer import Tokenizer

pytest.importorskip("llguidance")
END = "<|endoftext|>"
CLOSING = tuple(b'",:]}')


def sentencepiece_of(words: list[str]) -> Tokenizer:
    """A SentencePiece tokenizer with all bytes and a few pieces, none of them special but the first three."""
    pb2 = pytest.importorskip("sentencepiece.sentencepiece_model_pb2")
    from groundup.tokenizer.formats import sentencepiece

    proto = pb2.ModelProto()
    for piece, kind in (("<unk>", 2), ("<s>", 3), ("</s>", 3)):
        proto.pieces.add(piece=piece, type=kind)
    for byte in range(256):
        proto.pieces.add(piece=f"<0x{byte:02X}>", type=6)
    for number, word in enumerate(words):
        proto.pieces.add(piece=word, score=-float(number))
    proto.trainer_spec.model_type = 2
    proto.trainer_spec.byte_fallback = True
    proto.normalizer_spec.remove_extra_whitespaces = False
    return Tokenizer(sentencepiece.vocabulary_of(proto.SerializeToString()))


@pytest.fixture(scope="module")
def pieces() -> Tokenizer:
    return sentencepiece_of(["▁", "a", "b", "é", "ab", "▁a", '"', "{", '{"', '":', "▁null", "null", "nu", "x", "bé"])


def walk(constraint: Constraint, tokenizer: Tokenizer, seed: int, limit: int = 400) -> bytes:
    """Allowed tokens at random, those that close something the likelier, to the end token."""
    chance, end = random.Random(seed), tokenizer.end_of_text_id
    written = b""
    for _ in range(limit):
        allowed = constraint.allowed().nonzero()[:, 0].tolist()
        assert allowed, (written, constraint.problem)
        assert constraint.finished() == (allowed == [end])
        if end in allowed and (chance.random() < 0.5 or allowed == [end]):
            constraint.advance(end)
            assert constraint.finished()
            assert not constraint.allowed().any()
            return written
        allowed = [number for number in allowed if number != end]
        closing = [number for number in allowed if tokenizer.token_bytes(number)[0] in CLOSING]
        number = chance.choice(closing if closing and chance.random() < 0.6 else allowed)
        written += tokenizer.token_bytes(number)
        constraint.advance(number)
    raise AssertionError(f"no end after {limit} tokens: {written!r}")


# ---- JSON


def is_int(value: Any, low: float = -1e18, high: float = 1e18) -> bool:
    return type(value) is int and low <= value <= high


SCHEMAS: list[tuple[str, dict[str, Any], Callable[[Any], bool]]] = [
    ("enum", {"enum": ["rot", "grün", 7, None, 'a "quote"\n']}, lambda v: v in ("rot", "grün", 7, None, 'a "quote"\n')),
    ("integer", {"type": "integer", "minimum": -3, "exclusiveMaximum": 120}, lambda v: is_int(v, -3, 119)),
    (
        "number",
        {"type": "number", "minimum": 0.5, "maximum": 9.25},
        lambda v: type(v) in (int, float) and 0.5 <= v <= 9.25,
    ),
    ("string", {"type": "string", "minLength": 2, "maxLength": 11}, lambda v: type(v) is str and 2 <= len(v) <= 11),
    ("pattern", {"type": "string", "pattern": "^[é中]{2,5}$"}, lambda v: re.fullmatch("[é中]{2,5}", v) is not None),
    (
        "array",
        {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 5},
        lambda v: type(v) is list and 2 <= len(v) <= 5 and all(type(one) is bool for one in v),
    ),
    (
        "nested",
        {
            "type": "object",
            "properties": {
                "name": {"type": "string", "maxLength": 7},
                "place": {
                    "type": "object",
                    "properties": {"x": {"type": "integer", "minimum": 0, "maximum": 99}, "y": {"type": "null"}},
                    "required": ["x"],
                    "additionalProperties": False,
                },
            },
            "required": ["name", "place"],
            "additionalProperties": False,
        },
        lambda v: (
            list(v) == ["name", "place"]
            and len(v["name"]) <= 7
            and is_int(v["place"]["x"], 0, 99)
            and v["place"].keys() <= {"x", "y"}
            and v["place"].get("y") is None
        ),
    ),
    (
        "tree",
        {
            "$defs": {"node": {"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 1}},
            "$ref": "#/$defs/node",
        },
        lambda v: v == [] or (len(v) == 1 and all(type(one) is list for one in v)),
    ),
    ("either", {"anyOf": [{"const": 1.5}, {"type": "boolean"}]}, lambda v: v == 1.5 or type(v) is bool),
]


@pytest.mark.parametrize(("schema", "holds"), [case[1:] for case in SCHEMAS], ids=[case[0] for case in SCHEMAS])
def test_every_walk_ends_in_json_that_the_schema_describes(
    schema: dict[str, Any], holds: Callable[[Any], bool], tokenizer: Tokenizer
) -> None:
    answers = set()
    for seed in range(25):
        given = schema if seed % 2 else json.dumps(schema)
        answer = walk(Constraint.make(tokenizer, json_schema=given), tokenizer, seed).decode()
        assert holds(json.loads(answer)), answer
        answers.add(answer)
    assert len(answers) > 1


def test_strings_hold_escapes_and_other_scripts(tokenizer: Tokenizer) -> None:
    constraint = Constraint.make(tokenizer, json_schema={"type": "string"})
    for text in ('"naïve 中文 👋🏽"', r'"a\n\"b\" \\ A"'):
        fork = constraint.copy()
        for number in tokenizer.encode(text):
            assert fork.allowed()[number]
            fork.advance(number)
        assert fork.finished()
    for bad in ('"a\n', '"\\x', '"\x07', "'"):
        fork = constraint.copy()
        *good, last = tokenizer.encode(bad)
        for number in good:
            assert fork.allowed()[number]
            fork.advance(number)
        assert not fork.allowed()[last]


def test_white_space_between_parts_comes_to_an_end(tokenizer: Tokenizer) -> None:
    constraint = Constraint.make(tokenizer, json_schema={"type": "array", "items": {"type": "null"}, "minItems": 1})
    constraint.advance(tokenizer.encode("[")[0])
    space = tokenizer.encode(" ")[0]
    count = 0
    while constraint.allowed()[space]:
        constraint.advance(space)
        count += 1
        assert count < 100
    assert count == 40


# ---- regular expressions and grammars


@pytest.mark.parametrize(
    "expression", [r"[a-f]{2,5}(-\d{1,3})?", r"(?i)yes|no", "naïve|über{1,3}|[中文]{2}", "^a+b$", ""]
)
def test_every_walk_matches_the_expression(expression: str, tokenizer: Tokenizer) -> None:
    for seed in range(20):
        answer = walk(Constraint.make(tokenizer, regex=expression), tokenizer, seed).decode()
        assert re.fullmatch(expression, answer), answer


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece"])
def test_the_mask_is_what_trying_each_token_finds(kind: str, tokenizer: Tokenizer, pieces: Tokenizer) -> None:
    tok = tokenizer if kind == "byte-level" else pieces
    words = [first + second + last for first in ("ab", "éc") for second in ("", "ab", "éc") for last in ("", "x")]
    words += ["null", "nullx", " a", " null", "the cat", "中文"]
    language = [word.encode() for word in words]
    expression = "(ab|éc){1,2}x?|nullx?| a| null|the cat|中文"
    assert all(re.fullmatch(expression, word) for word in words)
    special = {*tok.special_tokens.values()}
    waiting, seen = [(b"", Constraint.make(tok, regex=expression))], {b""}
    while waiting:
        written, constraint = waiting.pop()
        mask = constraint.allowed()
        for number in range(tok.vocab_size):
            longer = written + tok.token_bytes(number)
            if number in special:
                expected = number == tok.end_of_text_id and written in language
            else:
                expected = any(word.startswith(longer) for word in language)
            assert bool(mask[number]) == expected, (written, tok.token_bytes(number))
            if expected and number not in special and longer not in seen:
                seen.add(longer)
                fork = constraint.copy()
                fork.advance(number)
                waiting.append((longer, fork))
    assert len(seen) > 30  # parts of characters among them
    assert b"\xe4" in seen or kind == "sentencepiece"


SUMS = """
start: sum
sum: product ("+" product)*
product: NUMBER | "(" sum ")"
NUMBER: /[1-9][0-9]?/
"""
SUMS_EBNF = 'root ::= product ("+" product)*\nproduct ::= number | "(" root ")"\nnumber ::= [1-9] [0-9]?'


def parse_sum(text: str, at: int = 0) -> int:
    """Where a sum that begins at ``at`` ends."""
    while True:
        if text[at] == "(":
            at = parse_sum(text, at + 1)
            assert text[at] == ")"
            at += 1
        else:
            found = re.compile("[1-9][0-9]?").match(text, at)
            assert found, text[at:]
            at = found.end()
        if at == len(text) or text[at] != "+":
            return at
        at += 1


@pytest.mark.parametrize("grammar", [SUMS, SUMS_EBNF], ids=["lark", "ebnf"])
def test_every_walk_is_parsed_by_hand(grammar: str, tokenizer: Tokenizer) -> None:
    found = set()
    for seed in range(30):
        answer = walk(Constraint.make(tokenizer, grammar=grammar), tokenizer, seed, limit=3000).decode()
        assert parse_sum(answer) == len(answer)
        found |= set(answer)
    assert {"(", ")", "+"} <= found


def test_a_special_token_may_be_a_part_of_a_grammar() -> None:
    tok = Tokenizer.train(["a b"], 260, special_tokens=(END, "<|call|>"), show_progress=False)
    constraint = Constraint.make(tok, grammar='start: "a" <|call|> "b"')
    constraint.advance(tok.encode("a")[0])
    assert constraint.allowed().nonzero().tolist() == [[tok.special_tokens["<|call|>"]]]
    constraint.advance(tok.special_tokens["<|call|>"])
    assert constraint.allowed().nonzero().tolist() == [[tok.encode("b")[0]]]


# ---- the ends of an answer, and of a vocabulary


def test_a_model_with_more_tokens_than_its_tokenizer(tokenizer: Tokenizer) -> None:
    padded = tokenizer.vocab_size + 13
    constraint = Constraint.make(tokenizer, regex="(?s:.)*", vocab_size=padded)
    mask = constraint.allowed()
    assert mask.shape == (padded,)
    assert mask.dtype == torch.bool
    assert not mask[tokenizer.vocab_size :].any()
    assert mask[tokenizer.end_of_text_id]
    constraint.advance(tokenizer.vocab_size + 1)  # out of the vocabulary, and so not allowed
    assert constraint.problem is not None
    assert not constraint.allowed().any()
    assert not constraint.finished()


def test_end_tokens_of_the_models_own(tokenizer: Tokenizer) -> None:
    further = tokenizer.vocab_size + 2
    constraint = Constraint.make(tokenizer, regex="ab?", vocab_size=further + 1, end_tokens=[further])
    assert not constraint.allowed()[further]
    constraint.advance(tokenizer.encode("a")[0])
    assert constraint.allowed()[further]
    assert not constraint.allowed()[tokenizer.end_of_text_id]
    assert not constraint.finished()
    constraint.advance(tokenizer.encode("b")[0])
    assert constraint.finished()
    assert constraint.allowed().nonzero().tolist() == [[further]]


def test_without_an_end_token_it_is_finished_all_the_same() -> None:
    tok = Tokenizer.train(["a b"], 256, special_tokens=(), show_progress=False)
    constraint = Constraint.make(tok, regex="ab")
    for number in tok.encode("ab"):
        assert not constraint.finished()
        constraint.advance(number)
    assert constraint.finished()
    assert not constraint.allowed().any()
    assert constraint.problem is None


def test_a_copy_goes_its_own_way(tokenizer: Tokenizer) -> None:
    a, b, c = (tokenizer.encode(letter)[0] for letter in "abc")
    one = Constraint.make(tokenizer, regex="abx|acx")
    one.advance(a)
    other = one.copy()
    one.advance(b)
    assert other.allowed()[[b, c]].all()
    other.advance(c)
    other.advance(c)
    assert not other.allowed().any()
    assert other.problem == f"token {c} is not allowed where it came."
    assert one.allowed().sum() == 1


def test_a_tokenizer_is_let_go_of() -> None:
    tok = Tokenizer.train(["a b"], 257, show_progress=False)
    Constraint.make(tok, regex="a")
    kept = weakref.ref(tok)
    del tok
    gc.collect()
    assert kept() is None


def test_a_vocabulary_that_cannot_write_what_is_asked_for() -> None:
    tok = Tokenizer.train(["aab"], algorithm="characters", show_progress=False)
    assert Constraint.make(tok, regex="a+b").allowed().sum() == 1
    with pytest.raises(UsageError, match="regex: no answer can satisfy it"):
        Constraint.make(tok, regex="c+")


# ---- what a stranger might send


def chain(rule: str, last: str, count: int) -> str:
    """Rules that each need the next."""
    name = rule[0]
    rules = (f"{name}{n}: {rule.replace('NEXT', f'{name}{n + 1}')[2:]}\n" for n in range(count))
    return f"start: {name}0\n{''.join(rules)}{name}{count}: {last}"


EITHER = [{"anyOf": [{"required": [f"p{n}{letter}"]} for letter in "abcd"]} for n in range(15)]
CHAIN = {f"a{n}": {"$ref": f"#/$defs/a{n + 1}"} for n in range(6000)}
HOSTILE: list[tuple[str, str, Any, str]] = [
    ("10 MB", "json_schema", json.dumps({"enum": ["x" * 10_000_000]}), "10,000,014 bytes"),
    ("deep", "json_schema", '{"items":' * 10_000 + "{}" + "}" * 10_000, "nested 10,001 deep"),
    ("deep array", "json_schema", '{"enum":' + "[" * 10_000 + "]" * 10_000 + "}", "nested 10,001 deep"),
    ("itself", "json_schema", {"$ref": "#"}, "no answer can satisfy"),
    ("endless", "json_schema", {"properties": {"a": {"$ref": "#"}}, "required": ["a"], "type": "object"}, ""),
    ("chain", "json_schema", {"$defs": {**CHAIN, "a6000": {}}, "$ref": "#/$defs/a0"}, "too much memory"),
    ("divisor", "json_schema", {"type": "integer", "multipleOf": 1_000_003}, "it takes longer than 1 s to compile"),
    (
        "intersection",
        "json_schema",
        {"allOf": [{"type": "string", "pattern": f"a.{{{n}}}b"} for n in range(50)]},
        "it takes longer than 1 s to compile",
    ),
    ("product", "json_schema", {"allOf": EITHER}, ""),
    ("nobody", "json_schema", {"type": "integer", "minimum": 3, "maximum": 2}, "no answer can satisfy it (minimum"),
    ("false", "json_schema", "false", "no answer can satisfy it (schema is false)"),
    ("elsewhere", "json_schema", {"$ref": "http://127.0.0.1:9/x.json"}, "does not fetch"),
    ("word", "json_schema", {"not": {}}, "not"),
    ("type", "json_schema", {"type": "wat"}, "Invalid type: wat."),
    ("list", "json_schema", "[1]", "a schema is an object"),
    ("cut", "json_schema", '{"type"', "delimiter"),
    ("set", "json_schema", {"enum": {1}}, "cannot be written as JSON"),
    ("NaN", "json_schema", {"const": float("nan")}, "cannot be written as JSON"),
    ("surrogate", "regex", "a\ud800", "character 1 is a lone surrogate"),
    ("number", "regex", 7, "a text is expected, not int"),
    ("group", "regex", "(", "unclosed group"),
    ("look-ahead", "regex", "(?=a)b", "look-around"),
    ("back-reference", "regex", r"(a)\1", "backreferences are not supported"),
    ("never", "regex", r"[^\s\S]", "no answer can satisfy"),
    ("parentheses", "regex", "(" * 5000 + ")" * 5000, "nested 5,000 deep"),
    ("long", "regex", "a" * 1_000_000, "1,000,000 bytes"),
    ("power", "regex", "((a{1,1000}){1,1000}){1,1000}", ""),
    ("optional", "regex", "(a?){10000}a{10000}", ""),
    ("no start", "grammar", 'rule: "a"', "no start rule"),
    ("unending", "grammar", "start: start", "no answer can satisfy"),
    ("exponential", "grammar", chain("A NEXT NEXT", '"x"', 40), "too big"),
    ("rules", "grammar", chain("a NEXT NEXT", '"x"', 40), ""),
    ("long chain", "grammar", chain('A "z" NEXT', '"x"', 6000), "too much memory"),
    ("ambiguous", "grammar", 'start: x\nx: x x x | x x | "a" | ""', ""),
    ("file", "grammar", "%import /etc/passwd\nstart: INT", "Expected name"),
    ("EBNF", "grammar", "root ::= (", ""),
    ("EBNF deep", "grammar", "root ::= " + "(" * 9000 + '"a"' + ")" * 9000, "nested 9,000 deep"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "given", "said"), [case[1:] for case in HOSTILE], ids=[case[0] for case in HOSTILE])
def test_what_a_stranger_sends_is_refused_in_one_line_or_served(
    kind: str, given: Any, said: str, tokenizer: Tokenizer
) -> None:
    began, error = time.monotonic(), None
    try:
        constraint = Constraint.make(tokenizer, **{kind: given})
    except UsageError as raised:
        error = str(raised)
    else:
        for step in range(60):
            allowed = constraint.allowed().nonzero()[:, 0].tolist()
            if not allowed:
                assert constraint.problem or constraint.finished()
                break
            constraint.advance(allowed[step % len(allowed)])
    assert time.monotonic() - began < 6.0  # about 1.1 s on a machine with nothing else to do
    if error is None:
        assert not said, "this was to be refused"
        return
    assert error.startswith(f"{kind}: ")
    assert said in error
    assert "\n" not in error
    assert len(error) < 300


def test_a_schema_that_holds_itself(tokenizer: Tokenizer) -> None:
    schema: dict[str, Any] = {}
    schema["items"] = schema
    with pytest.raises(UsageError, match="cannot be written as JSON"):
        Constraint.make(tokenizer, json_schema=schema)
    for _ in range(100_000):
        schema = {"items": schema}
    with pytest.raises(UsageError, match=r"json_schema: (nested too deep|it cannot be written)"):
        Constraint.make(tokenizer, json_schema=schema)


def test_limits_by_themselves() -> None:
    for kind, most in MAX_BYTES.items():
        check_limits(kind, "a" * most)
        with pytest.raises(UsageError, match=rf"^{kind}: {most + 1:,} bytes; at most {most:,}"):
            check_limits(kind, "é" * (most // 2) + "a")
    check_limits("json_schema", "[" * MAX_DEPTH + "]" * MAX_DEPTH)
    check_limits("json_schema", "[]" * 1000 + '"' + "[" * 1000 + '\\""')
    with pytest.raises(UsageError, match=f"nested {MAX_DEPTH + 1} deep; at most {MAX_DEPTH}"):
        check_limits("json_schema", '"\\"[' + '"' + "[" * (MAX_DEPTH + 1))


def test_one_of_three_is_given(tokenizer: Tokenizer) -> None:
    with pytest.raises(UsageError, match="nothing to constrain by: give one of json_schema, regex and grammar"):
        Constraint.make(tokenizer)
    with pytest.raises(UsageError, match="regex and grammar are given together"):
        Constraint.make(tokenizer, regex="a", grammar='start: "a"')


def test_without_the_library(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(UsageError, match=r"regex needs the package llguidance: pip install 'groundup\[constraints\]'"):
        Constraint.make(tokenizer, regex="a")


def test_a_published_sentencepiece_vocabulary(shared_data: Path) -> None:
    tok = Tokenizer.load(shared_data / "weights" / "stories260K" / "tok512.bin")
    schema = {"type": "object", "properties": {"naïve": {"enum": ["中", "the cat"]}}, "required": ["naïve"]}
    for seed in range(5):
        answer = walk(Constraint.make(tok, json_schema=schema | {"additionalProperties": False}), tok, seed)
        assert json.loads(answer)["naïve"] in ("中", "the cat")
