"""What a run learns from: records read, bad ones named, repeated ones left out, some held out; and a note of all that.

The note is the run folder's data.json, which the report shows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

from groundup.data import Dropped, derive_key, open_records
from groundup.data.dedup import content_key
from groundup.model import ModelConfig
from groundup.posttraining.batches import ExampleLoader
from groundup.posttraining.conversations import BadRecord, Conversation, form_of, leave_out, read_conversations
from groundup.posttraining.encoding import Encoding, Example
from groundup.posttraining.labelled import LabelledText, class_names, label_ids, load_labelled, split_labelled
from groundup.posttraining.preview import pieces, summary
from groundup.posttraining.quality import Shared, check_template, of_length, shared_with_training, text_of
from groundup.posttraining.quality import without_duplicates as unrepeated
from groundup.posttraining.recipe import FinetuneRecipe
from groundup.posttraining.vocabulary import with_template
from groundup.runtime import GroundupError, UsageError
from groundup.tokenizer import Tokenizer

SHOWN = 20  # records that are named one by one
COMPARED = 100_000  # conversations up to which held-out ones are compared with training for near repeats: minutes above


class LeftOut:
    """Counts what is left out. A bad record ends the run, unless such are to be skipped.

    Args:
        skip_bad: whether they are.
    """

    def __init__(self, skip_bad: bool) -> None:
        self.skip_bad = skip_bad
        self.all: list[Dropped] = []

    def __call__(self, dropped: Dropped) -> None:
        """Note one.

        Raises:
            BadRecord: it is bad, and bad ones are not to be skipped.
        """
        if dropped.reason == "bad record" and not self.skip_bad:
            leave_out(dropped.name, BadRecord(dropped.detail), None)
        self.all.append(dropped)

    def note(self) -> dict[str, Any]:
        """For data.json."""
        counts = Counter(one.reason for one in self.all)
        named = [{"where": one.name, "reason": one.reason, "detail": one.detail} for one in self.all[:SHOWN]]
        return {"left_out": dict(counts.most_common()), "left_out_examples": named}


def held_out(key: bytes, fraction: float, seed: int) -> bool:
    """Whether what has this content belongs to the part that is held out: equal contents always do alike."""
    return derive_key(seed, int.from_bytes(key, "big")) < fraction * 2**64


# ---- answers


@dataclass(frozen=True)
class Answers:
    """Conversations to learn answers from.

    Args:
        tokenizer: with the template, and its special tokens.
        added: special tokens that the base model's tokenizer did not have.
        form: of the records.
        train, val: what is learnt, and what is held out.
        conversations: those that are held out, in the order of ``val``.
        shared: held-out ones that are learnt too, or nearly.
        left_out: what was left out.
        digest: of all tokens and masks in their order: another digest is another run.
    """

    tokenizer: Tokenizer
    added: list[str]
    form: str
    train: list[Example]
    val: list[Example]
    conversations: list[Conversation] = field(repr=False)
    shared: list[Shared]
    left_out: LeftOut
    digest: str

    @property
    def shown(self) -> Example:
        """The example that shows best what is learnt: of several turns where there are such, on a screen."""

        def instructive(example: Example) -> tuple[bool, bool, int]:
            turns = int((example.learn[1:] & ~example.learn[:-1]).sum())
            return len(example.ids) <= 384, turns > 1, min(len(example.ids), 128)

        return max(self.train[:256], key=instructive)

    def note(self, recipe: FinetuneRecipe) -> dict[str, Any]:
        """For data.json; the recipe has its length of rows."""
        assert recipe.context_length is not None
        packing = recipe.examples.packing
        rows = ExampleLoader(self.train, recipe.context_length, 1, recipe.seed, packing).report()
        return {
            "task": "sft", "source": recipe.data,
            "records": len(self.train) + len(self.val) + len(self.left_out.all),
            "train": len(self.train), "val": len(self.val), "test": 0,
            "lines": summary(self.form, self.train, self.left_out.all, rows),
            **self.left_out.note(), **_noted(self.shared),
            "preview": [vars(piece) for piece in pieces(self.tokenizer, self.shown)],
            "added_tokens": self.added, "digest": self.digest,
        }  # fmt: skip


def gather_answers(recipe: FinetuneRecipe, tokenizer: Tokenizer, config: ModelConfig) -> Answers:
    """Read, filter, split and encode what a recipe names.

    Args:
        tokenizer, config: of the model to go on from.

    Raises:
        BadRecord: a record is bad; the line names it.
        UsageError: something in the recipe does not fit the data or the model.
        GroundupError: a file cannot be read, or nothing is left to learn.
    """
    wanted, left_out = recipe.examples, LeftOut(recipe.skip_bad)
    assert recipe.data is not None
    train, form = _conversations(recipe, recipe.data, left_out)
    if recipe.val is not None:
        val, other = _conversations(recipe, recipe.val, left_out)
        if other != form:
            raise UsageError(f"val = {recipe.val}: its records have the form {other}, those of data have {form}.")
    else:
        train, val = _split(train, recipe.val_fraction, recipe.seed)
    added: list[str] = []
    if form != "text" and (wanted.template is not None or tokenizer.chat_template is None):
        usual = "hermes" if any(map(_calls_tools, (*train, *val))) else "chatml"
        tokenizer, added = with_template(tokenizer, wanted.template or usual)
    context = _context(recipe, config)
    encoding = Encoding(tokenizer, context, wanted.turns, recipe.long_examples)
    checked = wanted.check_template and form != "text"

    def encoded(conversations: list[Conversation]) -> tuple[list[Example], list[Conversation]]:
        kept = _checked(conversations, tokenizer, left_out) if checked else iter(conversations)
        by_name = {one.where: one for one in conversations}
        examples = list(of_length(encoding.examples(kept, left_out), wanted.least_tokens, wanted.most_tokens, left_out))
        return examples, [by_name[example.where] for example in examples]

    train_examples, train_kept = encoded(train)
    val_examples, val_kept = encoded(val)
    if not train_examples:
        first = f", the first ({left_out.all[0].name}): {left_out.all[0].reason}. {left_out.all[0].detail}"
        why = f" {len(left_out.all):,} were left out{first}" if left_out.all else ""
        raise GroundupError(f"{recipe.data}: nothing is left to learn from.{why}")
    near = 0.8 if len(train_kept) <= COMPARED else 1.0
    shared = shared_with_training(train_kept, val_kept, near) if val_kept else []
    return Answers(
        tokenizer, added, form, train_examples, val_examples, val_kept, shared, left_out,
        _digest(train_examples, val_examples),
    )  # fmt: skip


def _conversations(recipe: FinetuneRecipe, spec: str, left_out: LeftOut) -> tuple[list[Conversation], str]:
    wanted = recipe.examples
    form: str = wanted.form

    def seen() -> Iterator[tuple[str, Any]]:
        nonlocal form
        for where, record in open_records(spec, recipe.limit):
            if form == "auto":
                columns = recipe.columns.items()
                known = {ours: record.get(theirs) for ours, theirs in columns} if isinstance(record, dict) else {}
                form = form_of(record | known if known else record) or "auto"
            yield where, record

    read = read_conversations(seen(), wanted.form, recipe.columns, left_out)
    if wanted.duplicates or wanted.near_duplicates is not None:
        read = unrepeated(read, wanted.near_duplicates, left_out)
    return list(read), form


def _calls_tools(conversation: Conversation) -> bool:
    return bool(conversation.tools) or any(
        message["role"] == "tool" or message.get("tool_calls") for message in conversation.messages
    )


def _split(
    conversations: Sequence[Conversation], fraction: float, seed: int
) -> tuple[list[Conversation], list[Conversation]]:
    if not fraction:
        return list(conversations), []
    held = [held_out(content_key(text_of(one)), fraction, seed) for one in conversations]
    if conversations and not any(held):  # few records: at least one, as long as one is left to learn
        held = [number == len(held) - 1 and len(held) > 1 for number in range(len(held))]
    train = [one for one, out in zip(conversations, held, strict=True) if not out]
    return train, [one for one, out in zip(conversations, held, strict=True) if out]


def _checked(
    conversations: Iterable[Conversation], tokenizer: Tokenizer, left_out: LeftOut
) -> Iterator[Conversation]:  # fmt: skip
    for conversation in conversations:
        try:
            check_template(conversation, tokenizer.chat)
        except BadRecord as error:
            left_out(Dropped(conversation.where, "bad record", str(error).removeprefix(f"{conversation.where}: ")))
        except GroundupError as error:
            left_out(Dropped(conversation.where, "bad record", str(error)))
        else:
            yield conversation


def _context(recipe: FinetuneRecipe, config: ModelConfig) -> int:
    if recipe.context_length is not None and recipe.context_length > config.context_length:
        raise UsageError(
            f"context_length = {recipe.context_length}, but the model of init_from = {recipe.init_from} was made for "
            f"{config.context_length}. Leave it out; --examples.too-long cut or drop deals with longer examples."
        )
    return recipe.context_length or config.context_length


def _digest(*parts: Sequence[Example]) -> str:
    found = blake2b(digest_size=16)
    for part in parts:
        found.update(len(part).to_bytes(8, "little"))
        for example in part:
            found.update(example.ids.tobytes() + example.learn.tobytes())
    return found.hexdigest()


# ---- classes


@dataclass(frozen=True)
class LabelledMaterial:
    """Texts to learn classes from.

    Args:
        classes: their names.
        train, val, test: what is learnt, what settings are chosen on, what is measured on.
        shared: texts to measure on that are learnt too, or nearly.
        left_out: what was left out.
    """

    classes: list[str]
    train: list[LabelledText]
    val: list[LabelledText]
    test: list[LabelledText]
    shared: list[Shared]
    left_out: LeftOut

    @property
    def digest(self) -> str:
        """Of all texts and labels in their order."""
        found = blake2b(digest_size=16)
        for part in (self.train, self.val, self.test):
            found.update(len(part).to_bytes(8, "little"))
            for text in part:
                found.update(f"{text.label}\0{text.text}\0".encode("utf-8", "surrogatepass"))
        return found.hexdigest()

    def note(self, recipe: FinetuneRecipe) -> dict[str, Any]:
        """For data.json."""
        counts = Counter(text.label for part in (self.train, self.val, self.test) for text in part)
        lengths = sorted(len(text.text) for text in self.train)
        return {
            "task": "classify", "source": recipe.data,
            "records": sum(counts.values()) + len(self.left_out.all),
            "train": len(self.train), "val": len(self.val), "test": len(self.test),
            "lines": [
                f"classes   {len(self.classes)}", f"texts     {sum(counts.values()):,}",
                f"longest   {lengths[-1]:,} characters, half have at most {lengths[(len(lengths) - 1) // 2]:,}",
            ],
            **self.left_out.note(), **_noted(self.shared),
            "classes": {name: counts[name] for name in self.classes}, "added_tokens": [], "digest": self.digest,
        }  # fmt: skip


def gather_labelled(recipe: FinetuneRecipe, tokenizer: Tokenizer, config: ModelConfig) -> LabelledMaterial:
    """Read, filter and split the labelled texts that a recipe names.

    Raises:
        BadRecord: a record is bad, or a label is unseen in training; the line names it.
        GroundupError: a file cannot be read, there is one class only, or nothing is left to measure on.
    """
    from groundup.posttraining.labelled import shared_texts

    wanted, left_out, context = recipe.classes, LeftOut(recipe.skip_bad), _context(recipe, config)
    assert recipe.data is not None
    texts = load_labelled(recipe.data, recipe.columns, recipe.limit, left_out)
    val_fraction = 0.0 if recipe.val is not None else recipe.val_fraction
    test_fraction = 0.0 if wanted.test is not None else wanted.test_fraction
    class_names(texts)  # one class alone is said before anything is split
    parts = split_labelled(texts, test_fraction, val_fraction, recipe.seed)
    train, val, test = parts
    if recipe.val is not None:
        val = load_labelled(recipe.val, recipe.columns, None, left_out)
    if wanted.test is not None:
        test = load_labelled(wanted.test, recipe.columns, None, left_out)
    classes = class_names(train)
    val, test = (_known(part, classes, left_out) for part in (val, test))
    if recipe.too_long == "drop":
        train, val, test = (_fitting(part, tokenizer, context, left_out) for part in (train, val, test))
        class_names(train)
    if not val or not test:
        name = "val" if not val else "test"
        raise GroundupError(f"{recipe.data}: no text is left for {name}. Give more texts, or a larger {name}_fraction.")
    return LabelledMaterial(classes, train, val, test, shared_texts(train, [*val, *test]), left_out)


def _fitting(
    texts: Sequence[LabelledText], tokenizer: Tokenizer, context: int, left_out: LeftOut
) -> list[LabelledText]:
    """Those that fit into the context, with a token before and one behind."""
    found = []
    for text, ids in zip(texts, tokenizer.encode_batch([text.text for text in texts]), strict=True):
        if len(ids) + 2 <= context:
            found.append(text)
        else:
            left_out(Dropped(text.where, "longer than the context"))
    return found


def _known(texts: Iterable[LabelledText], classes: Sequence[str], left_out: LeftOut) -> list[LabelledText]:
    """Those whose label training has."""
    found = []
    for text in texts:
        try:
            label_ids([text], classes)
        except GroundupError as error:
            left_out(Dropped(text.where, "bad record", str(error).removeprefix(f"{text.where}: ")))
        else:
            found.append(text)
    return found


def _noted(shared: Sequence[Shared]) -> dict[str, Any]:
    return {"shared": [one._asdict() for one in shared[:SHOWN]], "shared_count": len(shared)}
