"""Model, tokenizer and engine behind one name, and how MODEL on a command line is found."""

from __future__ import annotations

import codecs
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Unpack, overload

import torch
import torch.nn.functional as F

from groundup.inference.engine import Engine, Request
from groundup.inference.sampling import Sampling, SamplingParams
from groundup.model import Transformer, load_model, save_model
from groundup.runtime import GroundupError, UsageError, atomic_folder
from groundup.runtime.device import choose_device
from groundup.runtime.errors import nearest
from groundup.runtime.files import verify_folder
from groundup.tokenizer import Tokenizer

_SAVED_FILES = {  # what LanguageModel.save writes, and may replace
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocabulary.txt",
}


def find_model(name: str | os.PathLike[str]) -> Path:
    """The Hugging Face folder that MODEL means: itself, a run's best or latest checkpoint, or ``hf:owner/name``.

    Raises:
        UsageError: there is nothing by that name, or the folder holds no model.
        GroundupError: a hub model cannot be fetched.
    """
    text = os.fspath(name)
    if text.startswith("hf:"):
        return _download(text.removeprefix("hf:"))
    path = Path(text)
    if (path / "config.json").is_file():
        return path
    pointers = [path / "checkpoints" / pointer for pointer in ("best", "latest")]
    for pointer in pointers:
        if (pointer / "config.json").is_file():
            return pointer.resolve()
    if path.is_file():
        raise UsageError(f"{text}: this is a file. MODEL is the folder that it lies in.")
    if path.is_dir():
        if (path / "recipe.yaml").is_file():
            raise UsageError(f"{text}: this run has no checkpoint yet.")
        raise UsageError(
            f"{text}: no model here (no config.json, no checkpoints). "
            "MODEL is a run, a checkpoint or a Hugging Face folder."
        )
    siblings = [str(entry) for entry in path.parent.glob("*") if entry.is_dir()] if path.parent.is_dir() else []
    raise UsageError(
        f"{text}: no such folder.{nearest(text, siblings)} "
        "MODEL is a run, a checkpoint, a Hugging Face folder or hf:owner/name."
    )


def _download(repository: str) -> Path:
    """Fetch config, weights and tokenizer of a hub model (never code) into the hub's cache."""
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "*.safetensors", "*.model", "*.jinja"]
    try:
        return Path(snapshot_download(repository, allow_patterns=wanted, etag_timeout=10))
    except Exception as error:  # the hub client raises a dozen kinds; each means that the model could not be had
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise GroundupError(
            f"hf:{repository}: cannot fetch this model ({reason}). "
            "Check the name and the network, or pass a local folder."
        ) from error


def load(name: str | os.PathLike[str], *, device: str = "auto") -> LanguageModel:
    """Load a model with its tokenizer: ``load("runs/demo").generate("Once")``.

    Args:
        name: a run, a checkpoint, a Hugging Face folder, or ``hf:owner/name``.
        device: ``auto``, ``cpu``, ``cuda``, …

    Raises:
        GroundupError: nothing is found there, or a file of it is damaged.
    """
    folder = find_model(name)
    chosen = choose_device(device)
    verify_folder(folder)
    model = load_model(folder, device=chosen)
    tokenizer = Tokenizer.load(folder)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise GroundupError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens, the model only {model.config.vocab_size}. "
            "They do not belong together."
        )
    return LanguageModel(model, tokenizer)


class LanguageModel:
    """A model that speaks text.

    Args:
        model: the weights.
        tokenizer: the tokenizer they were trained with.
    """

    def __init__(self, model: Transformer, tokenizer: Tokenizer) -> None:
        self.model, self.tokenizer = model.eval(), tokenizer
        self.engine = Engine(self.model, end_of_text=tokenizer.end_of_text_id, vocab_size=tokenizer.vocab_size)

    @overload
    def generate(self, prompts: str, **sampling: Unpack[Sampling]) -> str: ...
    @overload
    def generate(self, prompts: list[str] | tuple[str, ...], **sampling: Unpack[Sampling]) -> list[str]: ...
    def generate(self, prompts: str | list[str] | tuple[str, ...], **sampling: Unpack[Sampling]) -> str | list[str]:
        """Continue a text, or each of a list of texts. The prompt is not part of the result.

        Args:
            prompts: one text, or several that are decoded together.
            sampling: the fields of :class:`SamplingParams`. With a seed, the n-th prompt of a list uses ``seed + n``.
        """
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        params = SamplingParams.of(**sampling)
        requests = [
            Request(self.prompt_ids(text), replace(params, seed=None if params.seed is None else params.seed + number))
            for number, text in enumerate(texts)
        ]
        streams = [_TextStream(self.tokenizer, params.stop) for _ in requests]
        for step in self.engine.run(requests):
            for index, token in step:
                if streams[index].push(token):
                    requests[index].finish = "stopped"
        results = [stream.finished() for stream in streams]
        return results[0] if isinstance(prompts, str) else results

    def stream(self, prompt: str, **sampling: Unpack[Sampling]) -> Iterator[str]:
        """Continue a text piece by piece; the pieces joined are what :meth:`generate` returns. Never half a character.

        Args:
            prompt: the text to continue.
            sampling: the fields of :class:`SamplingParams`.
        """
        params = SamplingParams.of(**sampling)
        request = Request(self.prompt_ids(prompt), params)
        text = _TextStream(self.tokenizer, params.stop)
        for step in self.engine.run([request]):
            for _, token in step:
                if text.push(token):
                    request.finish = "stopped"
                if piece := text.take():
                    yield piece
        if piece := text.take(final=True):
            yield piece

    def prompt_ids(self, text: str) -> list[int]:
        """A prompt's token ids, after the end-of-text token that stands before every document in training."""
        start = [] if self.tokenizer.end_of_text_id is None else [self.tokenizer.end_of_text_id]
        ids = start + self.tokenizer.encode(text)
        if not ids:
            raise UsageError("the prompt is empty, and this tokenizer has no end-of-text token to start from.")
        return ids

    @torch.inference_mode()
    def score(self, texts: Sequence[str]) -> list[float]:
        """Log-probability of each text, in nats, given the start of a document.

        A text longer than the context is read in windows that overlap by half, so that each token is counted once.
        """
        return [self._score(text) for text in texts]

    def _score(self, text: str) -> float:
        ids = self.prompt_ids(text)
        if self.tokenizer.end_of_text_id is None:
            ids = [ids[0], *ids]  # no token stands before the first; let it follow itself rather than skip it
        context = self.model.config.context_length
        total, scored, start = 0.0, 1, 0
        while scored < len(ids):
            end = min(start + context + 1, len(ids))
            window = torch.tensor([ids[start:end]], device=self.model.embedding.weight.device)
            losses_T = F.cross_entropy(self.model(window[:, :-1]).float()[0], window[0, 1:], reduction="none")
            total -= float(losses_T[scored - start - 1 :].double().sum())
            scored, start = end, max(start + 1, end - 1 - context // 2)
        return total

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write a Hugging Face folder: weights, config and tokenizer, whole or not at all.

        Raises:
            UsageError: the folder holds anything but such a model, which would be lost.
            GroundupError: it cannot be written.
        """
        path = Path(folder)
        others = sorted({entry.name for entry in path.iterdir()} - _SAVED_FILES) if path.is_dir() else []
        if others:
            raise UsageError(f"{path}: {others[0]} is here already and would be lost. Save to a new folder.")
        with atomic_folder(path) as place:
            save_model(self.model, place, bos_id=self.tokenizer.end_of_text_id, eos_id=self.tokenizer.end_of_text_id)
            self.tokenizer.save(place)


class _TextStream:
    """Text of one request as it grows: whole characters only, ended by the first stop text, none of which gets out."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]) -> None:
        self.tokenizer, self.stop = tokenizer, stop
        self.text = ""
        self.taken = 0
        self.stopped = False
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> bool:
        """Add a token; True once a stop text has been met."""
        return self._extend(self._decoder.decode(self.tokenizer.token_bytes(token)))

    def _extend(self, text: str) -> bool:
        self.text += text
        ends = [self.text.find(stop) for stop in self.stop if stop in self.text]
        if ends:
            self.text, self.stopped = self.text[: min(ends)], True
        return self.stopped

    def take(self, *, final: bool = False) -> str:
        """What may be shown now and was not yet: all but a tail that could still become a stop text."""
        if final and not self.stopped:
            self._extend(self._decoder.decode(b"", final=True))
        held = 0
        if not final and not self.stopped:
            held = max((_overlap(self.text, stop) for stop in self.stop), default=0)
        piece = self.text[self.taken : len(self.text) - held]
        self.taken += len(piece)
        return piece

    def finished(self) -> str:
        """The whole text."""
        self.take(final=True)
        return self.text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that is a proper beginning of ``stop``."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
