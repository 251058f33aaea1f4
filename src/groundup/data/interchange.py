"""A prepared corpus written as token files of nanoGPT or Megatron-LM, and theirs read as a prepared corpus.

What the files look like stands in token_files.py.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Literal, cast

import numpy as np

from groundup.data.permutation import Permutation, derive_key
from groundup.data.pipeline import check_place
from groundup.data.prepared import DECODED, DROPPED, FORMAT, PARTS, STATS, VERSION, PreparedData
from groundup.data.recipe import CorpusRecipe
from groundup.data.shards import ShardWriter, TokenArray, TokenSet
from groundup.data.split import MIN_GROUPS
from groundup.data.token_files import CHUNK, Ids, Int64Array, TokenFile, id_type, write_megatron_index
from groundup.runtime import GroundupError, UsageError, atomic_folder, os_errors, progress, read_json, write_json
from groundup.tokenizer import Tokenizer

Layout = Literal["nanogpt", "megatron"]
META = "meta.json"
NANOGPT_VOCABULARY = 50_304
"""What nanoGPT takes for the size of a vocabulary where no meta.pkl says another."""

_EXPORT = "groundup export"
_GIVE_UP = 64  # documents too large for what is left to hold out, one after another, before it is enough


# ---- writing


def export_tokens(prepared: PreparedData, out: Path, layout: Layout) -> list[Path]:
    """Write both parts of a corpus as another project reads them, with the tokenizer beside them.

    ``meta.json`` says what the files themselves do not: the vocabulary, the end-of-text id and the tokenizer's
    fingerprint. nanoGPT itself looks into ``meta.pkl`` for the size of the vocabulary, and takes 50,304 where there is
    none; we write no pickle.

    Args:
        prepared: what to write.
        out: a folder that is not there or empty, or an export made before, which is replaced.
        layout: ``nanogpt`` or ``megatron``.

    Returns:
        The token files: ``train.bin`` and ``val.bin``; for Megatron each followed by its ``.idx``.

    Raises:
        UsageError: nanoGPT's 16 bits cannot hold the vocabulary.
        GroundupError: ``out`` holds other things or cannot be written, or a document is longer than Megatron can say.
    """
    out, size = Path(out).expanduser(), prepared.tokenizer.vocab_size
    if layout == "nanogpt" and size > 1 << 16:
        raise UsageError(
            f"{prepared.folder}: {size:,} tokens do not fit into nanoGPT's 16 bits. Export it with --to megatron."
        )
    _check_export_place(out)
    dtype, names = id_type(layout, size), []
    with atomic_folder(out) as folder, progress("exporting", _n_tokens(prepared), "tokens") as bar:
        for part, tokens in zip(PARTS, (prepared.train, prepared.val), strict=True):
            path = folder / f"{part}.bin"
            with os_errors(path, "cannot write"), open(path, "wb") as file:
                for start in range(0, tokens.n_tokens, CHUNK):
                    ids = tokens.read(start, min(CHUNK, tokens.n_tokens - start))
                    ids.astype(dtype).tofile(file)
                    bar.advance(len(ids))
            names.append(path.name)
            if layout == "megatron":
                write_megatron_index(path.with_suffix(".idx"), tokens, dtype)
                names.append(f"{part}.idx")
        prepared.tokenizer.save(folder / "tokenizer")
        about = {
            "format": _EXPORT,
            "layout": layout,
            "tokenizer": prepared.tokenizer.fingerprint,
            "vocab_size": size,
            "end_of_text_id": prepared.train.end_of_text_id,
            "tokens": {"train": prepared.train.n_tokens, "val": prepared.val.n_tokens},
        }
        write_json(folder / META, about)
    return [out / name for name in names]


def _n_tokens(prepared: PreparedData) -> int:
    return prepared.train.n_tokens + prepared.val.n_tokens


def _check_export_place(out: Path) -> None:
    """Refuse to replace a folder that is not an export."""
    with os_errors(out, "cannot read"):
        if not out.exists() or not any(out.iterdir()):
            return
    if _export_note(out) is None:
        raise GroundupError(f"{out}: this folder holds other things, and would be replaced. Choose another.")


def _export_note(folder: Path) -> dict[str, object] | None:
    """The ``meta.json`` of one of our own exports."""
    path = folder / META
    noted = read_json(path, "note of an export") if path.is_file() else None
    return noted if isinstance(noted, dict) and noted.get("format") == _EXPORT else None


# ---- reading


def import_tokens(file: Path, tokenizer: Tokenizer, out: Path, corpus: CorpusRecipe | None = None) -> PreparedData:
    """Turn token files of nanoGPT, llm.c or Megatron-LM into a prepared corpus.

    The files are read three times: to check every id, to measure the documents, and to write them. Texts are not
    written: :meth:`PreparedData.texts` decodes the tokens.

    Args:
        file: a ``.bin``, with its ``.idx`` beside it where it is Megatron's; the path without the ending; or a folder
            of them, where names with ``val`` are the part held out. Where there are none of these, whole documents are
            held out, or the end where there are few.
        tokenizer: the one that made the ids; the files do not say.
        out: the folder to make.
        corpus: ``val_fraction``, ``max_val_bytes``, ``split_seed`` and ``shard_tokens`` of it are followed.

    Raises:
        GroundupError: a file is missing, damaged, or has ids that the tokenizer does not have; the tokenizer has no
            end-of-text token; ``out`` cannot be written or holds something else.
    """
    corpus, file, out = corpus or CorpusRecipe(), Path(file).expanduser(), Path(out).expanduser()
    check_place(out)
    end = tokenizer.end_of_text_id
    if end is None:
        raise GroundupError("this tokenizer has no <|endoftext|> token to put between documents. Use one that has.")
    files = [TokenFile.open(path) for path in _token_files(file)]
    train, val = ([one for one in files if ("val" in one.path.stem.lower()) == held] for held in (False, True))
    if not train:
        raise GroundupError(f"{file}: only {val[0].path.name}, nothing to train on. Rename it if it is for training.")
    with progress("checking ids", sum(len(one.ids) for one in files), "tokens") as bar:
        for one in files:
            _check_ids(one, tokenizer, bar.advance)
    started = time.perf_counter()
    parts, way = _parts(train, val, tokenizer, corpus)
    with atomic_folder(out) as folder, progress("importing", sum(len(one.ids) for one in files), "tokens") as bar:
        for part, documents in zip(PARTS, parts, strict=True):
            (folder / part).mkdir()
            writer, size = ShardWriter(folder / part, tokenizer, corpus.shard_tokens), _measure(tokenizer)
            for ids in documents:
                writer.add(cast(TokenArray, ids), size(ids))
                bar.advance(len(ids) + 1)
            writer.close()
        tokenizer.save(folder / "tokenizer")
        (folder / DROPPED).touch()
        written = {part: TokenSet.open(folder / part) for part in PARTS}
        if empty := [part for part, tokens in written.items() if not tokens.n_tokens]:
            raise GroundupError(f"{file}: nothing for the part {empty[0]}: there are too few tokens in it.")
        stats = {
            "format": FORMAT,
            "version": VERSION,
            "source": {"name": file.name, "description": f"token ids, as {files[0].layout} writes them"},
            "documents": {part: tokens.n_documents for part, tokens in written.items()},
            "bytes": {part: tokens.n_bytes for part, tokens in written.items()},
            "skipped": {},
            "dropped": {},
            "split": way,
            "vocab_size": tokenizer.vocab_size,
            "tokens": {part: tokens.n_tokens for part, tokens in written.items()},
            "bytes_per_token": {part: round(one.n_bytes / one.n_tokens, 4) for part, one in written.items()},
            "seconds": {"import": round(time.perf_counter() - started, 3)},
            "texts": DECODED,
            "inputs": {"data": str(file), "tokenizer": tokenizer.fingerprint, "corpus": asdict(corpus)},
        }
        write_json(folder / STATS, stats)
    return PreparedData.open(out)


def _token_files(file: Path) -> list[Path]:
    if file.is_dir():
        if found := sorted(file.glob("*.bin")):
            return found
        raise GroundupError(f"{file}: no token files (*.bin) in this folder.")
    for path in (file, file.with_name(file.name + ".bin"), file.with_suffix(".bin")):
        if path.is_file() and path.suffix != ".idx":
            return [path]
    raise GroundupError(f"{file}: no such file or folder. Name a .bin file of token ids, or a folder of them.")


def _check_ids(one: TokenFile, tokenizer: Tokenizer, done: Callable[[float], None]) -> None:
    """Hold a file against the tokenizer that is said to have made it.

    Raises:
        GroundupError: an id is none of its tokens, or the file is an export of ours that notes another tokenizer.
    """
    noted = _export_note(one.path.parent)
    if noted is not None and noted.get("tokenizer") != tokenizer.fingerprint:
        raise GroundupError(
            f"{one.path}: exported with another tokenizer than the given one. Give the one in "
            f"{one.path.parent / 'tokenizer'}."
        )
    known = np.array([bool(token) for token in tokenizer.vocabulary.tokens])
    for low in range(0, len(one.ids), CHUNK):
        ids = one.ids[low : low + CHUNK]
        inside = (ids >= 0) & (ids < len(known))
        if not inside.all() or not known[ids].all():
            wrong = int(np.argmin(inside & known[np.where(inside, ids, 0)]))
            raise GroundupError(
                f"{one.path}: token {low + wrong:,} has the id {ids[wrong]}, which is none of the given tokenizer's "
                f"{tokenizer.vocab_size:,}. Give the tokenizer that made the file."
            )
        done(len(ids))


def _measure(tokenizer: Tokenizer) -> Callable[[Ids], int]:
    """How many bytes of text the ids of a document stand for."""
    if tokenizer.vocabulary.kind == "sentencepiece":  # whose tokens are not written as they are spelled
        return lambda ids: len(tokenizer.decode_bytes(ids))
    lengths = np.array([len(token) for token in tokenizer.vocabulary.tokens], np.int64)
    return lambda ids: int(lengths[ids].sum())


def _parts(
    train: list[TokenFile], val: list[TokenFile], tokenizer: Tokenizer, corpus: CorpusRecipe
) -> tuple[tuple[Iterator[Ids], Iterator[Ids]], str]:
    """The documents to train on, those held out, and the way they were told apart."""
    end, size = cast(int, tokenizer.end_of_text_id), _measure(tokenizer)

    def read(files: list[TokenFile]) -> Iterator[Ids]:
        return (ids for one in files for ids in one.texts(end))

    if val:
        return (read(train), read(val)), "as given"
    pairs = chain.from_iterable((size(ids), len(ids)) for ids in read(train))
    measured = np.fromiter(pairs, np.int64).reshape(-1, 2)
    n_bytes, n_tokens = measured.sum(axis=0).tolist()
    wanted = min(int(corpus.val_fraction * n_bytes), corpus.max_val_bytes)
    if len(measured) >= MIN_GROUPS and (picked := _pick(measured[:, 0], wanted, corpus.split_seed)):
        return (_whole(read(train), picked, False), _whole(read(train), picked, True)), "by document"
    at = n_tokens - max(1, round(n_tokens * wanted / max(1, n_bytes)))
    return (_cut(read(train), at, "train"), _cut(read(train), at, "val")), "end of the file"


def _pick(sizes: Int64Array, wanted: int, split_seed: int) -> set[int]:
    """The documents to hold out, in a keyed order: at most ``wanted`` bytes, and none where half of that is not met."""
    order = Permutation(len(sizes), derive_key(split_seed))
    picked: set[int] = set()
    left, passed = wanted, 0
    for low in range(0, len(sizes), 1024):
        for number in order(np.arange(low, min(low + 1024, len(sizes)))).tolist():
            if sizes[number] <= left:
                picked.add(number)
                left, passed = left - int(sizes[number]), 0
            else:
                passed += 1
        if passed >= _GIVE_UP:
            break
    return picked if left <= wanted / 2 else set()


def _whole(documents: Iterable[Ids], picked: set[int], held_out: bool) -> Iterator[Ids]:
    return (ids for number, ids in enumerate(documents) if (number in picked) == held_out)


def _cut(documents: Iterable[Ids], at: int, part: str) -> Iterator[Ids]:
    """What lies before or after the first ``at`` tokens."""
    for ids in documents:
        inside = min(max(at, 0), len(ids))
        at -= len(ids)
        piece = ids[:inside] if part == "train" else ids[inside:]
        if len(piece):
            yield piece
