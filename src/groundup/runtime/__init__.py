"""The ground floor: what every other room stands on.

Read in this order: errors.py (how a person's mistake is told), files.py (how anything is written so that a crash
loses nothing), console.py (what the terminal shows), interrupt.py (how long work is stopped), seeds.py (randomness
and its state), lazy.py (names imported on first use), device.py (which device and precision, found by running),
environment.py (what a run notes about the machine), doctor.py (the same, for a person), monitor.py (what the machine
does while a run goes on), process_group.py (several processes that train one model), download.py (one file from the
web), hub.py (the Hugging Face hub), gguf_file.py (the head of llama.cpp's files),
compiled_functions.py (what Numba compiles, kept on disk).

This room knows nothing of text, tokens or models, and imports torch only inside the functions that need it.
"""

from groundup.runtime.console import Progress, progress, say, warn
from groundup.runtime.errors import GroundupError, UsageError, os_errors
from groundup.runtime.files import atomic_folder, read_json, sha256_file, write_atomic, write_json

__all__ = [
    "GroundupError",
    "Progress",
    "UsageError",
    "atomic_folder",
    "os_errors",
    "progress",
    "read_json",
    "say",
    "sha256_file",
    "warn",
    "write_atomic",
    "write_json",
]
