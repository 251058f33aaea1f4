"""The knobs of a corpus: the ``corpus.*`` keys of a recipe."""

from __future__ import annotations

from dataclasses import dataclass

from groundup.runtime import UsageError


@dataclass(frozen=True)
class CorpusRecipe:
    """How text becomes a corpus.

    Args:
        val_fraction: part of the bytes that is held out for validation, at most 0.5.
        max_val_bytes: most bytes that are held out, however large the corpus.
        min_chars: shorter documents are dropped.
        dedup: whether exact duplicates (but for spacing) are dropped.
        max_bytes: read at most so many bytes of text; none reads everything.
        tokenizer_bytes: learn the vocabulary from so many bytes of the training text at most, taken evenly from all of
            it; more hardly changes it and takes longer.
        shard_tokens: most tokens in one file of token shards.
        split_seed: decides which documents are held out, whatever the seed of the run: runs of other seeds are
            measured on the same text.
    """

    val_fraction: float = 0.05
    max_val_bytes: int = 1_000_000
    min_chars: int = 16
    dedup: bool = True
    max_bytes: int | None = None
    tokenizer_bytes: int = 2_000_000_000
    shard_tokens: int = 100_000_000
    split_seed: int = 1337

    def __post_init__(self) -> None:
        if not 0 < self.val_fraction <= 0.5:
            raise UsageError(f"corpus.val_fraction = {self.val_fraction}: it must lie above 0 and be at most 0.5.")
        for name, least in (
            ("max_val_bytes", 256),
            ("min_chars", 1),
            ("max_bytes", 1),
            ("tokenizer_bytes", 1),
            ("shard_tokens", 1),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UsageError(f"corpus.{name} = {value}: it must be at least {least}.")
