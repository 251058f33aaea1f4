"""How a person wants tokens chosen (:class:`SamplingParams`), and the truncation of a distribution that it asks for."""

# V vocabulary   K tokens that are left to choose from

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, TypedDict, Unpack, get_args

import numpy as np
import torch
from torch import Tensor

from groundup.inference.checks import check_count, check_number, listed, token_ids, whole
from groundup.inference.truncation import (
    Candidates,
    Floats,
    Ids,
    as_surprising,
    at_least,
    eta_limit,
    largest,
    no_more_surprising,
    nucleus,
    renormalised,
    typical,
)
from groundup.runtime import GroundupError, UsageError

NOT_FINITE = "the model computed logits that are not finite: its weights are damaged or its training diverged."


EarlyStopping = Literal["estimate", "full", "never"]


class Sampling(TypedDict, total=False):
    """The fields of :class:`SamplingParams`, as keyword arguments."""

    max_tokens: int
    temperature: float
    top_k: int | None
    top_p: float
    min_p: float
    stop: str | Sequence[str]
    seed: int | None
    typical_p: float
    epsilon_cutoff: float
    eta_cutoff: float
    mirostat: Literal[0, 1, 2]
    mirostat_tau: float
    mirostat_eta: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    no_repeat_ngram: int
    logit_bias: Mapping[int, float]
    bad_tokens: Sequence[Sequence[int]]
    allowed_tokens: Sequence[int] | None
    min_tokens: int
    stop_tokens: Sequence[int]
    ignore_end: bool
    logprobs: int | None
    prompt_logprobs: int | None
    n: int
    best_of: int | None
    json_schema: str | None
    regex: str | None
    grammar: str | None
    beams: int
    length_penalty: float
    early_stopping: EarlyStopping
    beam_groups: int
    diversity_penalty: float
    contrastive_alpha: float


@dataclass(frozen=True)
class SamplingParams:
    """How the tokens of one request are chosen.

    The logits are edited first (penalties, then ``logit_bias``, then what is forbidden), then become a distribution by
    the temperature, which is cut in the order top_k, typical_p, min_p, top_p, epsilon_cutoff, eta_cutoff: each filter
    sees what the one before it left, adding up to 1 again. At temperature 0 nothing is cut: the likeliest token is
    taken. Mirostat takes the place of all filters. Beam search and contrastive search draw nothing: penalties, biases
    and what is forbidden hold for them too, the temperature and the filters have no say.

    Args:
        max_tokens: most tokens to generate.
        temperature: 0 takes the likeliest token; 1 samples from the model's own distribution.
        top_k: keep only the k likeliest tokens (Fan et al. 2018) and those as likely as the k-th; None for all.
        top_p: keep the smallest set of likeliest tokens whose probability reaches p (Holtzman et al. 2020).
        min_p: drop tokens less likely than this fraction of the likeliest one's probability (Nguyen et al. 2024).
        stop: texts that end the generation; none of them is part of the result.
        seed: makes the request repeatable, whatever else is in its batch; at least 0; None draws one.
        typical_p: keep the smallest set of tokens whose surprise is nearest to the expected one and whose probability
            reaches p, and those as near as the last of them (Meister et al. 2022).
        epsilon_cutoff: drop tokens less likely than this, except the likeliest (Hewitt et al. 2022).
        eta_cutoff: the same with a limit that falls with the entropy h in nats: min(eta, sqrt(eta) exp(-h)).
        mirostat: 1 and 2 steer the surprise of the tokens to ``mirostat_tau`` (Basu et al. 2020): 1 by how many tokens
            may be chosen, 2 by how surprising one may be. 0 does not.
        mirostat_tau: the surprise aimed at, in bits.
        mirostat_eta: how much of an error is corrected at once.
        repetition_penalty: divides positive logits, and multiplies negative ones, of tokens of the prompt or the
            output (Keskar et al. 2019).
        presence_penalty: taken off the logits of tokens of the output.
        frequency_penalty: the same, once for each time the token is there.
        no_repeat_ngram: no run of so many tokens comes twice, prompt and output together; 0 allows it.
        logit_bias: what is added to the logits of some tokens.
        bad_tokens: runs of tokens of which the last may not follow the others; a single one is forbidden anywhere.
        allowed_tokens: only these may be chosen; None for all.
        min_tokens: end and stop tokens are forbidden before there are so many.
        stop_tokens: tokens that end the generation.
        ignore_end: the model's own end token does not end the generation.
        logprobs: give the log-probability of each token, and those of so many of the likeliest at its place; None
            gives nothing. They are of the model's own distribution, before anything here has changed it.
        prompt_logprobs: the same for the tokens of the prompt.
        n: completions to make.
        best_of: make so many and keep the ``n`` with the highest mean log-probability; None for ``n``.
        json_schema: a JSON schema that the text must match; at most one of this and the next two.
        regex: a regular expression that the whole text must match.
        grammar: a grammar that the text must follow, as Lark or llama.cpp (``::=``) write them.
        beams: beam search: so many texts are continued side by side, and the ``n`` with the best scores are given, the
            best first. 1 searches nothing.
        length_penalty: a score is the sum of a text's log-probabilities over its number of tokens to this power (the
            end token counts; Wu et al. 2016, simplified): above 0 longer texts gain, below 0 shorter ones.
        early_stopping: when a beam search ends. ``full``: as soon as there are as many ended texts as beams (True in
            transformers). ``estimate``: once the best text that goes on, scored at the length it has, is no better than
            the worst of them (False in transformers). ``never``: the same, scored at the length at which it could still
            gain most (``"never"`` in transformers).
        beam_groups: diverse beam search: the beams are so many groups of equal size, each a beam search by itself.
        diversity_penalty: taken off the log-probability of a token, once for each beam of the groups before that goes
            on with it at the same place (Vijayakumar et al. 2016, Hamming diversity).
        contrastive_alpha: contrastive search: of the ``top_k`` likeliest tokens the one is taken whose probability
            times 1 - alpha is furthest above alpha times the largest cosine between its features and those of a token
            before it (Su et al. 2022, eq. 5). 0 searches nothing.
    """

    max_tokens: int = 128
    temperature: float = 0.8
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    stop: tuple[str, ...] = ()
    seed: int | None = None
    typical_p: float = 1.0
    epsilon_cutoff: float = 0.0
    eta_cutoff: float = 0.0
    mirostat: Literal[0, 1, 2] = 0
    mirostat_tau: float = 5.0
    mirostat_eta: float = 0.1
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    no_repeat_ngram: int = 0
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    bad_tokens: tuple[tuple[int, ...], ...] = ()
    allowed_tokens: tuple[int, ...] | None = None
    min_tokens: int = 0
    stop_tokens: tuple[int, ...] = ()
    ignore_end: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    n: int = 1
    best_of: int | None = None
    json_schema: str | None = None
    regex: str | None = None
    grammar: str | None = None
    beams: int = 1
    length_penalty: float = 1.0
    early_stopping: EarlyStopping = "estimate"
    beam_groups: int = 1
    diversity_penalty: float = 0.0
    contrastive_alpha: float = 0.0

    @classmethod
    def of(cls, **sampling: Unpack[Sampling]) -> SamplingParams:
        """Build from keyword arguments; ``stop`` may be one text, and any sequence serves where a tuple is meant."""
        return cls(**sampling)  # type: ignore[arg-type]

    def __post_init__(self) -> None:
        self._tidy()
        for name in ("presence_penalty", "frequency_penalty"):
            check_number(name, getattr(self, name))
        for name, (fits, wanted) in _NUMBERS.items():
            if not fits(check_number(name, getattr(self, name))):
                raise UsageError(f"{name} = {getattr(self, name)} must be {wanted}.")
        for name, least in _COUNTS.items():
            value = getattr(self, name)
            if value is not None or _DEFAULTS[name] is not None:
                check_count(name, value, least)
        if self.seed is not None and not 0 <= whole("seed", self.seed) < 2**63:
            raise UsageError(f"seed = {self.seed} must be at least 0 and below 2^63.")
        if self.mirostat not in (0, 1, 2) or isinstance(self.mirostat, bool):
            raise UsageError(f"mirostat = {self.mirostat!r} must be 0 (off), 1 or 2 (its versions).")
        if not isinstance(self.ignore_end, bool):
            raise UsageError(f"ignore_end = {self.ignore_end!r} must be true or false.")
        self._check_texts()
        self._check_together()
        self._check_search()

    @property
    def reads_prompt(self) -> bool:
        """Whether every token of the prompt has to be computed, though it may be in a cache."""
        return self.prompt_logprobs is not None or self.contrastive_alpha > 0.0

    def _tidy(self) -> None:
        """Any sequence will do where a tuple is meant, and the caller may go on to change what was given."""
        put = object.__setattr__
        stop: Any = self.stop
        put(self, "stop", (stop,) if isinstance(stop, str) else listed("stop", stop))
        put(self, "bad_tokens", tuple(token_ids("bad_tokens", run) for run in listed("bad_tokens", self.bad_tokens)))
        put(self, "stop_tokens", token_ids("stop_tokens", self.stop_tokens))
        if self.allowed_tokens is not None:
            put(self, "allowed_tokens", token_ids("allowed_tokens", self.allowed_tokens))
        if not isinstance(self.logit_bias, Mapping):
            raise UsageError(f"logit_bias = {self.logit_bias!r} must map token ids to numbers.")
        bias = dict(zip(token_ids("logit_bias", self.logit_bias), self.logit_bias.values(), strict=True))
        for token, value in bias.items():
            check_number(f"logit_bias of token {token}", value)
        put(self, "logit_bias", bias)

    def _check_texts(self) -> None:
        stop: tuple[Any, ...] = self.stop
        for text in stop:
            if not isinstance(text, str):
                raise UsageError(f"stop: {text!r} is not a text.")
            if not text:
                raise UsageError("stop: an empty text would end every generation at once.")
        given = [name for name in ("json_schema", "regex", "grammar") if getattr(self, name) is not None]
        for name in given:
            if not isinstance(getattr(self, name), str):
                raise UsageError(f"{name} = {getattr(self, name)!r} must be a text.")
        if len(given) > 1:
            raise UsageError(f"{given[0]} and {given[1]} are both given: a text is held to one of them at most.")

    def _check_together(self) -> None:
        """What each is fine by itself, and cannot be had at once."""
        if self.min_tokens > self.max_tokens:
            raise UsageError(f"min_tokens = {self.min_tokens} is more than max_tokens = {self.max_tokens}.")
        if self.best_of is not None and self.best_of < self.n:
            raise UsageError(f"best_of = {self.best_of} is less than n = {self.n}: so many cannot be kept.")
        if () in self.bad_tokens:
            raise UsageError("bad_tokens: an empty run would forbid every token.")
        if self.allowed_tokens == ():
            raise UsageError("allowed_tokens is empty: give at least one token, or None to allow all.")
        if self.mirostat:
            if self.temperature == 0.0:
                raise UsageError(
                    f"mirostat = {self.mirostat} needs a temperature above 0: at 0 there is nothing to steer."
                )
            for name in _FILTERS:
                if getattr(self, name) != _DEFAULTS[name]:
                    raise UsageError(
                        f"mirostat = {self.mirostat} takes the place of all filters: leave {name} at "
                        f"{_DEFAULTS[name]}, or mirostat at 0."
                    )

    def _check_search(self) -> None:
        """What belongs to one kind of search only, and what no search has a use for."""
        if self.early_stopping not in (choices := get_args(EarlyStopping)):
            raise UsageError(f"early_stopping = {self.early_stopping!r} must be one of {', '.join(choices)}.")
        if self.beams > 1:
            self._check_beams()
            self._check_undrawn("beam search", _FILTERS)
        else:
            for name in ("length_penalty", "early_stopping", "beam_groups", "diversity_penalty"):
                if getattr(self, name) != _DEFAULTS[name]:
                    raise UsageError(f"{name} belongs to beam search: give beams, 2 or more, or leave it out.")
        if self.contrastive_alpha:
            if self.top_k is None:
                raise UsageError("contrastive_alpha needs top_k: how many tokens are tried at each place, such as 4.")
            if self.n > 1:
                raise UsageError(f"n = {self.n}: contrastive search finds one text. Leave n at 1.")
            self._check_undrawn("contrastive search", tuple(name for name in _FILTERS if name != "top_k"))

    def _check_beams(self) -> None:
        if self.contrastive_alpha:
            raise UsageError("beams and contrastive_alpha are both given: a text is found by one search.")
        if self.n > self.beams:
            raise UsageError(f"n = {self.n} is more than beams = {self.beams}: so many texts are not found.")
        if self.beams % self.beam_groups:
            raise UsageError(f"beam_groups = {self.beam_groups} does not divide beams = {self.beams}.")
        if (self.beam_groups > 1) != (self.diversity_penalty > 0.0):
            raise UsageError(
                "beam_groups and diversity_penalty belong together: without a penalty all groups find the same texts, "
                "and a single group has none to differ from. Give both, or neither."
            )

    def _check_undrawn(self, search: str, filters: Sequence[str]) -> None:
        """Nothing is given that only means something where tokens are drawn."""
        if self.temperature not in (0.0, _DEFAULTS["temperature"]):
            raise UsageError(f"temperature = {self.temperature}: {search} draws nothing. Leave it out, or give 0.")
        for name in (*filters, "mirostat", "best_of"):
            if getattr(self, name) != _DEFAULTS[name]:
                raise UsageError(f"{name} = {getattr(self, name)}: {search} draws nothing. Leave it out.")


_FILTERS = ("top_k", "typical_p", "min_p", "top_p", "epsilon_cutoff", "eta_cutoff")
_DEFAULTS = {each.name: each.default for each in fields(SamplingParams)}

_Test = Callable[[float], bool]
_SHARE: tuple[_Test, str] = (lambda value: 0.0 < value <= 1.0, "above 0 and at most 1")
_LIMIT: tuple[_Test, str] = (lambda value: 0.0 <= value < 1.0, "at least 0 and below 1")
_POSITIVE: tuple[_Test, str] = (lambda value: value > 0.0, "above 0")
_NUMBERS: dict[str, tuple[_Test, str]] = {
    "temperature": (lambda value: value >= 0.0, "0 or more"),
    "top_p": _SHARE,
    "typical_p": _SHARE,
    "min_p": _LIMIT,
    "epsilon_cutoff": _LIMIT,
    "eta_cutoff": _LIMIT,
    "mirostat_tau": _POSITIVE,
    "mirostat_eta": _POSITIVE,
    "repetition_penalty": _POSITIVE,
    "length_penalty": (lambda value: abs(value) <= 10.0, "between -10 and 10"),
    "diversity_penalty": (lambda value: value >= 0.0, "0 or more"),
    "contrastive_alpha": (lambda value: 0.0 <= value <= 1.0, "at least 0 and at most 1"),
}
_COUNTS = {
    "max_tokens": 1, "top_k": 1, "n": 1, "best_of": 1, "min_tokens": 0, "no_repeat_ngram": 0, "logprobs": 0,
    "prompt_logprobs": 0, "beams": 1, "beam_groups": 1,
}  # fmt: skip


def candidates(logits_V: Tensor, params: SamplingParams, mu: float | None = None) -> Candidates:
    """What ``params`` leave of a distribution.

    Args:
        logits_V: float32 on the CPU, after all that edits logits.
        mu: mirostat's limit on the surprise of a token, in bits; None for its start, twice ``mirostat_tau``.

    Raises:
        GroundupError: the logits hold NaN, or +inf, or nothing else than -inf.
    """
    array_V: Floats = logits_V.numpy()
    highest = float(array_V.max())
    if not math.isfinite(highest):
        raise GroundupError(NOT_FINITE)
    if params.temperature == 0.0:
        return Candidates(np.array([array_V.argmax()]), torch.ones(1))
    ids: Ids | None = None
    if params.top_k is not None and params.top_k < len(array_V):
        ids = largest(array_V, params.top_k)
        logits_V = logits_V[torch.from_numpy(ids)]
    # The maximum is taken off before the division, so that a very small temperature cannot overflow; one that float32
    # rounds to zero would divide 0 by 0.
    p_K = ((logits_V - highest) / max(params.temperature, torch.finfo(torch.float32).tiny)).softmax(dim=-1)
    if params.mirostat:
        surprise = 2.0 * params.mirostat_tau if mu is None else mu
        places = (as_surprising if params.mirostat == 1 else no_more_surprising)(p_K.numpy(), surprise)
        return Candidates(places, renormalised(p_K, places), whole_V=p_K)
    for kept in _filters(params):
        places = kept(p_K)
        p_K = renormalised(p_K, places)
        ids = places if ids is None else ids[places]
    return Candidates(ids, p_K)


def _filters(params: SamplingParams) -> Iterator[Callable[[Tensor], Ids]]:
    """Those asked for, in their order: from probabilities to the places that stay, ascending."""
    if params.typical_p < 1.0:
        yield lambda p_K: typical(p_K, params.typical_p)
    if params.min_p > 0.0:
        yield lambda p_K: at_least(p_K.numpy(), params.min_p * float(p_K.max()))
    if params.top_p < 1.0:
        yield lambda p_K: nucleus(p_K.numpy(), params.top_p)
    if params.epsilon_cutoff > 0.0:
        yield lambda p_K: at_least(p_K.numpy(), params.epsilon_cutoff)
    if params.eta_cutoff > 0.0:
        yield lambda p_K: at_least(p_K.numpy(), eta_limit(p_K, params.eta_cutoff))


def probabilities(logits_V: Tensor, params: SamplingParams) -> Tensor:
    """The distribution that ``params`` sample from, float32 V on the CPU; one-hot at temperature 0.

    What depends on the tokens before (penalties, bans, grammars) is no part of it: see
    :func:`groundup.inference.sampler.distribution`.

    Raises:
        GroundupError: the logits hold NaN, or +inf.
    """
    logits_V = on_cpu(logits_V)
    return candidates(logits_V, params).dense(len(logits_V))


def choose(logits_V: Tensor, params: SamplingParams, generator: torch.Generator) -> int:
    """Draw one token id. On the CPU, so that a seed means the same on every device."""
    return candidates(on_cpu(logits_V), params).draw(generator)


def on_cpu(logits: Tensor) -> Tensor:
    """Logits as float32 on the CPU, outside of any graph."""
    return logits.detach().to(device="cpu", dtype=torch.float32)
