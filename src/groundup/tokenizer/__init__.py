"""The tokenizer: text to token ids and back.

Read in this order: tokenizer.py (the one public class), vocabulary.py (what a tokenizer consists of), bpe_reference.py
(byte-pair encoding as you would explain it), pretokenize.py (how text is cut before merging), bpe.py (the same
algorithm, fast in plain Python), kernels/ (the same, at the speed of the machine), lookup.py (words and characters).

What stands around them: train.py (what learning a vocabulary counts, checks and numbers), encoder.py (kernels, or
bpe.py where Numba is missing), compiled.py (the memory the kernels work on), rules.py (tokens and merges as both want
them), unicode_classes.py (which characters are letters), added_tokens.py (special tokens and normalization, before any
algorithm), alphabet.py (bytes as printable characters), formats/ (other people's vocabularies, a file per format).

Conversations: chat.py (a conversation as token ids), chat_presets.py (the forms everybody knows), chat_sandbox.py
(where a template runs). Shown to a person: describe.py (figures), view.py (colours and HTML), measure.py (how fast it
is, beside others).

This room knows nothing of tensors, models or documents. Everything it writes is JSON or plain text, but for the
SentencePiece models of others, which it passes on.
"""

from typing import TYPE_CHECKING

from groundup.runtime.lazy import lazy_names

if TYPE_CHECKING:
    from groundup.tokenizer.chat import CHAT_TEMPLATES, ChatTemplate
    from groundup.tokenizer.describe import compression, vocabulary_dump
    from groundup.tokenizer.pretokenize import PATTERNS
    from groundup.tokenizer.tokenizer import Tokenizer
    from groundup.tokenizer.vocabulary import END_OF_TEXT, Vocabulary

_LAZY = {
    "Tokenizer": "tokenizer",
    "Vocabulary": "vocabulary",
    "END_OF_TEXT": "vocabulary",
    "PATTERNS": "pretokenize",
    "ChatTemplate": "chat",
    "CHAT_TEMPLATES": "chat",
    "compression": "describe",
    "vocabulary_dump": "describe",
}

__all__ = [
    "CHAT_TEMPLATES",
    "END_OF_TEXT",
    "PATTERNS",
    "ChatTemplate",
    "Tokenizer",
    "Vocabulary",
    "compression",
    "vocabulary_dump",
]

# Loaded on first use: whoever wants one file of this room does not wait for the others.
__getattr__ = lazy_names(__name__, _LAZY)
