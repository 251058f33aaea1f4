"""Model, tokenizer and engine behind one name."""

from __future__ import annotations

import os
import re
from collections.abc import AsyncGenerator, Iterable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Literal, Unpack, overload

import torch
import torch.nn.functional as F

from groundup.inference.adapters import find_parts
from groundup.inference.drafts import Drafter
from groundup.inference.engine import Engine, EngineSettings
from groundup.inference.requests import Request
from groundup.inference.sampler import TokenMask
from groundup.inference.sampling import Sampling, SamplingParams
from groundup.inference.text import Answer, Generation
from groundup.model import Transformer, save_model
from groundup.model.adapter_model import AdapterNote, absorb
from groundup.model.adapters import adapter_names, set_active
from groundup.runtime import GroundupError, UsageError, atomic_folder
from groundup.runtime.device import choose_device
from groundup.runtime.errors import nearest
from groundup.runtime.files import read_json
from groundup.tokenizer import Tokenizer

Dtype = Literal["auto", "float32", "bfloat16"]
_DTYPES: dict[str, torch.dtype | None] = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16}
# What LanguageModel.save writes, and may replace.
_SAVED = re.compile(
    r"(generation_)?config\.json|model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json"
    r"|tokenizer\.(json|model)|tokenizer_config\.json|vocabulary\.txt"
)


def load(
    name: str | os.PathLike[str], *, adapters: Iterable[str | os.PathLike[str]] = (), merge: bool = True,
    requantize: bool = False, device: str = "auto", dtype: Dtype = "auto", settings: EngineSettings | None = None,
    drafter: Drafter | None = None,
) -> LanguageModel:  # fmt: skip
    """Load a model with its tokenizer: ``load("runs/demo").generate("Once")``.

    Args:
        name: a run, a checkpoint, a Hugging Face folder, ``hf:owner/name[@revision]``, a ``.gguf`` file of llama.cpp,
            or a model of llama2.c (its ``.bin`` file with the tokenizer beside it, or their folder). An adapter's run
            or folder (PEFT's or ours) stands for its base with it.
        adapters: adapters that are put on the model as well, by their folders, runs or names on the hub: what they add
            to a weight is summed.
        merge: put all adapters into the weights, which become plain also where the base is quantized: the fastest.
            Otherwise they stay beside them, and :meth:`LanguageModel.use_adapters` changes between them.
        requantize: in merging, leave a quantized base quantized, at the cost of a second rounding.
        device: ``auto``, ``cpu``, ``cuda``, …
        dtype: what the weights become. ``auto`` leaves them as they are stored, so that a bfloat16 checkpoint takes no
            more memory than its file; ``float32`` and ``bfloat16`` convert each as it is read.
        settings: what the engine may use.
        drafter: who guesses tokens (speculative decoding), such as :class:`groundup.inference.PromptLookup`.

    Raises:
        GroundupError: nothing is found there, or a file of it is damaged.
    """
    if dtype not in _DTYPES:
        raise UsageError(f"dtype {dtype!r} is not one of {', '.join(_DTYPES)}.{nearest(str(dtype), _DTYPES)}")
    if requantize and not merge:
        raise UsageError("requantize = true is for merge = true: what is not merged stays quantized as it is.")
    parts, chosen = find_parts(name, adapters), choose_device(device)
    model = parts.load(chosen, _DTYPES[dtype])
    if merge and parts.adapters:
        absorb(model, requantize=requantize)
    place, size = parts.tokenizer, model.config.vocab_size
    llama2c = place.is_file() and place.suffix == ".bin"
    tokenizer = _tokenizer_beside(place, size) if llama2c else Tokenizer.load(place)
    if tokenizer.vocab_size > size:
        raise GroundupError(
            f"{place}: the tokenizer has {tokenizer.vocab_size} tokens, the model only {size}. "
            "They do not belong together."
        )
    for folder in parts.tokenizers[1:]:
        if Tokenizer.load(folder).fingerprint != tokenizer.fingerprint:
            raise GroundupError(
                f"{folder}: this adapter brings other tokens than {place}. Merge one of them first (groundup export)."
            )
    ends = _end_tokens([folder / "generation_config.json" for folder in parts.folders], size)
    lm = LanguageModel(model, tokenizer, end_of_text=ends, settings=settings, drafter=drafter)
    if lm.adapters:
        lm.always_active = tuple(key for key, folder in parts.adapters.items() if AdapterNote.read(folder).replaces)
        lm.use_adapters(*lm.adapters)
    return lm


def _end_tokens(paths: Iterable[Path], vocab_size: int) -> list[int]:
    """The tokens that end a text by a model's own account, in the first of these files: a chat model has more than its
    tokenizer's.
    """
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        return []
    found = read_json(path).get("eos_token_id")
    ids = found if isinstance(found, list) else [] if found is None else [found]
    wrong = [value for value in ids if not isinstance(value, int) or not 0 <= value < vocab_size]
    if wrong:
        raise GroundupError(f"{path}: eos_token_id {wrong[0]!r} is no token of this model.")
    return ids


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
        end_of_text: further tokens that end a text, besides the tokenizer's own.
        settings: what the engine may use.
        drafter: who guesses tokens (speculative decoding), such as :class:`groundup.inference.PromptLookup`.

    Attributes:
        always_active: adapters that :meth:`use_adapters` cannot leave out: whole weights of theirs replace the base's.
    """

    always_active: tuple[str, ...] = ()

    def __init__(
        self, model: Transformer, tokenizer: Tokenizer, *, end_of_text: Sequence[int] = (),
        settings: EngineSettings | None = None, drafter: Drafter | None = None,
    ) -> None:  # fmt: skip
        self.model, self.tokenizer = model.eval(), tokenizer
        ends = {*end_of_text, *tokenizer.end_ids}
        self.engine = Engine(
            self.model, end_of_text=ends, vocab_size=tokenizer.vocab_size, settings=settings, drafter=drafter
        )

    @property
    def adapters(self) -> list[str]:
        """The names of adapters that are on the model, not merged: of their folders or runs."""
        return adapter_names(self.model)

    def use_adapters(self, *names: str) -> None:
        """Let exactly these adapters count from now on; none of them for the model without any.

        What was computed with others stays in the engine's cache, and is found again when they are used again.

        Raises:
            UsageError: there is no adapter of a name, they are merged, one replaces whole weights and cannot be
                left out, or a text is being continued.
        """
        if not self.adapters:
            raise UsageError("this model has no adapters that could be changed. Load it with merge=False.")
        left_out = next((name for name in self.always_active if name not in names), None)
        if left_out is not None:
            raise UsageError(
                f"whole weights of the adapter {left_out} replace the model's, and it cannot be left out. Name it, too."
            )
        self.engine.change_weights(repr(names), lambda: set_active(self.model, *names))

    @overload
    def generate(self, prompts: str, **sampling: Unpack[Sampling]) -> str: ...
    @overload
    def generate(self, prompts: list[str] | tuple[str, ...], **sampling: Unpack[Sampling]) -> list[str]: ...
    def generate(self, prompts: str | list[str] | tuple[str, ...], **sampling: Unpack[Sampling]) -> str | list[str]:
        """Continue a text, or each of a list of texts. The prompt is not part of the result.

        Args:
            prompts: one text, or several that are decoded together.
            sampling: the fields of :class:`SamplingParams`. With a seed, the n-th prompt of a list uses ``seed + n``.

        Raises:
            UsageError: a field is wrong, or several completions are asked for, which :meth:`complete` gives.
            GroundupError: a request failed; the others have been completed, but are lost here.
        """
        if sampling.get("n", 1) != 1:
            raise UsageError("generate gives one text per prompt: complete(...) gives n of them.")
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        found = self.complete(texts, **sampling)
        results = [completions[0].text for completions in found]
        return results[0] if isinstance(prompts, str) else results

    def complete(
        self, prompts: Sequence[str], params: SamplingParams | None = None, **sampling: Unpack[Sampling]
    ) -> list[list[Answer]]:
        """Continue each of a list of texts ``n`` times, with all that is known of each: tokens, log-probabilities, why
        it ended.

        Args:
            prompts, sampling: as for :meth:`generate`; or ``params``, which hold the same.
        """
        params = SamplingParams.of(**sampling) if params is None else params
        generations = [
            self.generation(
                text, replace(params, seed=None if params.seed is None else params.seed + number), live=False
            )
            for number, text in enumerate(prompts)
        ]
        self._run(generations)
        return [generation.answers() for generation in generations]

    def _run(self, generations: Sequence[Generation]) -> None:
        by_request = {id(generation.request): generation for generation in generations}
        for events in self.engine.run([generation.request for generation in generations]):
            for event in events:
                by_request[id(event.request)].push(event)

    def generation(
        self, prompt: str | Sequence[int], params: SamplingParams, *, priority: int = 0, tenant: str = "",
        slide: bool = True, live: bool = True,
    ) -> Generation:  # fmt: skip
        """A request to the engine, whose tokens become text.

        Args:
            prompt: a text, or the token ids of one, taken as they are.
            params: how tokens are chosen.
            priority, tenant, slide, live: see :class:`groundup.inference.requests.Request`.
        """
        ids = self.prompt_ids(prompt) if isinstance(prompt, str) else list(prompt)
        request = Request(
            ids, params, priority=priority, tenant=tenant, slide=slide, live=live, mask=self._mask(params)
        )
        return Generation(request, self.tokenizer, continued=bool(prompt))

    def _mask(self, params: SamplingParams) -> TokenMask | None:
        """What a schema, an expression or a grammar allows."""
        if params.json_schema is None and params.regex is None and params.grammar is None:
            return None
        from groundup.inference.constraints import Constraint

        return Constraint.make(
            self.tokenizer, json_schema=params.json_schema, regex=params.regex, grammar=params.grammar,
            vocab_size=self.tokenizer.vocab_size, end_tokens=self.engine.end_of_text,
        )  # fmt: skip

    def stream(self, prompt: str | Sequence[int], **sampling: Unpack[Sampling]) -> Iterator[str]:
        """Continue a text piece by piece; the pieces joined are what :meth:`generate` returns. Never half a character.

        A beam search gives its text at the end, when it is known which one is the best.

        Args:
            prompt: the text to continue, or its token ids.
            sampling: the fields of :class:`SamplingParams`.
        """
        yield from self.pieces(self.generation(prompt, SamplingParams.of(**sampling)))

    def pieces(self, generation: Generation) -> Iterator[str]:
        """The first completion of a generation, piece by piece. Closing the iterator ends it."""
        for events in self.engine.run([generation.request]):
            if piece := generation.take(events):
                yield piece
        if piece := generation.take():
            yield piece

    async def agenerate(self, prompt: str | Sequence[int], **sampling: Unpack[Sampling]) -> str:
        """:meth:`generate` for one text in an event loop: any number of them are decoded together."""
        generation = self.generation(prompt, SamplingParams.of(**sampling), live=False)
        return "".join([piece async for piece in self.apieces(generation)])

    def astream(self, prompt: str | Sequence[int], **sampling: Unpack[Sampling]) -> AsyncGenerator[str, None]:
        """:meth:`stream` in an event loop. A task that is cancelled lets go of its request."""
        return self.apieces(self.generation(prompt, SamplingParams.of(**sampling)))

    async def apieces(self, generation: Generation) -> AsyncGenerator[str, None]:
        """:meth:`pieces` in an event loop."""
        stream = self.engine.stream(generation.request)
        async with aclosing(stream):
            async for events in stream:
                if piece := generation.take(events):
                    yield piece
        if piece := generation.take():
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
            window = torch.tensor([ids[start:end]], device=self.model.device)
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
            save_model(self.model, place, bos_id=begin, eos_id=end, end_ids=self.tokenizer.end_ids)
            self.tokenizer.save(place)
