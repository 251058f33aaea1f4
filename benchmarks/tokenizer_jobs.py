"""What one contender of the tokenizer benchmark does in a process of its own.

    python benchmarks/tokenizer_jobs.py encode|latency|train     a job on standard input, its result on standard output

Nothing is imported here before the contender needs it: a peer's peak memory must not hold our libraries.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from corpora import SEPARATOR, read_texts

if TYPE_CHECKING:
    from groundup.tokenizer import measure


# gigatoken needs awkward, which has itself imported at Numba's first call: 0.3 s and 40 MB that a user of this package
# does not pay. Where start and memory are measured, it is kept out.
WITHOUT_HOOKS = "import numba.core.entrypoints as hooks; hooks._already_initialized = True"


# ---- encoding


def encode_job(job: dict[str, Any]) -> dict[str, Any]:
    """Time cold and warm passes over texts; the ids go to a file."""
    import numpy as np

    from groundup.tokenizer import measure

    texts = json.loads(Path(job["texts"]).read_text())
    speed, result, encoder = measure.measure(
        encoder_of(job), texts, job["threads"], job["passes"], job["lists"], patience=30.0
    )
    ids, offsets = measure.collect_rows(result) if job["lists"] else encoder.collect(result)
    np.savez(job["ids"], ids=ids.astype(np.uint32), offsets=offsets)
    passes = {"construct": speed.construct, "cold": speed.cold, "warm": speed.warm}
    return {
        "construct": median(speed.construct),
        "cold": speed.typical_cold,
        "warm": speed.typical_warm,
        "passes": passes,
    }


def latency_job(job: dict[str, Any]) -> dict[str, Any]:
    """The median time of single calls in microseconds, by the length of the string."""
    from groundup.tokenizer import measure

    encoder = encoder_of(job)()
    one = encoder.one
    if job["contender"] == "gigatoken":  # to a list, as the others: its array is quicker to make
        array = encoder.one

        def one(text: str) -> list[int]:
            return array(text).tolist()

    strings = json.loads(Path(job["texts"]).read_text())
    return {length: 1e6 * median(measure.latencies(one, of, job["calls"])) for length, of in strings.items()}


def encoder_of(job: dict[str, Any]) -> Callable[[], measure.Encoder]:
    """What makes a new encoder of the job's contender, with the job's vocabulary."""
    from groundup.tokenizer import measure

    files = measure.VocabularyFiles(job["pattern"], Path(job["ranks"]), Path(job["json"]), job["scheme"])
    if job["contender"] == "groundup":
        return partial(measure.groundup_encoder, files)
    if job["contender"] == "rustbpe":
        return partial(rustbpe_encoder, Path(job["learned_from"]), job["expression"], job["vocab_size"])
    return partial(measure.PEERS[job["contender"]][1], files)


def rustbpe_encoder(file: Path, expression: str, vocab_size: int) -> measure.Encoder:
    """rustbpe reads no vocabulary: it learns this one again, which counts as its time to load."""
    import numpy as np
    import rustbpe

    from groundup.tokenizer import measure

    tok = rustbpe.Tokenizer()
    tok.train_from_iterator(read_texts(file), vocab_size, pattern=expression)
    return measure.Encoder(
        arrays=lambda texts, _: [np.array(ids, dtype=np.uint32) for ids in tok.batch_encode(list(texts))],
        lists=lambda texts, _: tok.batch_encode(list(texts)),
        one=tok.encode,
        collect=measure.collect_rows,
    )


# ---- training


def train_job(job: dict[str, Any]) -> dict[str, Any]:
    """Learn a vocabulary: seconds, and the peak memory of this whole process. The tokens go to a file."""
    train = {"groundup": train_groundup, "rustbpe": train_rustbpe, "gigatoken": train_gigatoken}
    learn, tokens_of = train.get(job["contender"], train_huggingface)(Path(job["file"]), job)
    started = time.perf_counter()
    learned = learn()
    seconds = time.perf_counter() - started
    peak = peak_memory()
    tokens = tokens_of(learned)
    Path(job["tokens"]).write_text(json.dumps([token.hex() for token in tokens]))
    return {"seconds": seconds, "peak_bytes": peak, "vocab_size": len(tokens)}


def peak_memory() -> int:
    """The most bytes of memory that this process has held."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    # Linux counts the process that started this one into ru_maxrss, but not into this.
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


Training = tuple[Callable[[], Any], Callable[[Any], list[bytes]]]
"""What is timed, and what makes a list of tokens of its result."""


def train_groundup(file: Path, job: dict[str, Any]) -> Training:
    """This package."""
    from numba.core import entrypoints

    entrypoints._already_initialized = True  # what WITHOUT_HOOKS says, for a process of one line
    from groundup.tokenizer import Tokenizer

    # Compiled code comes from its cache once in a process, which is measured by itself elsewhere.
    Tokenizer.train(["to be or not to be"] * 2, 260, pattern=job["expression"], show_progress=False)

    def learn() -> Tokenizer:
        return Tokenizer.train(
            read_texts(file), job["vocab_size"], pattern=job["expression"], special_tokens=(), show_progress=False
        )

    return learn, lambda tok: list(tok.vocabulary.tokens)


def train_rustbpe(file: Path, job: dict[str, Any]) -> Training:
    """rustbpe, from an iterator: it takes nothing else."""
    import rustbpe

    tok = rustbpe.Tokenizer()

    def tokens_of(_: None) -> list[bytes]:
        return [bytes(token) for token, _ in sorted(tok.get_mergeable_ranks(), key=lambda pair: pair[1])]

    return partial(tok.train_from_iterator, read_texts(file), job["vocab_size"], pattern=job["expression"]), tokens_of


def train_gigatoken(file: Path, job: dict[str, Any]) -> Training:
    """gigatoken, from the file, which it maps into memory; it always cuts as GPT-2 does."""
    import gigatoken

    def tokens_of(learned: Any) -> list[bytes]:
        return [learned[0][number] for number in sorted(learned[0])]

    return partial(gigatoken.train_bpe, file, job["vocab_size"], [], separator=SEPARATOR.encode()), tokens_of


def train_huggingface(file: Path, job: dict[str, Any]) -> Training:
    """Hugging Face's BpeTrainer behind the same pattern."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    tok = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    split = pre_tokenizers.Split(Regex(job["expression"]), "isolated")
    tok.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    trainer = trainers.BpeTrainer(
        vocab_size=job["vocab_size"],
        min_frequency=2,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[],
        show_progress=False,
    )

    def tokens_of(_: None) -> list[bytes]:
        from groundup.tokenizer.alphabet import from_characters

        names = sorted(tok.get_vocab().items(), key=lambda pair: pair[1])
        return [from_characters(name) or b"" for name, _ in names]

    return partial(tok.train_from_iterator, read_texts(file), trainer), tokens_of


# ---- equality


def exact_job(job: dict[str, Any]) -> dict[str, Any]:
    """In how many texts the ids of this package are not tiktoken's."""
    from groundup.tokenizer import measure

    texts = json.loads(Path(job["texts"]).read_text())
    ours, theirs = encoder_of(job | {"contender": "groundup"})(), encoder_of(job | {"contender": "tiktoken"})()
    mine, other = (encoder.collect(encoder.arrays(texts, job["threads"])) for encoder in (ours, theirs))
    return {"different_texts": measure.different_texts(mine, other), "tokens": len(other[0])}


JOBS = {"encode": encode_job, "latency": latency_job, "train": train_job, "exact": exact_job}

if __name__ == "__main__":
    print(json.dumps(JOBS[sys.argv[1]](json.load(sys.stdin))))
