"""The algorithm of bpe_reference.py at the speed of the machine: Numba functions over bytes.

Read in this order: machine.py (bytes at an address), cut.py (text to chunks), merge.py (a chunk to ids), words.py
(chunks seen before; whole texts to ids), learn.py (chunks to merges), state.py (what they are told).

compiled.py owns the memory that they work on.
"""
