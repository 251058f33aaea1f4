"""Vocabularies by name: from the Hugging Face hub, and OpenAI's. What is fetched is kept, and checked before use."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from groundup.runtime.download import default_data_dir, download
from groundup.runtime.errors import GroundupError, nearest
from groundup.runtime.hub import fetch_file, list_files, parse_hub_spec
from groundup.tokenizer.formats import tiktoken

ADDRESS = "https://openaipublic.blob.core.windows.net/encodings/"
"""Where OpenAI publishes its vocabularies, for tiktoken and for us."""

_INSTEAD = "pass a path to a file you have"
_CONFIGURATION = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")
# Of the files that hold a vocabulary, those of the first line that a repository has are read.
_VOCABULARIES = (
    ("tokenizer.json", "tokenizer.model"),
    ("tokenizer.model",),
    ("encoder.json", "vocab.bpe"),
    ("vocab.json", "merges.txt"),
)


def from_openai(name: str) -> Path:
    """The ``.tiktoken`` file of one of OpenAI's vocabularies, downloaded where it is not there yet.

    Raises:
        UsageError: there is no such vocabulary.
        GroundupError: it cannot be downloaded.
    """
    entry = tiktoken.published(name)
    file = f"{entry.file}.tiktoken"
    path = default_data_dir() / "tokenizers" / file
    return download(ADDRESS + file, path, sha256=entry.sha256, instead=_INSTEAD)


def from_hub(spec: str) -> Path:
    """The tokenizer's files of a repository of the hub, and no others.

    The hub's library keeps them in its cache, goes on where a download broke off, and works without a network when
    they are there; each file is held against the digest that the hub gives.

    Args:
        spec: ``hf:owner/name``, ``hf:owner/name:path`` for a file or folder in it; ``@revision`` may follow the name.

    Returns:
        The folder where they lie, or the one file.

    Raises:
        UsageError: the spec is not one.
        GroundupError: they cannot be had, are damaged, or there are none.
    """
    wanted = parse_hub_spec(spec, "a tokenizer")
    listing = list_files(spec, wanted.repo, "model", revision=wanted.revision, checksums=True, instead=_INSTEAD)
    folder: Path | None = None
    for name in _choose(spec, listing.files, wanted.inside):
        path = fetch_file(spec, wanted.repo, name, listing, "model", instead=_INSTEAD)
        folder = path.parents[len(PurePosixPath(name).parts) - 1]
    assert folder is not None
    return folder / wanted.inside


def _choose(spec: str, names: list[str], inside: str) -> list[str]:
    """The files of a repository that make its tokenizer."""
    if inside in names:
        return [inside]
    start = f"{inside}/" if inside else ""
    here = {name.removeprefix(start): name for name in names if name.startswith(start)}
    chosen = next((group for group in _VOCABULARIES if group[0] in here), ())
    others = [name for name in here if "/" not in name and name.endswith((".tiktoken", ".model"))]
    if not chosen and len(others) == 1:
        chosen = (others[0],)
    if not chosen:
        known = [name for name in names if name.endswith((".gguf", ".tiktoken", ".model", "tokenizer.json"))]
        hint = f" Name one of its files, as in hf:owner/name:{min(known)}." if known else nearest(inside, names)
        raise GroundupError(f"{spec}: no tokenizer in this repository.{hint}")
    return [here[name] for name in (*chosen, *_CONFIGURATION) if name in here]
