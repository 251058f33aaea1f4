"""What a model is worth before and after: loss on held-out examples, answers beside the given ones, what it forgot."""

# N examples   B rows   T positions   M tokens to learn   V vocabulary   E embedding

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import nn

from groundup.data import PreparedData, open_source
from groundup.evaluation import bits_per_byte, bytes_per_token, model_scorer
from groundup.evaluation.generated import adherence, nearness
from groundup.inference import LanguageModel, SamplingParams
from groundup.model import Transformer
from groundup.posttraining.conversations import Conversation
from groundup.posttraining.encoding import Example
from groundup.posttraining.recipe import FinetuneRecipe
from groundup.runtime.device import Precision, autocast
from groundup.tokenizer import Tokenizer

TOKENS_AT_ONCE = 8192
LOGITS_AT_ONCE = 1024  # positions
LONGEST_WINDOW = 1024  # of the text that a model knew before

Float64Array = npt.NDArray[np.float64]


class HeldOutLoss(NamedTuple):
    """The loss of each example.

    Args:
        nats_N: float64, summed over its tokens.
        tokens_N: int64, how many of them are to be learnt.
    """

    nats_N: Float64Array
    tokens_N: npt.NDArray[np.int64]

    @property
    def loss(self) -> float:
        """Nats per token, over all tokens; NaN where there is none."""
        return float(self.nats_N.sum() / self.tokens_N.sum()) if self.tokens_N.sum() else math.nan

    @property
    def perplexity(self) -> float:
        """Its exponential."""
        return perplexity(self.loss)


def perplexity(loss: float) -> float:
    """The exponential of a loss in nats per token; infinite where that is too large to write."""
    return math.exp(loss) if loss < 700 else math.inf


@torch.no_grad()
def example_losses(
    model: Transformer, examples: Sequence[Example], device: torch.device, precision: Precision = "float32"
) -> HeldOutLoss:
    """The loss of each example by itself, in nats. Examples of like length are read together.

    Args:
        model: on the device; it is put into evaluation mode meanwhile.
        examples: none longer than the model's context.
    """
    nats = np.zeros(len(examples))
    tokens = np.array([int(example.learn.sum()) for example in examples], np.int64)
    order = sorted(range(len(examples)), key=lambda number: examples[number].positions)
    softcap = model.config.logit_softcap
    with evaluating(model):
        for numbers in _of_like_length(order, examples):
            T = max(examples[number].positions for number in numbers)
            ids_BT, targets_BT = np.zeros((len(numbers), T), np.int64), np.full((len(numbers), T), -1, np.int64)
            for row, number in enumerate(numbers):
                example = examples[number]
                here = slice(0, example.positions)
                ids_BT[row, here] = example.ids[:-1]
                targets_BT[row, here] = np.where(example.learn[1:], example.ids[1:], -1)
            with autocast(device, precision):
                features_BTE = model.features(torch.from_numpy(ids_BT).to(device))
                weight_VE = model.head.weight  # of a sharded model it is whole only now
                rows_M, places_M = np.nonzero(targets_BT >= 0)
                features_ME = features_BTE[torch.from_numpy(rows_M), torch.from_numpy(places_M)]
                targets_M = torch.from_numpy(targets_BT[rows_M, places_M]).to(device)
                found = []
                for begin in range(0, len(targets_M), LOGITS_AT_ONCE):
                    part = slice(begin, begin + LOGITS_AT_ONCE)
                    logits_MV = F.linear(features_ME[part].to(weight_VE.dtype), weight_VE).float()
                    if softcap is not None:
                        logits_MV = softcap * torch.tanh(logits_MV / softcap)
                    found.append(F.cross_entropy(logits_MV, targets_M[part], reduction="none"))
            losses_M = torch.cat(found).double().cpu().numpy() if found else np.zeros(0)
            nats[numbers] += np.bincount(rows_M, losses_M, len(numbers))
    return HeldOutLoss(nats, tokens)


def _of_like_length(order: Sequence[int], examples: Sequence[Example]) -> Iterator[list[int]]:
    """Examples, sorted by length, in batches that hold some thousands of positions."""
    waiting: list[int] = []
    for number in order:
        if waiting and (len(waiting) + 1) * examples[number].positions > TOKENS_AT_ONCE:
            yield waiting
            waiting = []
        waiting.append(number)
    if waiting:
        yield waiting


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """While the block runs, the model is in evaluation mode."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


# ---- answers


class Asked(NamedTuple):
    """A held-out conversation, up to its last answer.

    Args:
        where: its record.
        prompt: what is said before, for people.
        ids: the same as the model reads it.
        reference: the answer that was given.
    """

    where: str
    prompt: str
    ids: list[int]
    reference: str


def questions(conversations: Sequence[Conversation], tokenizer: Tokenizer, most: int) -> list[Asked]:
    """Conversations whose last answer is a text, at most so many, spread evenly."""
    able = [one for one in conversations if _last_answer(one) is not None]
    chosen = [able[i] for i in np.unique(np.linspace(0, len(able) - 1, most).round().astype(int))] if able else []
    found = []
    for one in chosen[:most]:
        place = _last_answer(one)
        assert place is not None
        before = one.messages[:place]
        ids = tokenizer.apply_chat_template(before, one.tools, add_generation_prompt=True)
        said = before[-1:] if len(before) == 1 else before
        prompt = "\n".join(f"{m['role']}: {m.get('content') or ''}" for m in said)
        found.append(Asked(one.where, prompt, ids, str(one.messages[place]["content"])))
    return found


def _last_answer(conversation: Conversation) -> int | None:
    for place in range(len(conversation.messages) - 1, 0, -1):
        message = conversation.messages[place]
        if message["role"] == "assistant":
            return place if isinstance(message.get("content"), str) and message["content"].strip() else None
    return None


def answer(
    model: Transformer, tokenizer: Tokenizer, asked: Sequence[Asked], max_tokens: int
) -> tuple[list[str], list[str]]:
    """What a model answers, greedily.

    Returns:
        The texts, and why each ended.
    """
    with evaluating(model):
        lm = LanguageModel(model, tokenizer)
        params = SamplingParams.of(max_tokens=max_tokens, temperature=0.0)
        generations = [lm.generation(one.ids, params, live=False) for one in asked]
        by_request = {id(one.request): one for one in generations}
        for events in lm.engine.run([one.request for one in generations]):
            for event in events:
                by_request[id(event.request)].push(event)
        answers = [one.answers()[0] for one in generations]
    return [one.text.strip() for one in answers], [str(one.finish) for one in answers]


# ---- what was known before


def known_text(recipe: FinetuneRecipe, tokenizer: Tokenizer) -> tuple[str, npt.NDArray[np.integer]] | None:
    """A text that the base model knew, as ids: the one that the recipe names, else what the base's own run held out.

    Returns:
        What it is called, and its ids; None where there is none.
    """
    wanted = recipe.measure
    if wanted.text_tokens < 1:
        return None
    if wanted.text is None:
        prepared = Path(str(recipe.init_from)) / "data"
        if not (prepared / "stats.json").is_file():
            return None
        val = PreparedData.open(prepared).val
        ids = val.read(0, min(val.n_tokens, wanted.text_tokens))
        return (f"what {recipe.init_from} held out", ids) if len(ids) else None
    end = tokenizer.end_of_text_id
    found: list[int] = []
    for document in open_source(wanted.text):
        found += [*([] if end is None else [end]), *tokenizer.encode(document.text)]
        if len(found) >= wanted.text_tokens:
            break
    return wanted.text, np.array(found[: wanted.text_tokens], np.int64)


def remembered(
    model: Transformer, tokenizer: Tokenizer, ids: npt.NDArray[np.integer], device: torch.device, precision: Precision
) -> dict[str, float]:
    """How well a model still predicts a text: ``loss``, ``perplexity`` and ``bits_per_byte``."""
    lengths = bytes_per_token(tokenizer)
    lengths = np.pad(lengths, (0, max(0, model.config.vocab_size - len(lengths))))
    context = min(model.config.context_length, LONGEST_WINDOW)
    found = bits_per_byte(
        model_scorer(model, device, precision), ids, lengths, context, start_id=tokenizer.end_of_text_id or 0,
        stride=context, show_progress=False,
    )  # fmt: skip
    return {"loss": found.loss, "perplexity": perplexity(found.loss), "bits_per_byte": found.bits_per_byte}


# ---- all of it


class State(NamedTuple):
    """What was measured of a model at one time.

    Args:
        row: figures by name, as evaluation.json has them.
        answers: to the questions.
        known: see :func:`remembered`.
    """

    row: dict[str, Any]
    answers: list[str]
    known: dict[str, float] | None


def measure(
    model: Transformer, tokenizer: Tokenizer, recipe: FinetuneRecipe, val: Sequence[Example], asked: Sequence[Asked],
    known: tuple[str, npt.NDArray[np.integer]] | None, device: torch.device, precision: Precision,
) -> State:  # fmt: skip
    """Loss on held-out examples, answers, and what is still known."""
    losses = example_losses(model, val, device, precision)
    row: dict[str, Any] = {
        "loss": losses.loss, "perplexity": losses.perplexity, "tokens": int(losses.tokens_N.sum()),
    }  # fmt: skip
    texts: list[str] = []
    if asked:
        texts, finishes = answer(model, tokenizer, asked, recipe.measure.max_tokens)
        near = nearness(texts, [one.reference for one in asked])
        form = adherence(texts, as_json=recipe.measure.json, pattern=recipe.measure.pattern, finishes=finishes)
        row |= asdict(near) | asdict(form)
    left = None if known is None else remembered(model, tokenizer, known[1], device, precision)
    return State(row, texts, left)
