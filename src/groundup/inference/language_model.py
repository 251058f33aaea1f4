"""Model, tokenizer and engine behind one name."""

from __future__ import annotations

import codecs
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, Unpack, overload

import torch
import torch.nn.functional as F

from groundup.inference.engine import Engine, Request
from groundup.inference.models import find_model
from groundup.inference.sampling import Sampling, SamplingParams
from groundup.model import Transformer, load_model, save_model
from groundup.model.weights.llama2c import load_llama2c
from groundup.runtime import GroundupError, UsageError, atomic_folder
from groundup.runtime.device import choose_device
from groundup.runtime.errors import nearest
from groundup.runtime.files import verify_folder
from groundup.tokenizer import Tokenizer

Dtype = Literal["auto", "float32", "bfloat16"]
_DTYPES: dict[str, torch.dtype | None] = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16}
# What LanguageModel.save writes, and may replace.
_SAVED = re.compile(
    r"(generation_)?config\.json|model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json"
    r"|tokenizer\.(json|model)|tokenizer_config\.json|vocabulary\.txt"
)


def load(name: str | os.PathLike[str], *, device: str = "auto", dtype: Dtype = "auto") -> LanguageModel:
    """Load a model with its tokenizer: ``load("runs/demo").generate("Once")``.

    Args:
        name: a run, a checkpoint, a Hugging Face folder, ``hf:owner/name[@revision]``, or a model of llama2.c (its
            ``.bin`` file with the tokenizer beside it, or their folder).
        device: ``auto``, ``cpu``, ``cuda``, …
        dtype: what the weights become. ``auto`` leaves them as they are stored, so that a bfloat16 checkpoint takes no
            more memory than its file; ``float32`` and ``bfloat16`` convert each as it is read.

    Raises:
        GroundupError: nothing is found there, or a file of it is damaged.
    """
    if dtype not in _DTYPES:
        raise UsageError(f"dtype {dtype!r} is not one of {', '.join(_DTYPES)}.{nearest(str(dtype), _DTYPES)}")
    wanted = _DTYPES[dtype]
    path = find_model(name)
    chosen = choose_device(device)
    if path.is_file():
        model = load_llama2c(path, device=chosen, dtype=wanted)
        tokenizer = _tokenizer_beside(path, model.config.vocab_size)
    else:
        verify_folder(path)
        model = load_model(path, device=chosen, dtype=wanted)
        tokenizer = Tokenizer.load(path)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise GroundupError(
            f"{path}: the tokenizer has {tokenizer.vocab_size} tokens, the model only {model.config.vocab_size}. "
            "They do not belong together."
        )
    return LanguageModel(model, tokenizer)


def _tokenizer_beside(weights: Path, vocab_size: int) -> Tokenizer:
    """The tokenizer of a model of llama2.c: of those beside it, the one with as many tokens as the model.

    Raises:
        GroundupError: there is none, or none that belongs to it.
    """
    files = sorted(weights.parent.glob("tok*.bin"))
    if not files:
        return Tokenizer.load(weights.parent)
    for file in files:
        tokenizer = Tokenizer.load(file)
        if tokenizer.vocab_size == vocab_size:
            return tokenizer
    raise GroundupError(
        f"{files[-1]}: {tokenizer.vocab_size} tokens, the model beside it, {weights.name}, has {vocab_size}. "
        "It is cut short, or belongs to another model."
    )


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
        streams = [_TextStream(self.tokenizer, params.stop, continued=bool(text)) for text in texts]
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
        text = _TextStream(self.tokenizer, params.stop, continued=bool(prompt))
        for step in self.engine.run([request]):
            for _, token in step:
                if text.push(token):
                    request.finish = "stopped"
                if piece := text.take():
                    yield piece
        if piece := text.take(final=True):
            yield piece

    @property
    def _start_ids(self) -> list[int]:
        end = self.tokenizer.end_of_text_id
        return list(self.tokenizer.vocabulary.prefix) or ([] if end is None else [end])

    def prompt_ids(self, text: str) -> list[int]:
        """A prompt's token ids, after what stands before every document in training.

        That is what the tokenizer's file puts before a text, such as ``<s>``, else the end-of-text token.
        """
        ids = self._start_ids + self.tokenizer.encode(text)
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
        if not self._start_ids:
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
        found = [entry.name for entry in path.iterdir()] if path.is_dir() else []
        others = sorted(name for name in found if not _SAVED.fullmatch(name))
        if others:
            raise UsageError(f"{path}: {others[0]} is here already and would be lost. Save to a new folder.")
        with atomic_folder(path) as place:
            end = self.tokenizer.end_of_text_id
            begin = self.tokenizer.special_tokens.get(self.tokenizer.vocabulary.bos_token or "", end)
            save_model(self.model, place, bos_id=begin, eos_id=end)
            self.tokenizer.save(place)


class _TextStream:
    """Text of one request as it grows: whole characters only, ended by the first stop text, none of which gets out.

    Args:
        continued: whether it goes on from other text; where not, the space that SentencePiece writes first is no part
            of it.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str], *, continued: bool = True) -> None:
        self.tokenizer, self.stop = tokenizer, stop
        self.continued = continued
        self.special = set(tokenizer.special_tokens.values())
        self.text = ""
        self.taken = 0
        self.stopped = False
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> bool:
        """Add a token; True once a stop text has been met."""
        written = self.tokenizer.decode_bytes([token], continued=self.continued)
        self.continued = token not in self.special
        return self._extend(self._decoder.decode(written))

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
