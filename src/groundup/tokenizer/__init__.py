"""The tokenizer: text to token ids and back.

Read in this order: tokenizer.py (the one public class), bpe_reference.py (byte-pair encoding as you would
explain it), bpe.py (the same algorithm, fast), pretokenize.py (how text is cut before merging), alphabet.py
(bytes as printable characters), huggingface.py (tokenizer.json, which other tools read), describe.py (a
tokenizer shown to a person).

This room knows nothing of tensors, models or documents. Everything it writes is JSON or plain text.
"""

from groundup.tokenizer.describe import compression, vocabulary_dump
from groundup.tokenizer.pretokenize import PATTERNS
from groundup.tokenizer.tokenizer import END_OF_TEXT, Tokenizer

__all__ = ["END_OF_TEXT", "PATTERNS", "Tokenizer", "compression", "vocabulary_dump"]
