"""llama2.c's tokenizer files (``tokenizer.bin``, ``tok512.bin``): a SentencePiece BPE model as scores and bytes.

Source: ``tokenizer.py`` and ``run.c`` of karpathy/llama2.c. An int32, the most bytes a token has; then for each token a
float32 score, an int32 length and the bytes. Ids 0, 1 and 2 are the unknown token, the beginning and the end of a text;
3 to 258 are the single bytes, where the file has them.

``run.c`` encodes as the SentencePiece library does: a space in front, then the two neighbours that make the token of
the best score are merged, the leftmost on ties, and a character without a token becomes its bytes. So the library
encodes here too, on a model written from the file. In one place they differ: a ``▁`` (U+2581) in a text is a space to
the library, and its three bytes to ``run.c``.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from groundup.runtime.errors import os_errors
from groundup.tokenizer.formats import sentencepiece
from groundup.tokenizer.formats.common import UnreadableError, reading
from groundup.tokenizer.formats.sentencepiece import BYTE, CONTROL, NORMAL, SPACE, UNKNOWN, UNUSED
from groundup.tokenizer.vocabulary import Vocabulary

SUFFIX = ".bin"
PATTERN = "tok*.bin"
LONGEST_TOKEN = 1 << 16  # bytes
_SPECIAL = ("<unk>", "<s>", "</s>")
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def read(path: Path) -> Vocabulary:
    """Read a tokenizer of llama2.c.

    ``<s>`` stands before a text, and ends one too: ``run.c`` stops there, because the stories that its models were
    trained on follow each other with nothing but ``<s>`` between them.

    Raises:
        GroundupError: it cannot be read, or is damaged or of another kind, or the library is not installed.
    """
    with os_errors(path, "cannot read tokenizer"):
        data = path.read_bytes()
    with reading(path, "tokenizer of llama2.c"):
        tokens = list(_tokens(data))
        vocabulary = sentencepiece.vocabulary_of(_model(tokens), add_bos=True)
    return replace(vocabulary, eos_token=vocabulary.bos_token)


def _tokens(data: bytes) -> Iterator[tuple[float, str]]:
    """Score and text of each token, as SentencePiece spells them.

    Raises:
        UnreadableError: the file is cut short, or is none of llama2.c's.
    """
    if len(data) < 4:
        raise UnreadableError("this tokenizer of llama2.c is cut short")
    (longest,) = struct.unpack_from("<i", data)
    if not 0 < longest <= LONGEST_TOKEN:
        raise UnreadableError(f"this is no tokenizer of llama2.c: its longest token would have {longest} bytes")
    at, number = 4, 0
    while at < len(data):
        if len(data) - at < 8:
            raise UnreadableError(f"this tokenizer of llama2.c is cut short in token {number}")
        score, length = struct.unpack_from("<fi", data, at)
        at += 8
        if not 0 < length <= longest or not math.isfinite(score):
            raise UnreadableError(
                f"this is no tokenizer of llama2.c, or is damaged: token {number} has {length} bytes and score {score}"
            )
        if len(data) - at < length:
            raise UnreadableError(f"this tokenizer of llama2.c is cut short in token {number}")
        yield score, _spelled(number, data[at : at + length])
        at += length
        number += 1


def _spelled(number: int, token: bytes) -> str:
    if number in (1, 2):  # written for the screen, with line breaks around the name
        return _SPECIAL[number]
    try:
        return token.decode("utf-8").replace(" ", SPACE)
    except UnicodeDecodeError as error:
        raise UnreadableError(f"token {number} of this tokenizer of llama2.c is not UTF-8 text: {token!r}") from error


def _model(tokens: list[tuple[float, str]]) -> bytes:
    """A ModelProto of these tokens.

    Raises:
        UnreadableError: one is missing or there twice.
    """
    if len(tokens) < 4:
        raise UnreadableError(f"a tokenizer of llama2.c has more than {len(tokens)} tokens")
    texts = [text for _, text in tokens]
    if len(set(texts)) < len(texts):
        twice = next(text for number, text in enumerate(texts) if text in texts[:number])
        raise UnreadableError(f"this tokenizer of llama2.c has the token {twice!r} twice")
    has_bytes = texts[3:259] == _BYTES
    ordinary = texts[259 if has_bytes else 3 :]
    characters = {text for text in ordinary if len(text) == 1}
    _, model_pb2 = sentencepiece.library()
    proto = model_pb2.ModelProto()
    for number, (score, text) in enumerate(tokens):
        kind = UNKNOWN if number == 0 else CONTROL if number < 3 else BYTE if has_bytes and number < 259 else NORMAL
        if kind == NORMAL and not characters.issuperset(text):
            # run.c never makes it: it lacks a token for one of the characters. The library would; last of all, and
            # taken apart again at once, it does no harm.
            score, kind = -1e30, UNUSED
        proto.pieces.add(piece=_SPECIAL[number] if number < 3 else text, score=score, type=kind)
    trainer = proto.trainer_spec
    trainer.model_type = model_pb2.TrainerSpec.BPE
    trainer.vocab_size = len(tokens)
    trainer.byte_fallback = has_bytes
    trainer.unk_id, trainer.bos_id, trainer.eos_id, trainer.pad_id = 0, 1, 2, -1
    trainer.unk_piece, trainer.bos_piece, trainer.eos_piece = _SPECIAL
    proto.normalizer_spec.name = "identity"
    proto.normalizer_spec.add_dummy_prefix = True
    proto.normalizer_spec.remove_extra_whitespaces = False
    return bytes(proto.SerializeToString())
