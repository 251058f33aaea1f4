"""SentencePiece models (``tokenizer.model``), BPE and unigram, through the ``sentencepiece`` library.

Source: Kudo and Richardson 2018.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from groundup.runtime.errors import GroundupError, os_errors
from groundup.runtime.files import read_json, write_atomic, write_json
from groundup.tokenizer.formats.common import UnreadableError, config_beside, place_tokens, read_config, reading
from groundup.tokenizer.formats.huggingface import (
    TOKENIZER_FILE,
    Added,
    added_entries,
    added_tokens,
    shared_parts,
    write_config,
)
from groundup.tokenizer.vocabulary import Vocabulary

MODEL_FILE = "tokenizer.model"

SPACE = "▁"  # what the library writes for a space
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # the types of pieces, here and in GGUF


def library() -> tuple[Any, Any]:
    """The module ``sentencepiece``, and the one that reads its files.

    Raises:
        GroundupError: it is not installed.
    """
    try:
        import sentencepiece
        from sentencepiece import sentencepiece_model_pb2
    except ImportError as error:
        raise GroundupError(
            f"SentencePiece models need the packages sentencepiece and protobuf ({error}): "
            "pip install 'groundup[tokenizer]'"
        ) from error
    return sentencepiece, sentencepiece_model_pb2


def read(path: Path) -> Vocabulary:
    """Read a SentencePiece model, and from the files beside it what was added to it.

    Raises:
        GroundupError: it cannot be read, or is damaged, or the library is not installed.
    """
    with os_errors(path, "cannot read tokenizer"):
        data = path.read_bytes()
    config = read_config(path.parent)
    document = read_json(path.parent / TOKENIZER_FILE) if (path.parent / TOKENIZER_FILE).is_file() else {}
    with reading(path.parent / TOKENIZER_FILE, TOKENIZER_FILE):
        added = added_tokens(document.get("added_tokens") or [])
    if not added.special and not added.others:
        with reading(path.parent / "tokenizer_config.json", "tokenizer configuration"):
            listed = config.get("added_tokens_decoder") or {}
            added = added_tokens([{"id": int(number), **entry} for number, entry in listed.items()])
    with reading(path, "SentencePiece model"):
        vocabulary = vocabulary_of(data, added, config.get("add_bos_token"), config.get("add_eos_token"))
    return config_beside(path, vocabulary)


def vocabulary_of(
    data: bytes, added: Added | None = None, add_bos: bool | None = None, add_eos: bool | None = None
) -> Vocabulary:
    """The vocabulary of a model.

    Args:
        data: a ModelProto.
        added: tokens that were added to it.
        add_bos: whether a text is to begin with the model's beginning-of-text token; None is yes where it has one.
        add_eos: whether it is to end with its end-of-text token; None is no.

    Raises:
        UnreadableError: it is damaged, or is of a kind that is not supported.
        GroundupError: the library is not installed.
    """
    proto = parsed(data)
    if proto.trainer_spec.treat_whitespace_as_suffix:
        raise UnreadableError("a SentencePiece model that writes spaces after words is not supported")
    added = added or Added({}, {}, {})
    special: dict[str, int] = {}
    by_id: dict[int, bytes] = {}
    known: dict[str, int] = {}
    for number, piece in enumerate(proto.pieces):
        by_id[number] = _piece_bytes(piece)
        known[piece.piece] = number
        if piece.type in (CONTROL, UNKNOWN):
            special[piece.piece] = number
    # A token that is an ordinary piece as well is found by the library itself.
    others = {name: number for name, number in added.others.items() if known.get(name.replace(" ", SPACE)) != number}
    for name, number in added.special.items():
        if number in by_id:
            by_id[number] = name.encode()
    special |= added.special
    begin, end = _id_or_none(proto, "bos"), _id_or_none(proto, "eos")
    return Vocabulary(
        "sentencepiece",
        place_tokens(by_id, special | others),
        special_tokens=special,
        added_tokens=others,
        token_rules={name: rules for name, rules in added.rules.items() if name in special or name in others},
        prefix=(begin,) if begin is not None and add_bos is not False else (),
        suffix=(end,) if end is not None and add_eos else (),
        unknown=next((n for n, piece in enumerate(proto.pieces) if piece.type == UNKNOWN), None),
        bos_token=proto.pieces[begin].piece if begin is not None else None,
        eos_token=proto.pieces[end].piece if end is not None else None,
        model=data,
    )


def parsed(data: bytes) -> Any:
    """A ModelProto from its bytes.

    Raises:
        UnreadableError: it is damaged.
        GroundupError: the library is not installed.
    """
    _, model_pb2 = library()
    proto = model_pb2.ModelProto()
    try:
        proto.ParseFromString(data)
    except Exception as error:  # protobuf's DecodeError, which has no base of its own
        raise UnreadableError(f"this SentencePiece model is damaged or cut short ({error})") from error
    # The two parts after the pieces: a file that was cut between two pieces lacks them.
    if not proto.pieces or not proto.HasField("trainer_spec") or not proto.HasField("normalizer_spec"):
        raise UnreadableError("this SentencePiece model is damaged or cut short, or is another kind of file")
    return proto


def _piece_bytes(piece: Any) -> bytes:
    if piece.type == BYTE:
        return bytes([int(piece.piece.removeprefix("<0x").removesuffix(">"), 16)])
    if piece.type in (CONTROL, UNKNOWN):
        return str(piece.piece).encode()
    return str(piece.piece).replace(SPACE, " ").encode()


def _id_or_none(proto: Any, name: str) -> int | None:
    """The id of a piece that the model names, where it has one."""
    wanted = getattr(proto.trainer_spec, f"{name}_piece")
    return next((n for n, piece in enumerate(proto.pieces) if piece.piece == wanted and piece.type == CONTROL), None)


def write(folder: Path, vocabulary: Vocabulary) -> None:
    """Write tokenizer.model and tokenizer_config.json, and tokenizer.json where that can be exact.

    Raises:
        GroundupError: the place cannot be written.
    """
    proto = parsed(vocabulary.model)
    added = [dict(entry) for entry in added_entries(vocabulary)]
    settings: dict[str, Any] = {
        "add_bos_token": bool(vocabulary.prefix),
        "add_eos_token": bool(vocabulary.suffix),
        "added_tokens_decoder": {str(entry.pop("id")): entry for entry in added},
    }
    if _fits_tokenizer_json(proto):
        write_json(folder / TOKENIZER_FILE, _tokenizer_json(vocabulary, proto))
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    write_atomic(folder / MODEL_FILE, vocabulary.model)
    write_config(folder, vocabulary, settings)


def _fits_tokenizer_json(proto: Any) -> bool:
    """Whether ``tokenizers`` has all that the model does: BPE with byte fallback, and text as it is."""
    rules, types = proto.normalizer_spec, {piece.type for piece in proto.pieces}
    return (
        proto.trainer_spec.model_type == library()[1].TrainerSpec.BPE
        and BYTE in types
        and not types & {USER_DEFINED, UNUSED}
        and not rules.precompiled_charsmap
        and not rules.remove_extra_whitespaces
        and rules.escape_whitespaces
    )


def _tokenizer_json(vocabulary: Vocabulary, proto: Any) -> dict[str, Any]:
    """The content of tokenizer.json: merges by the score of what they make, the highest first, as the library does."""
    ids = {piece.piece: number for number, piece in enumerate(proto.pieces)}
    merges: list[tuple[float, int, int, int, str, str]] = []
    for number, piece in enumerate(proto.pieces):
        halves = ((piece.piece[:cut], piece.piece[cut:]) for cut in range(1, len(piece.piece)))
        if piece.type == NORMAL:
            merges += [
                (-piece.score, number, ids[left], ids[right], left, right)
                for left, right in halves
                if left in ids and right in ids
            ]
    merges.sort()
    names = {number: name for name, number in (*vocabulary.added_tokens.items(), *vocabulary.special_tokens.items())}
    written = [names.get(number) or proto.pieces[number].piece for number in range(len(vocabulary.tokens))]
    space = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    prefix = [{"type": "Prepend", "prepend": SPACE}] if proto.normalizer_spec.add_dummy_prefix else []
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    unspace = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    return {
        **shared_parts(vocabulary, written),
        "normalizer": {"type": "Sequence", "normalizers": [*prefix, space]},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": [unspace, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": proto.trainer_spec.unk_piece,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {text: number for number, text in enumerate(written)},
            "merges": [f"{left} {right}" for *_, left, right in merges],
        },
    }


class SentencePieceEncoder:
    """Text to ids through the library.

    Args:
        vocabulary: of kind ``sentencepiece``.

    Raises:
        GroundupError: the library is not installed, or does not take the model.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        sentencepiece, _ = library()
        try:
            proto = parsed(vocabulary.model)
            self._library = sentencepiece.SentencePieceProcessor(model_proto=vocabulary.model)
        except (UnreadableError, RuntimeError) as error:
            raise GroundupError(f"this SentencePiece model cannot be used ({str(error).splitlines()[0]}).") from error
        self._model = vocabulary.model
        self._tokens = vocabulary.tokens
        self._dtype = np.uint16 if len(vocabulary.tokens) <= 1 << 16 else np.uint32
        names = {*vocabulary.special_tokens.values()} - {vocabulary.unknown}
        self._names = names | {*vocabulary.added_tokens.values()}
        self._bytes = {number for number, piece in enumerate(proto.pieces) if piece.type == BYTE}
        rules = proto.normalizer_spec
        self._space_first = rules.add_dummy_prefix or rules.remove_extra_whitespaces
        self._one_space = rules.remove_extra_whitespaces

    def encode(self, text: str) -> list[int]:
        """Token ids of one text."""
        text.encode()  # the library is no judge of a lone surrogate
        ids: list[int] = self._library.encode(text)
        return ids

    def encode_continued(self, text: str) -> list[int]:
        """Token ids of a text that goes on from another, so that no space is put before it."""
        text.encode()
        ids: list[int] = self._continuing.encode(text)
        return ids

    @cached_property
    def _continuing(self) -> Any:
        proto = parsed(self._model)
        proto.normalizer_spec.add_dummy_prefix = False
        return library()[0].SentencePieceProcessor(model_proto=proto.SerializeToString())

    def encode_batch(self, texts: Sequence[str], threads: int | None = None) -> list[list[int]]:
        """Token ids of each text."""
        for text in texts:
            text.encode()
        ids: list[list[int]] = self._library.encode(list(texts), num_threads=threads or -1)
        return ids

    def encode_array(self, texts: Sequence[str], threads: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Token ids of all texts, one after another, and where each text begins."""
        encoded = self.encode_batch(texts, threads)
        offsets = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
        ids = np.fromiter((number for numbers in encoded for number in numbers), self._dtype, int(offsets[-1]))
        return ids, offsets

    def spans(self, text: str) -> tuple[list[int], list[int]]:
        """Token ids of a text, and the byte (in UTF-8) at which each of them ends."""
        text.encode()
        ids: list[int] = []
        ends: list[int] = []
        pending = 0  # bytes of a character that the library places at its last one
        for piece in self._library.encode_as_proto(text).pieces:
            ids.append(piece.id)
            ends.append(piece.end)
            if piece.id not in self._bytes:
                continue
            pending += 1
            if piece.end > piece.begin:
                for back in range(pending):
                    ends[-1 - back] = max(piece.begin, piece.end - back)
                pending = 0
        return ids, ends

    def written(self, ids: Iterable[int], continued: bool = False) -> Iterator[bytes]:
        """The bytes of each token in its place, names of special tokens included.

        The space that encoding put before a text, or before what follows a special token, is taken away again.
        """
        begins = not continued
        for number in ids:
            token = self._tokens[number]
            if number in self._names:
                begins = True
            elif begins and number not in self._bytes:
                if self._space_first:
                    token = token.removeprefix(b" ")
                begins = self._one_space and not token
            else:
                begins = False
            yield token
