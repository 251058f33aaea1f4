"""``.tiktoken`` files: a token in base64 and its rank per line. The rank is the token's id.

The files hold neither the pattern nor the special tokens; for OpenAI's vocabularies both are written down here, as the
``tiktoken`` library (MIT) has them, and the files are known by their SHA-256.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from groundup.runtime.errors import GroundupError, UsageError, nearest, os_errors
from groundup.runtime.files import sha256_file, write_atomic
from groundup.tokenizer.encoder import recover_merges
from groundup.tokenizer.formats.common import UnreadableError, check_tokens, place_tokens, reading
from groundup.tokenizer.pretokenize import CL100K_TIKTOKEN, PATTERNS
from groundup.tokenizer.vocabulary import END_OF_TEXT, Vocabulary


@dataclass(frozen=True)
class Published:
    """A vocabulary that OpenAI publishes.

    Args:
        file: the stem of its file's name.
        sha256: of the file.
        pattern: the regular expression that cuts its text.
        special_tokens: names and ids.
    """

    file: str
    sha256: str
    pattern: str
    special_tokens: Mapping[str, int]


_FIM = ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>")
_HARMONY = {
    "<|startoftext|>": 199998,
    END_OF_TEXT: 199999,
    **{f"<|reserved_{number}|>": number for number in range(200000, 201088)},
}
for _name, _number in {
    "<|return|>": 200002,
    "<|constrain|>": 200003,
    "<|channel|>": 200005,
    "<|start|>": 200006,
    "<|end|>": 200007,
    "<|message|>": 200008,
    "<|call|>": 200012,
}.items():
    del _HARMONY[f"<|reserved_{_number}|>"]
    _HARMONY[_name] = _number
# tiktoken gives 200018 both names; tokenizer.json has room for one, and this is the one that means something.
del _HARMONY["<|reserved_200018|>"]
_HARMONY["<|endofprompt|>"] = 200018

_P50K_SHA256 = "94b5ca7dff4d00767bc256fdd1b27e5b17361d7b8a5f968547f9f23eb70d2069"
_O200K_SHA256 = "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d"

PUBLISHED = {
    "r50k_base": Published(
        "r50k_base",
        "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930",
        PATTERNS["gpt2"],
        {END_OF_TEXT: 50256},
    ),
    "p50k_base": Published("p50k_base", _P50K_SHA256, PATTERNS["gpt2"], {END_OF_TEXT: 50256}),
    "p50k_edit": Published(
        "p50k_base",
        _P50K_SHA256,
        PATTERNS["gpt2"],
        {END_OF_TEXT: 50256, **dict(zip(_FIM, range(50281, 50284), strict=True))},
    ),
    "cl100k_base": Published(
        "cl100k_base",
        "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7",
        CL100K_TIKTOKEN,
        {
            END_OF_TEXT: 100257,
            **dict(zip(_FIM, range(100258, 100261), strict=True)),
            "<|endofprompt|>": 100276,
        },
    ),
    "o200k_base": Published(
        "o200k_base", _O200K_SHA256, PATTERNS["o200k"], {END_OF_TEXT: 199999, "<|endofprompt|>": 200018}
    ),
    "o200k_harmony": Published("o200k_base", _O200K_SHA256, PATTERNS["o200k"], _HARMONY),
}

NAMES = {**{name.removesuffix("_base"): name for name in PUBLISHED}, **{name: name for name in PUBLISHED}}
"""What a published vocabulary may be called."""


def published(name: str) -> Published:
    """The published vocabulary of a name.

    Raises:
        UsageError: there is none.
    """
    if name not in NAMES:
        raise UsageError(f"unknown vocabulary '{name}'. Known: {', '.join(PUBLISHED)}.{nearest(name, NAMES)}")
    return PUBLISHED[NAMES[name]]


def read(path: Path, pattern: str | None = None) -> Vocabulary:
    """Read a ``.tiktoken`` file.

    Args:
        path: the file.
        pattern: the regular expression that cuts text; None for a file of OpenAI's.

    Raises:
        GroundupError: it cannot be read or is damaged, or is not the file that its name says.
        UsageError: the file is not OpenAI's and there is no pattern.
    """
    digest = sha256_file(path)
    name = next((name for name, entry in PUBLISHED.items() if entry.sha256 == digest), None)
    if name is not None:
        return read_named(path, path.stem if NAMES.get(path.stem) in _of(digest) else name)
    if pattern is None:
        if path.stem in NAMES:
            raise GroundupError(
                f"{path}: damaged, or not OpenAI's {path.stem} (its SHA-256 is {digest[:12]}…, not "
                f"{published(path.stem).sha256[:12]}…). If it is meant to be another vocabulary, give its pattern."
            )
        raise UsageError(f"{path}: a .tiktoken file does not say how text is cut. Give its pattern, such as gpt4.")
    return _read(path, pattern, {})


def read_named(path: Path, name: str) -> Vocabulary:
    """Read one of OpenAI's files as the vocabulary of this name.

    Raises:
        GroundupError: it cannot be read, or is damaged.
        UsageError: there is no such vocabulary.
    """
    entry = published(name)
    vocabulary = _read(path, entry.pattern, entry.special_tokens)
    return replace(vocabulary, eos_token=END_OF_TEXT)


def _of(digest: str) -> list[str]:
    return [name for name, entry in PUBLISHED.items() if entry.sha256 == digest]


def _read(path: Path, pattern: str, special_tokens: Mapping[str, int]) -> Vocabulary:
    with os_errors(path, "cannot read tokenizer"):
        data = path.read_bytes()
    with reading(path, ".tiktoken file"):
        by_id = _whole(data) or _line_by_line(data)
        vocabulary = Vocabulary(
            "bpe", place_tokens(by_id, special_tokens), pattern, special_tokens=dict(special_tokens), whole_words=True
        )
        check_tokens(vocabulary)
    return vocabulary


def _whole(data: bytes) -> dict[int, bytes] | None:
    """The tokens by rank of a file in which all is well; None for one that has to be read line by line."""
    words = data.split()
    if len(words) != 2 * data.count(b"\n"):
        return None
    try:
        tokens = [binascii.a2b_base64(word, strict_mode=True) for word in words[::2]]
        by_id = dict(zip(map(int, words[1::2]), tokens, strict=True))
    except ValueError:
        return None
    well = len(by_id) == len(set(tokens)) == len(tokens) and all(tokens) and min(by_id, default=0) >= 0
    return by_id if well else None


def _line_by_line(data: bytes) -> dict[int, bytes]:
    """The tokens by rank of a file, or the line that is wrong.

    Raises:
        UnreadableError: a line is not a token and its rank, or repeats one.
    """
    by_id: dict[int, bytes] = {}
    line_of: dict[bytes, int] = {}
    for number, line in enumerate(data.split(b"\n"), start=1):
        if not line.strip():
            continue
        token, rank = _token_and_rank(line, number)
        if rank in by_id:
            raise UnreadableError(f"line {number}: the rank {rank} was there before; the file is damaged")
        if token in line_of:
            raise UnreadableError(f"line {number}: the token {token!r} was there before, in line {line_of[token]}")
        by_id[rank] = token
        line_of[token] = number
    return by_id


def _token_and_rank(line: bytes, number: int) -> tuple[bytes, int]:
    parts = line.split()
    if len(parts) != 2:
        raise UnreadableError(f"line {number} is not a token and its rank; the file is damaged or cut short")
    try:
        token = base64.b64decode(parts[0], validate=True)
    except binascii.Error as error:
        raise UnreadableError(f"line {number}: {parts[0][:40].decode('ascii', 'replace')} is not base64") from error
    if not token or not parts[1].isdigit() or len(parts[1]) > 9:
        raise UnreadableError(f"line {number} is not a token and its rank; the file is damaged")
    return token, int(parts[1])


def write(path: Path, vocabulary: Vocabulary) -> None:
    """Write the ordinary tokens of a byte-pair vocabulary as a ``.tiktoken`` file.

    Args:
        path: the file.
        vocabulary: with its merges.

    Raises:
        GroundupError: tiktoken would make other ids of it, or the place cannot be written.
    """
    if reason := _why_not(vocabulary):
        raise GroundupError(f"{path}: a .tiktoken file cannot hold this tokenizer: {reason}.")
    lines = [base64.b64encode(vocabulary.tokens[number]) + b" %d\n" % number for number in vocabulary.ordinary_ids()]
    write_atomic(path, b"".join(lines))


def _why_not(vocabulary: Vocabulary) -> str | None:
    """What tiktoken would do in another way."""
    if vocabulary.kind != "bpe":
        return f"its algorithm is {vocabulary.kind}, not byte-pair encoding"
    if vocabulary.normalization:
        return f"it normalizes text ({vocabulary.normalization})"
    if vocabulary.prefix_space:
        return "it puts a space before text"
    if vocabulary.added_tokens:
        return "it has added tokens that are not special"
    if any(set(rules) - {"normalized"} for rules in vocabulary.token_rules.values()):
        return "a special token takes what is beside it into account"
    ordinary = vocabulary.ordinary_ids()
    merges = recover_merges(*vocabulary.with_all_bytes())
    if merges != [tuple(pair) for pair in vocabulary.merges or ()]:
        return "its ids are not the ranks of its merges"
    longer = sum(len(vocabulary.tokens[number]) > 1 for number in ordinary)
    if not vocabulary.whole_words and len(merges) != longer:
        return "a token of it is made by no merge, and tiktoken would use it nevertheless"
    return None
