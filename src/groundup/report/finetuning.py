"""What came of fine-tuning on examples: figures and answers, before and after, and what the model has forgotten."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from groundup.report.examples import caution, learnt_from
from groundup.report.facts import Fact, effort
from groundup.report.jsonl import Row
from groundup.report.measures import Measure, exact, lines, percent, perplexity, ratio, tenths
from groundup.report.metrics import is_number
from groundup.report.plots import draw_plots
from groundup.report.run_folder import RunFolder, number_of, part_of, rows_of, words_of
from groundup.runtime.console import quantity

OPEN_ANSWERS = 3  # shown at once; the others wait to be opened
LOSS = "Nats per token that is learnt: points as measured, line smoothed."

MEASURES = (
    Measure("loss", "loss", "nats per token of the answers; lower is better", better="lower"),
    Measure("perplexity", "perplexity", "e to the loss; lower is better", perplexity, "lower"),
    Measure("bleu", "BLEU", "shared runs of words, 0 to 100; higher is better", tenths, "higher"),
    Measure("rouge1", "ROUGE-1", "shared words; higher is better", percent, "higher"),
    Measure("rouge2", "ROUGE-2", "shared pairs of words; higher is better", percent, "higher"),
    Measure("rouge_l", "ROUGE-L", "longest common subsequence of words; higher is better", percent, "higher"),
    Measure("exact_match", "the given answer", "word for word; higher is better", percent, "higher"),
    Measure("valid_json", "valid JSON", "one value, and nothing around it; higher is better", percent, "higher"),
    Measure("fits_pattern", "fits the pattern", "as a whole; higher is better", percent, "higher"),
    Measure("ends_itself", "ends by itself", "and not at the limit of tokens; higher is better", percent, "higher"),
    Measure("without_loop", "without a loop", "at most half repeats what it said; higher is better", percent, "higher"),
    Measure(
        "repetition", "repetition", "runs of four words that stood there before; lower is better", percent, "lower"
    ),
    Measure("length_ratio", "length", "beside the given answers; 1 is as long", ratio),
)
KNEW = (
    Measure("bits_per_byte", "bits per byte", "lower is better", better="lower"),
    Measure("perplexity", "perplexity", "lower is better", perplexity, "lower"),
    Measure("loss", "loss", "nats per token; lower is better", better="lower"),
)


# ---- in words


def before_and_after(run: RunFolder) -> tuple[Row, Row]:
    """The rows of these names; empty ones where they are not there."""
    named = {words_of(row, "name"): row for row in reversed(run.evaluation_rows)}
    return named.get("before", {}), named.get("after", {})


def headline(run: RunFolder) -> str:
    """What came of the run, in one sentence that holds whatever did."""
    before, after = before_and_after(run)
    if not after:
        return _unfinished(run)
    told = _of_loss(before, after)
    forgetting = _of_forgetting(part_of(run.evaluation, "forgetting"))
    return f"{told}; {forgetting}." if forgetting else f"{told}."


def _of_loss(before: Row, after: Row) -> str:
    ours, theirs = number_of(after, "loss"), number_of(before, "loss")
    if ours is None:
        return "After fine-tuning the loss on held-out answers is not a finite number"
    end = f"{exact(ours)} nats per token"
    if theirs is None:
        return f"After fine-tuning the loss on held-out answers is {end}; what it was before is not known"
    if exact(ours) == exact(theirs):
        return f"The loss on held-out answers stayed at {end}: fine-tuning taught nothing that shows there"
    if ours < theirs:
        return f"The loss on held-out answers fell from {exact(theirs)} to {end}"
    return f"The loss on held-out answers rose from {exact(theirs)} to {end}: what was learnt does not help there"


def _of_forgetting(forgetting: Row) -> str:
    """What became of the text that the model knew before; nothing where nobody looked."""
    then, now = (number_of(part_of(forgetting, name), "bits_per_byte") for name in ("before", "after"))
    if then is None:
        return ""
    where = "on the text that it knew before"
    if now is None:
        return f"{where} its bits per byte, {exact(then)} until then, are no longer a finite number"
    if exact(now) == exact(then):
        return f"{where} it needs {exact(now)} bits per byte as it did: it forgot nothing that shows"
    change = abs(100 * (now / then - 1)) if then > 0 else 0.0
    amount = "under 1%" if change < 1 else f"{change:.0f}%"
    if now > then:
        return f"{where} it needs {exact(now)} bits per byte instead of {exact(then)}, {amount} more: so much it forgot"
    return f"{where} it needs {exact(now)} bits per byte instead of {exact(then)}, {amount} fewer: it forgot nothing"


def _unfinished(run: RunFolder) -> str:
    """The sentence for a run that has not come to its end."""
    for kind, where in (("eval", "loss on held-out answers"), ("train", "training loss")):
        rows = [row for row in run.metrics if row.get("kind") == kind and is_number(row.get("loss"))]
        if rows:
            told = f"At step {rows[-1].get('step', '?')} the {where} was {exact(rows[-1]['loss'])} nats per token."
            return f"{told} Before and after have not been compared yet."
    return "Nothing has been measured yet."


# ---- the page


@dataclass(frozen=True)
class Answer:
    """One question with the given answer and those of the model."""

    where: str
    prompt: str
    reference: str
    before: str
    after: str


def answers_of(run: RunFolder) -> list[Answer]:
    """The answers of a run, in the order of its file."""
    keys = ("where", "prompt", "reference", "before", "after")
    return [Answer(*(words_of(row, key) for key in keys)) for row in rows_of(run.evaluation, "answers")]


def page(run: RunFolder) -> dict[str, Any]:
    """What the page of such a run shows, for ``templates/sft.html.j2``."""
    forgetting = part_of(run.evaluation, "forgetting")
    before, after = part_of(forgetting, "before"), part_of(forgetting, "after")
    answers = answers_of(run)
    return {
        "headline": headline(run),
        "warning": taught_nothing(run),
        "facts": facts(run),
        "plots": draw_plots(run.metrics, captions={"loss": LOSS}),
        "names": [words_of(row, "name") or "?" for row in run.evaluation_rows],
        "table": lines(run.evaluation_rows, MEASURES),
        "caution": caution(run.data),
        "knew": lines([before, after], KNEW),
        "knew_text": _knew_text(forgetting),
        "answers": answers[:OPEN_ANSWERS],
        "more_answers": answers[OPEN_ANSWERS:],
        "learnt": learnt_from(run.data),
    }


def taught_nothing(run: RunFolder) -> bool:
    """Whether the loss after fine-tuning is not lower, as far as is shown, than before, or not finite."""
    before, after = before_and_after(run)
    then, now = number_of(before, "loss"), number_of(after, "loss")
    if now is None:
        return bool(after)
    return then is not None and (now > then or exact(now) == exact(then))


def facts(run: RunFolder) -> list[Fact]:
    """The figures at the top."""
    before, after = before_and_after(run)
    found = []
    if (loss := number_of(after, "loss")) is not None:
        found.append(Fact(exact(loss), "loss on held-out answers"))
    if (loss := number_of(before, "loss")) is not None:
        found.append(Fact(exact(loss), "before"))
    adapter = part_of(run.evaluation, "adapter")
    trained, whole = number_of(adapter, "trained"), number_of(adapter, "of")
    if trained is not None:
        base = words_of(adapter, "base")
        method = words_of(adapter, "method") + (f" over {base}" if base and base != "as-is" else "")
        of = f" of {quantity(whole)}" if whole is not None else ""
        found.append(Fact(quantity(trained), f"parameters trained{of}{f', {method}' if method else ''}"))
    return found + effort(run)


def _knew_text(forgetting: Row) -> str:
    """Which text that is, and how much of it."""
    tokens = number_of(forgetting, "tokens")
    size = f"{tokens:,.0f} tokens" if tokens is not None else ""
    return ", ".join(filter(None, [words_of(forgetting, "text"), size]))
