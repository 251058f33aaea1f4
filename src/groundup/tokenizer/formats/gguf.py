"""The vocabulary in a GGUF file (llama.cpp's format): read from the head of the file, and written as named values.

Two kinds are known: ``gpt2``, byte-level BPE whose pattern the file names, and ``llama``, a SentencePiece BPE model
whose pieces, scores and types the file holds.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from groundup.runtime.errors import UsageError, nearest, os_errors
from groundup.runtime.gguf_file import read_gguf
from groundup.tokenizer.alphabet import from_characters, to_characters
from groundup.tokenizer.formats import sentencepiece
from groundup.tokenizer.formats.common import UnreadableError, check_merges, check_tokens, place_tokens, reading
from groundup.tokenizer.formats.huggingface import DIGITS
from groundup.tokenizer.formats.sentencepiece import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED
from groundup.tokenizer.pretokenize import PATTERNS
from groundup.tokenizer.vocabulary import END_OF_TEXT, Normalization, Vocabulary


class Cutting(NamedTuple):
    """How text is treated before merging."""

    pattern: str
    normalization: Normalization | None = None
    whole_words: bool = False
    begins: bool = False
    """Whether a text begins with the beginning-of-text token where the file does not say."""


_QWEN2 = PATTERNS["cl100k"].replace(r"\p{N}{1,3}", r"\p{N}")
_LLAMA3 = Cutting(PATTERNS["cl100k"], whole_words=True, begins=True)

CUTTINGS = {
    "gpt-2": Cutting(PATTERNS["gpt2"]),
    "phi-2": Cutting(PATTERNS["gpt2"]),
    "roberta-bpe": Cutting(PATTERNS["gpt2"]),
    "mpt": Cutting(PATTERNS["gpt2"], "NFC"),
    "olmo": Cutting(PATTERNS["gpt2"], "NFC"),
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "llama-bpe": _LLAMA3,
    "qwen2": Cutting(_QWEN2, "NFC"),
    "dbrx": Cutting(PATTERNS["cl100k"]),
    "gpt-4o": Cutting(PATTERNS["o200k"]),
    "starcoder": Cutting(DIGITS),
    "refact": Cutting(DIGITS),
    "smollm": Cutting(DIGITS),
    "command-r": Cutting(DIGITS, "NFC"),
}
"""What the names in ``tokenizer.ggml.pre`` stand for, as the models' own tokenizer.json have it."""


def read(path: Path, pattern: str | None = None) -> Vocabulary:
    """Read the vocabulary of a GGUF file.

    Args:
        path: the file.
        pattern: the regular expression that cuts text; None for the one that the file names.

    Raises:
        GroundupError: it cannot be read, is damaged, or its vocabulary is of another kind.
        UsageError: it names a pattern that is not known here.
    """
    with os_errors(path, "cannot read tokenizer"), reading(path, "GGUF file"):
        fields = {
            name.removeprefix("tokenizer."): value
            for name, value in read_gguf(path).fields.items()
            if name.startswith("tokenizer.")
        }
        model = fields.get("ggml.model")
        if model == "gpt2":
            return _bpe(path, fields, pattern)
        if model == "llama":
            return _spm(fields)
        raise UnreadableError(
            f"its vocabulary is of kind {model}; gpt2 (byte-level BPE) and llama (SentencePiece) can be read"
        )


def _bpe(path: Path, fields: dict[str, Any], pattern: str | None) -> Vocabulary:
    name = fields.get("ggml.pre", "default")
    if name not in CUTTINGS and pattern is None:
        raise UsageError(
            f"{path}: it cuts text the way that llama.cpp calls '{name}', which is not known here. Give its pattern."
            f"{nearest(name, CUTTINGS)}"
        )
    cutting = CUTTINGS.get(name, Cutting(pattern or ""))
    written: list[str] = fields["ggml.tokens"]
    types: list[int] = fields.get("ggml.token_type") or [NORMAL] * len(written)
    marked = {fields[key] for key in ("ggml.bos_token_id", "ggml.eos_token_id") if key in fields}
    special, added, ordinary = dict[str, int](), dict[str, int](), dict[str, int]()
    for number, (token, kind) in enumerate(zip(written, types, strict=True)):
        if kind in (CONTROL, UNKNOWN) or number in marked:
            special[token] = number
        elif kind == USER_DEFINED:
            added[token] = number
        elif kind != UNUSED:
            ordinary[token] = number
    by_id: dict[int, bytes] = {}
    for token, number in ordinary.items():
        as_bytes = from_characters(token)
        if not as_bytes:
            raise UnreadableError(f"the token {token!r} is not byte-level text")
        by_id[number] = as_bytes
    begin, end = fields.get("ggml.bos_token_id"), fields.get("ggml.eos_token_id")
    names = {number: token for token, number in special.items()}
    vocabulary = Vocabulary(
        "bpe",
        place_tokens(by_id, special | added),
        pattern or cutting.pattern,
        check_merges(fields.get("ggml.merges", ()), ordinary | added),
        special,
        added,
        whole_words=cutting.whole_words,
        normalization=cutting.normalization,
        prefix=(begin,) if begin is not None and fields.get("ggml.add_bos_token", cutting.begins) else (),
        suffix=(end,) if end is not None and fields.get("ggml.add_eos_token", False) else (),
        bos_token=names.get(begin) if begin is not None else None,
        eos_token=names.get(end) if end is not None else None,
        chat_template=fields.get("chat_template"),
    )
    check_tokens(vocabulary)
    return vocabulary


def _spm(fields: dict[str, Any]) -> Vocabulary:
    """Write the SentencePiece model that the file was made from, as far as encoding needs it."""
    _, model_pb2 = sentencepiece.library()
    pieces, scores, types = fields["ggml.tokens"], fields["ggml.scores"], fields["ggml.token_type"]
    proto = model_pb2.ModelProto()
    for piece, score, kind in zip(pieces, scores, types, strict=True):
        proto.pieces.add(piece=piece, score=score, type=kind)
    trainer = proto.trainer_spec
    trainer.model_type = model_pb2.TrainerSpec.BPE
    trainer.vocab_size = len(pieces)
    trainer.byte_fallback = BYTE in types
    for role, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        number = fields.get(f"ggml.{key}_token_id", types.index(UNKNOWN) if role == "unk" else -1)
        setattr(trainer, f"{role}_id", number)
        if number >= 0:
            setattr(trainer, f"{role}_piece", pieces[number])
    proto.normalizer_spec.name = "identity"
    proto.normalizer_spec.add_dummy_prefix = fields.get("ggml.add_space_prefix", True)
    proto.normalizer_spec.remove_extra_whitespaces = False
    vocabulary = sentencepiece.vocabulary_of(
        proto.SerializeToString(),
        add_bos=fields.get("ggml.add_bos_token", True),
        add_eos=fields.get("ggml.add_eos_token", False),
    )
    template = fields.get("chat_template")
    return vocabulary if template is None else replace(vocabulary, chat_template=template)


# ---- writing


def fields_of(vocabulary: Vocabulary, vocab_size: int) -> dict[str, Any]:
    """What a GGUF file says of a vocabulary: named values, as ``tokenizer.ggml.tokens``.

    Args:
        vocabulary: with its merges.
        vocab_size: of the model; ids past the vocabulary's become tokens that are out of use.

    Raises:
        UsageError: llama.cpp has no word for the vocabulary's kind, or for how it treats text.
    """
    if vocab_size < len(vocabulary.tokens):
        raise UsageError(f"the tokenizer has {len(vocabulary.tokens):,} tokens, the model {vocab_size:,}: too few.")
    if vocabulary.kind == "bpe":
        fields = _bpe_fields(vocabulary, vocab_size)
    elif vocabulary.kind == "sentencepiece":
        fields = _spm_fields(vocabulary, vocab_size)
    else:
        raise UsageError(f"a tokenizer of {vocabulary.kind} has no place in a GGUF file; BPE and SentencePiece have.")
    for key, name in (("bos", vocabulary.bos_token), ("eos", vocabulary.eos_token or END_OF_TEXT)):
        if (number := vocabulary.special_tokens.get(name or "")) is not None:
            fields[f"ggml.{key}_token_id"] = number
    fields |= {"ggml.add_bos_token": bool(vocabulary.prefix), "ggml.add_eos_token": bool(vocabulary.suffix)}
    if vocabulary.chat_template is not None:
        fields["chat_template"] = vocabulary.chat_template
    return {f"tokenizer.{name}": value for name, value in fields.items()}


def _bpe_fields(vocabulary: Vocabulary, vocab_size: int) -> dict[str, Any]:
    told = Cutting(vocabulary.pattern, vocabulary.normalization, vocabulary.whole_words)
    named = (name for name, known in CUTTINGS.items() if known._replace(begins=False) == told)
    name = next(named, None)
    if name is None or vocabulary.prefix_space:
        raise UsageError(
            "llama.cpp has no name for the way this tokenizer cuts text, and its files hold no patterns. It has one "
            "for gpt2, gpt4 (= cl100k) and o200k without normalization."
        )
    written, types = _outside(vocabulary, vocab_size)
    for number in vocabulary.ordinary_ids():
        if types[number] != USER_DEFINED:
            written[number], types[number] = to_characters(vocabulary.tokens[number]), NORMAL
    merges = [f"{written[left]} {written[right]}" for left, right in vocabulary.merges or ()]
    return {
        "ggml.model": "gpt2",
        "ggml.pre": name,
        "ggml.tokens": written,
        "ggml.token_type": types,
        "ggml.merges": merges,
    }


def _spm_fields(vocabulary: Vocabulary, vocab_size: int) -> dict[str, Any]:
    proto = sentencepiece.parsed(vocabulary.model)
    rules, trainer = proto.normalizer_spec, proto.trainer_spec
    _, model_pb2 = sentencepiece.library()
    if trainer.model_type != model_pb2.TrainerSpec.BPE or BYTE not in {piece.type for piece in proto.pieces}:
        raise UsageError("llama.cpp has SentencePiece's BPE with byte pieces only, which this tokenizer is not.")
    if rules.precompiled_charsmap or rules.remove_extra_whitespaces:
        raise UsageError("llama.cpp does not normalize text, as this SentencePiece tokenizer does.")
    written, types = _outside(vocabulary, vocab_size)
    scores = [0.0] * vocab_size
    for number, piece in enumerate(proto.pieces):
        written[number], types[number], scores[number] = piece.piece, piece.type, piece.score
    fields = {
        "ggml.model": "llama",
        "ggml.pre": "default",
        "ggml.tokens": written,
        "ggml.scores": scores,
        "ggml.token_type": types,
        "ggml.add_space_prefix": bool(rules.add_dummy_prefix),
    }
    return fields if vocabulary.unknown is None else fields | {"ggml.unknown_token_id": vocabulary.unknown}


def _outside(vocabulary: Vocabulary, vocab_size: int) -> tuple[list[str], list[int]]:
    """Texts and types of the tokens that no algorithm makes; all others are out of use so far."""
    written, types = [f"[PAD{number}]" for number in range(vocab_size)], [UNUSED] * vocab_size
    for names, kind in ((vocabulary.added_tokens, USER_DEFINED), (vocabulary.special_tokens, CONTROL)):
        for name, number in names.items():
            written[number], types[number] = name, kind
    return written, types
