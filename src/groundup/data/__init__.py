"""The data room: any text in, a training corpus of token shards out, and batches of it.

Read in this order: document.py (what flows through here), sources.py (where text comes from:
stdlib_source.py, files.py, hub.py, download.py), clean.py and dedup.py (what is mended and what is dropped,
with the reason), split.py (what is held out), shards.py (tokens on the disk), pipeline.py (the whole way, in
one atomic folder; recipe.py holds its knobs, prepared.py its result), permutation.py and loader.py (batches
as a pure function of seed and index).

This room knows numpy but no tensors: it never imports torch, never trains, and never reads a pickle.
"""

from typing import TYPE_CHECKING

from groundup.runtime.lazy import lazy_names

if TYPE_CHECKING:
    from groundup.data.document import Document, Dropped
    from groundup.data.loader import TokenLoader
    from groundup.data.pipeline import prepare, suggest_vocab_size
    from groundup.data.prepared import PreparedData
    from groundup.data.recipe import CorpusRecipe
    from groundup.data.shards import ShardWriter, TokenSet
    from groundup.data.sources import NAMED_SOURCES, NamedSource, Source, default_data_dir, get_source, open_source

# Numpy and the tokenizer are imported when a name is used: a command line that needs only flags starts fast.
_HOME = {
    "CorpusRecipe": "recipe",
    "Document": "document",
    "Dropped": "document",
    "NAMED_SOURCES": "sources",
    "NamedSource": "sources",
    "PreparedData": "prepared",
    "ShardWriter": "shards",
    "Source": "sources",
    "TokenLoader": "loader",
    "TokenSet": "shards",
    "default_data_dir": "sources",
    "get_source": "sources",
    "open_source": "sources",
    "prepare": "pipeline",
    "suggest_vocab_size": "pipeline",
}

__all__ = [
    "NAMED_SOURCES",
    "CorpusRecipe",
    "Document",
    "Dropped",
    "NamedSource",
    "PreparedData",
    "ShardWriter",
    "Source",
    "TokenLoader",
    "TokenSet",
    "default_data_dir",
    "get_source",
    "open_source",
    "prepare",
    "suggest_vocab_size",
]

__getattr__ = lazy_names(__name__, _HOME)
