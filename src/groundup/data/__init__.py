"""The data room: any text in, a training corpus of token shards out, and batches of it.

Read in this order: document.py (what flows through here), sources.py (where text comes from:
stdlib_source.py, files.py, hub.py, download.py), clean.py and dedup.py (what is mended and what is dropped,
with the reason), split.py (what is held out), shards.py (tokens on the disk), pipeline.py (the whole way, in
one atomic folder; recipe.py holds its knobs, prepared.py its result, and spool.py the texts on their way, which need
not fit into memory), permutation.py and loader.py (batches
as a pure function of seed and index; batch.py says what a batch is), packing.py (whole documents in a row), fim.py
(what is missing in the middle), mixture.py (several texts, in proportions that may change), loader_recipe.py (the knobs
of all these), prefetch.py (batches made ahead of their use). Two files stand aside: remote.py reads a prepared corpus
that lies elsewhere (places.py says where that can be), and interchange.py writes and reads token files of other
projects (token_files.py says what they look like).

This room knows numpy but no tensors: it never imports torch, never trains, and never reads a pickle.
"""

from typing import TYPE_CHECKING

from groundup.runtime.lazy import lazy_names

if TYPE_CHECKING:
    from groundup.data.batch import IGNORED, Loader, TokenBatch
    from groundup.data.document import Document, Dropped
    from groundup.data.fim import SENTINEL_TOKENS, FillInTheMiddle
    from groundup.data.interchange import export_tokens, import_tokens
    from groundup.data.loader import TokenLoader
    from groundup.data.loader_recipe import LoaderRecipe, make_loader
    from groundup.data.minhash import NearDuplicates
    from groundup.data.mixture import MixedLoader, Mixture, Weights
    from groundup.data.packing import PackedLoader, best_fit
    from groundup.data.permutation import Permutation, derive_key
    from groundup.data.pipeline import prepare, suggest_vocab_size
    from groundup.data.prefetch import Prefetcher
    from groundup.data.prepared import PreparedData
    from groundup.data.recipe import CorpusRecipe
    from groundup.data.record_sources import open_records
    from groundup.data.remote import open_remote, open_remote_tokens
    from groundup.data.shards import ShardWriter, TokenSet
    from groundup.data.sources import NAMED_SOURCES, NamedSource, Source, default_data_dir, get_source, open_source

# Numpy and the tokenizer are imported when a name is used: a command line that needs only flags starts fast.
_HOME = {
    "CorpusRecipe": "recipe",
    "Document": "document",
    "Dropped": "document",
    "FillInTheMiddle": "fim",
    "SENTINEL_TOKENS": "fim",
    "IGNORED": "batch",
    "Loader": "batch",
    "LoaderRecipe": "loader_recipe",
    "MixedLoader": "mixture",
    "Mixture": "mixture",
    "NAMED_SOURCES": "sources",
    "NamedSource": "sources",
    "NearDuplicates": "minhash",
    "PackedLoader": "packing",
    "Permutation": "permutation",
    "Prefetcher": "prefetch",
    "PreparedData": "prepared",
    "ShardWriter": "shards",
    "Source": "sources",
    "TokenBatch": "batch",
    "TokenLoader": "loader",
    "TokenSet": "shards",
    "Weights": "mixture",
    "best_fit": "packing",
    "default_data_dir": "sources",
    "derive_key": "permutation",
    "export_tokens": "interchange",
    "get_source": "sources",
    "import_tokens": "interchange",
    "make_loader": "loader_recipe",
    "open_records": "record_sources",
    "open_remote": "remote",
    "open_remote_tokens": "remote",
    "open_source": "sources",
    "prepare": "pipeline",
    "suggest_vocab_size": "pipeline",
}

__all__ = [
    "IGNORED",
    "NAMED_SOURCES",
    "SENTINEL_TOKENS",
    "CorpusRecipe",
    "Document",
    "Dropped",
    "FillInTheMiddle",
    "Loader",
    "LoaderRecipe",
    "MixedLoader",
    "Mixture",
    "NamedSource",
    "NearDuplicates",
    "PackedLoader",
    "Permutation",
    "Prefetcher",
    "PreparedData",
    "ShardWriter",
    "Source",
    "TokenBatch",
    "TokenLoader",
    "TokenSet",
    "Weights",
    "best_fit",
    "default_data_dir",
    "derive_key",
    "export_tokens",
    "get_source",
    "import_tokens",
    "make_loader",
    "open_records",
    "open_remote",
    "open_remote_tokens",
    "open_source",
    "prepare",
    "suggest_vocab_size",
]

__getattr__ = lazy_names(__name__, _HOME)
