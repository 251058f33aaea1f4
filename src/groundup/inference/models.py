"""Where models are: what MODEL means on a command line, and the models of the hub that are kept on this machine.

A model of the hub lies in the cache that other tools of the hub share. What we add is a note of what was checked: the
commit, and each file's size and digest. With the note a model is found without asking the hub, and a file that has
changed since is noticed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from urllib.parse import quote

from groundup.runtime import GroundupError, UsageError, os_errors, read_json, warn, write_json
from groundup.runtime.download import default_data_dir
from groundup.runtime.errors import nearest
from groundup.runtime.hub import Listing, UnreachableError, damage, fetch_file, list_files, parse_hub_spec

if TYPE_CHECKING:
    from groundup.model import ModelConfig

MAIN = "main"
_INSTEAD = "pass a local folder"
_OFFLINE = ", and the hub cannot be reached. Run the same command with a network."
_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
_WANTED = (  # besides the weights; what a repository has of them
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
# What an adapter lies in: a model that is to be put on another, which its config names.
_ADAPTER, _ADAPTER_TENSORS = "adapter_config.json", "adapter_model.safetensors"
_ADAPTER_NOTE = "groundup_adapter.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")


def find_model(name: str | os.PathLike[str]) -> Path:
    """What MODEL means: a Hugging Face folder, a run's best or latest checkpoint, ``hf:owner/name[@revision]``.

    The folder may be that of an adapter (PEFT's or ours), which is a model together with its base: see adapters.py. A
    model of llama2.c is its ``.bin`` file, or the folder where that is the only one beside tokenizers; one of
    llama.cpp is its ``.gguf`` file.

    Returns:
        The folder, or the file of llama2.c or llama.cpp.

    Raises:
        UsageError: there is nothing by that name, or it is no model.
        GroundupError: a hub model cannot be had.
    """
    text = os.fspath(name)
    if text.startswith("hf:"):
        return fetch_model(text)
    path = Path(text)
    if _is_model(path):
        return path
    pointers = [path / "checkpoints" / pointer for pointer in ("best", "latest")]
    for pointer in pointers:
        if _is_model(pointer):
            return pointer.resolve()
    if path.is_file():
        if path.suffix in (".bin", ".gguf"):
            return path
        raise UsageError(f"{text}: this is a file. MODEL is the folder that it lies in.")
    if path.is_dir():
        return _llama2c_in(path)
    siblings = [str(entry) for entry in path.parent.glob("*") if entry.is_dir()] if path.parent.is_dir() else []
    raise UsageError(
        f"{text}: no such folder.{nearest(text, siblings)} "
        "MODEL is a run, a checkpoint, a Hugging Face folder, a .gguf file, a .bin file of llama2.c or hf:owner/name."
    )


def _is_model(folder: Path) -> bool:
    return (folder / "config.json").is_file() or (folder / _ADAPTER).is_file()


def _llama2c_in(folder: Path) -> Path:
    if (folder / "recipe.yaml").is_file():
        raise UsageError(f"{folder}: this run has no checkpoint yet.")
    tokenizers = set(folder.glob("tok*.bin"))
    models = sorted(path for path in folder.glob("*.bin") if path.is_file() and path not in tokenizers)
    if len(models) == 1 and tokenizers:
        return models[0]
    if len(models) > 1 and tokenizers:
        raise UsageError(f"{folder}: there are {len(models)} models here. Name the file, such as {models[0]}.")
    if models:
        raise UsageError(
            f"{folder}: no model here that can be read. {models[0].name} is either pickled, and can run code when "
            "opened, or a model of llama2.c: then put its tokenizer (tokenizer.bin) beside it."
        )
    raise UsageError(
        f"{folder}: no model here (no config.json, no checkpoints). "
        "MODEL is a run, a checkpoint or a Hugging Face folder."
    )


def read_model_config(name: str | os.PathLike[str]) -> ModelConfig:
    """The model config of MODEL (no weights are read); of an adapter, its base's with the tokens that it brings.

    Raises:
        GroundupError: as :func:`find_model`, or it is damaged or describes a model we do not have.
    """
    from groundup.inference.adapters import base_chain
    from groundup.model import read_config
    from groundup.model.adapter_model import AdapterNote
    from groundup.model.weights.llama2c import read_llama2c_config

    *adapters, path = base_chain(find_model(name))
    config = read_config(path) if path.is_dir() else read_llama2c_config(path)
    sizes = (AdapterNote.read(folder).vocab_size for folder in adapters)
    size = next((size for size in sizes if size is not None), config.vocab_size)
    return replace(config, vocab_size=size)


# ---- models of the hub


@dataclass(frozen=True)
class KeptFile:
    """A file as it was when it was checked."""

    size: int
    digest: str
    """``sha256:`` or ``git-sha1:`` and the digest in hexadecimal."""
    changed_ns: int
    """When its content last changed, as the file system has it."""


@dataclass(frozen=True)
class KeptModel:
    """A model of the hub on this machine: the note of what was fetched and checked."""

    repo: str
    revision: str
    commit: str
    files: dict[str, KeptFile]

    @property
    def name(self) -> str:
        """As MODEL: ``hf:owner/name``, and the revision where it is not the main branch."""
        return f"hf:{self.repo}" + ("" if self.revision == MAIN else f"@{self.revision}")

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files.values())

    @property
    def folder(self) -> Path:
        """Where the files lie."""
        return _snapshot(self.repo, self.commit)

    def problem(self, look: Literal["sizes", "changed", "all"] = "changed") -> str | None:
        """What is wrong with the first file that is; None where all are as they were fetched.

        Args:
            look: at sizes only; at the content of files that were written since they were checked; or at that of all.

        Raises:
            GroundupError: a file cannot be read.
        """
        for name, noted in self.files.items():
            path = self.folder / name
            same = path.is_file() and path.stat().st_mtime_ns == noted.changed_ns
            read = look == "all" or (look == "changed" and not same)
            if (wrong := damage(path, noted.size, noted.digest if read else None)) is not None:
                return f"{path}: {wrong}"
        return None

    def write(self) -> None:
        """Write the note.

        Raises:
            GroundupError: it cannot be written.
        """
        write_json(_note(self.repo, self.revision), asdict(self))


def _snapshot(repo: str, commit: str) -> Path:
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    return Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo, repo_type="model") / "snapshots" / commit


def _notes() -> Path:
    return default_data_dir() / "models"


def _note(repo: str, revision: str) -> Path:
    return _notes() / f"{quote(f'{repo}@{revision}', safe='@')}.json"


def _read_note(path: Path) -> KeptModel | None:
    """The note; None where there is none, or it is damaged: then the model is checked anew."""
    try:
        values = read_json(path)
        files = {str(name): KeptFile(**noted) for name, noted in values["files"].items()}
        return KeptModel(str(values["repo"]), str(values["revision"]), str(values["commit"]), files)
    except (GroundupError, KeyError, TypeError, AttributeError):
        return None


def kept_models() -> list[KeptModel]:
    """The models of the hub that were fetched to this machine, by name."""
    found = [_read_note(path) for path in sorted(_notes().glob("*.json"))]
    return [kept for kept in found if kept is not None]


def kept_model(spec: str) -> KeptModel:
    """The model of the hub by that name, without asking the hub.

    Raises:
        UsageError: it was never fetched.
    """
    repo, revision = _parse(spec)
    kept = _read_note(_note(repo, revision))
    if kept is None:
        names = [other.name for other in kept_models()]
        raise UsageError(f"{spec}: this model is not kept here.{nearest(spec, names)} See groundup models list.")
    return kept


def remove_model(spec: str) -> int:
    """Remove a model from the hub's cache.

    Returns:
        The bytes that became free: none while the same commit is kept by another name.

    Raises:
        UsageError: it was never fetched.
        GroundupError: it cannot be removed.
    """
    from huggingface_hub import CacheNotFound, constants, scan_cache_dir

    kept = kept_model(spec)
    freed = 0
    with os_errors(kept.folder, "cannot remove"):
        _note(kept.repo, kept.revision).unlink(missing_ok=True)
        if any((other.repo, other.commit) == (kept.repo, kept.commit) for other in kept_models()):
            return 0
        try:
            cache = scan_cache_dir(constants.HF_HUB_CACHE)
        except CacheNotFound:
            return 0
        here = {one.commit_hash for repo in cache.repos if repo.repo_id == kept.repo for one in repo.revisions}
        if kept.commit in here:
            plan = cache.delete_revisions(kept.commit)
            freed = int(plan.expected_freed_size)
            plan.execute()
    return freed


def _parse(spec: str) -> tuple[str, str]:
    """Repository and revision."""
    wanted = parse_hub_spec(spec if spec.startswith("hf:") else f"hf:{spec}", "a model")
    if wanted.inside:
        raise UsageError(f"{spec}: a model is a whole repository of the hub, written hf:owner/name[@revision].")
    return wanted.repo, wanted.revision or MAIN


def fetch_model(spec: str, *, refresh: bool = False) -> Path:
    """The folder of a model of the hub, fetched where it is not there yet: config, tokenizer and safetensors, no code.

    What is there and as it was checked is used without asking the hub. A download that broke off goes on; a file
    that is missing or damaged is fetched again.

    Args:
        spec: ``hf:owner/name[@revision]``.
        refresh: ask the hub for the newest commit of the revision also when one is there.

    Raises:
        UsageError: the spec is not one.
        GroundupError: it cannot be had, a file comes damaged, or the repository holds no model that can be read.
    """
    repo, revision = _parse(spec)
    kept = _read_note(_note(repo, revision))
    wrong = kept.problem() if kept is not None else None
    if kept is not None and wrong is None and not refresh:
        return kept.folder
    if wrong is not None:
        warn(f"{wrong}. Fetching it again.")
    asked = None if revision == MAIN else revision
    try:
        listing = list_files(spec, repo, "model", revision=asked, checksums=True, instead=_INSTEAD)
    except UnreachableError as error:
        if wrong is None:
            raise
        raise GroundupError(f"{wrong}{_OFFLINE}") from error
    if listing.cached is not None and kept is not None:  # no network: what was checked before is all there is
        if wrong is not None:
            raise GroundupError(f"{wrong}{_OFFLINE}")
        return kept.folder
    files = dict(_fetched(spec, repo, listing))
    folder = next(iter(files.values())).parent
    kept = KeptModel(repo, revision, listing.commit or folder.name, _described(spec, files, listing))
    kept.write()
    return folder


def _fetched(spec: str, repo: str, listing: Listing) -> Iterator[tuple[str, Path]]:
    """The files of a model by name, small ones first, so that a model we cannot read costs no long download."""
    here = set(listing.files)
    weights = next((name for name in (_INDEX, _SINGLE) if name in here), None)
    adapter = weights is None and _ADAPTER in here
    if "config.json" not in here and not adapter:
        raise GroundupError(f"{spec}: no config.json in this repository: it holds no model that can be read.")
    if adapter and _ADAPTER_TENSORS in here:
        weights = _ADAPTER_TENSORS
    if weights is None:
        raise GroundupError(f"{spec}: {_no_weights(listing.files)}")
    for name in (name for name in (*_WANTED, *((_ADAPTER, _ADAPTER_NOTE) if adapter else ())) if name in here):
        yield name, fetch_file(spec, repo, name, listing, "model", instead=_INSTEAD)
    path = fetch_file(spec, repo, weights, listing, "model", instead=_INSTEAD)
    yield weights, path
    if weights == _INDEX:
        shards = _shards(path)
        missing = [shard for shard in shards if shard not in here]
        if missing:
            raise GroundupError(f"{spec}: {_INDEX} names {missing[0]}, which is not in this repository.")
        for shard in shards:
            yield shard, fetch_file(spec, repo, shard, listing, "model", instead=_INSTEAD)


def _no_weights(names: list[str]) -> str:
    pickles = sorted(name for name in names if name.endswith(_PICKLES) and "/" not in name)
    if not pickles:
        return "no model.safetensors in this repository."
    return (
        f"only pickled weights are in this repository ({pickles[0]}), which can run code when opened: never fetched. "
        "Look for a repository, or a revision of this one, with model.safetensors."
    )


def _shards(index: Path) -> list[str]:
    try:
        names = {str(name) for name in read_json(index, "weight index")["weight_map"].values()}
    except (KeyError, TypeError, AttributeError) as error:
        raise GroundupError(f"{index}: this weight index is damaged: it has no weight_map.") from error
    wrong = sorted(name for name in names if "/" in name or not name.endswith(".safetensors"))
    if wrong:
        raise GroundupError(f"{index}: this weight index names {wrong[0]}, which is no safetensors file beside it.")
    return sorted(names)


def _described(spec: str, files: dict[str, Path], listing: Listing) -> dict[str, KeptFile]:
    """Size and digest of each file; of a listing from the cache, held against the digest that is its name there."""
    described = {}
    for name, path in files.items():
        # The cache keeps a file by the digest that the hub gave: its SHA-256, or Git's own.
        digest = listing.checksums.get(name) or _digest_in_name(path.resolve().name)
        if digest is None:
            raise GroundupError(
                f"{spec}: {path} cannot be checked without the hub. Run the same command with a network."
            )
        if listing.cached is not None and (wrong := damage(path, None, digest)) is not None:
            raise GroundupError(f"{path}: {wrong}{_OFFLINE}")
        stat = path.stat()
        described[name] = KeptFile(stat.st_size, digest, stat.st_mtime_ns)
    return described


def _digest_in_name(name: str) -> str | None:
    if re.fullmatch(r"[0-9a-f]{64}", name):
        return f"sha256:{name}"
    return f"git-sha1:{name}" if re.fullmatch(r"[0-9a-f]{40}", name) else None


def verify_model(kept: KeptModel) -> str | None:
    """Read every file of a kept model and hold it against its digest; what is wrong, or None.

    Raises:
        GroundupError: a file cannot be read.
    """
    wrong = kept.problem("all")
    if wrong is None:  # what was only touched need not be read again next time
        seen = {
            name: replace(noted, changed_ns=(kept.folder / name).stat().st_mtime_ns)
            for name, noted in kept.files.items()
        }
        if seen != kept.files:
            replace(kept, files=seen).write()
    return wrong
