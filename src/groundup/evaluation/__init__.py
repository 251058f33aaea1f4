"""Evaluation: how well a model predicts text it has not seen, beside yardsticks anyone can rerun.

Read in this order: bits_per_byte.py (the measure, and how a long text is scored), compressors.py (what gzip
and xz need for the same text), ngram.py (what counting can do: a byte-level n-gram with Kneser-Ney
smoothing), comparison.py (all of them in one table), divergence.py (a changed model beside the one it was made of).

This room scores; it never changes a model, and knows nothing of training. torch is imported only where a
model is called.
"""

from groundup.evaluation.bits_per_byte import BitsPerByte, Score, bits_per_byte, bytes_per_token, model_scorer
from groundup.evaluation.comparison import compare
from groundup.evaluation.compressors import compressor_rows
from groundup.evaluation.divergence import Divergence, divergence
from groundup.evaluation.ngram import KneserNeyModel

__all__ = [
    "BitsPerByte",
    "Divergence",
    "KneserNeyModel",
    "Score",
    "bits_per_byte",
    "bytes_per_token",
    "compare",
    "compressor_rows",
    "divergence",
    "model_scorer",
]
