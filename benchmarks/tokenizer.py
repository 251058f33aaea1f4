"""The tokenizer beside tiktoken, Hugging Face tokenizers, gigatoken and rustbpe: encoding, latency, training, start.

    python benchmarks/tokenizer.py                    everything; about half an hour on two quiet cores
    python benchmarks/tokenizer.py --only encode      one part, or several: see --help
    python benchmarks/tokenizer.py --quick            little text and one round, about a minute: does it run?
    python benchmarks/render.py                       write docs/benchmarks.md from the kept results

How it is measured. Texts are a list of strings. Each contender runs in a process of its own, one after another,
A B A B …, for several rounds; a ratio is that of two contenders in one round, and the median of the rounds is reported
with the lowest and the highest. "Cold" is the first pass of a new tokenizer over the texts, "warm" a later pass of the
same one; of each, a process makes a few and gives their median. What a process pays once is in neither: imports, thread
pools and compiled code are paid by a throwaway tokenizer, memory that is touched for the first time by the first of the
cold passes. Every contender's ids are compared with tiktoken's on every text. Ends in one JSON line, kept in
benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from base64 import b64encode
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from corpora import make_corpora, size_of, training_texts, write_texts
from tokenizer_jobs import WITHOUT_HOOKS

from groundup.runtime.environment import cpu_name, git_commit, memory_bytes, usable_cores
from groundup.tokenizer import measure
from groundup.tokenizer.pretokenize import CL100K_TIKTOKEN, PATTERNS, pattern_regex

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "tokenizer.json"
SHARED = ROOT.parent / "shared" / "data"

JOBS = Path(__file__).with_name("tokenizer_jobs.py")
VOCABULARIES = {"cl100k": "cl100k_base", "r50k": "r50k_base", "o200k": "o200k_base"}
CUT_BY = {"cl100k": CL100K_TIKTOKEN, "r50k": PATTERNS["gpt2"], "o200k": PATTERNS["o200k"]}  # as tiktoken does
SCHEMES = {"cl100k": "cl100k", "r50k": "gpt2", "o200k": "o200k", "rustbpe": "cl100k"}
LENGTHS = (20, 50, 100, 200)  # characters of the short strings
TRAIN_SIZE = 32_000
CODE = "def read(path: str) -> str:  # naïve\n\treturn open(path).read()\n"
PEERS = ["tiktoken", "gigatoken", "Hugging Face tokenizers"]


# ---- running them in turn


class Bench:
    """Runs jobs in processes of their own and keeps what they say.

    Args:
        folder: where texts, vocabularies and ids lie meanwhile.
        rounds: how often each contender runs.
    """

    def __init__(self, folder: Path, rounds: int) -> None:
        self.folder, self.rounds = folder, rounds
        self.failures: list[str] = []

    def run(self, kind: str, job: dict[str, Any]) -> dict[str, Any] | None:
        """One job; None where the contender failed, which is noted and said."""
        threads = str(job.get("threads", usable_cores()))
        variables = {"RAYON_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false" if threads == "1" else "true"}
        done = subprocess.run(
            [sys.executable, str(JOBS), kind],
            input=json.dumps(job),
            capture_output=True,
            text=True,
            env=os.environ | variables,
        )
        if done.returncode == 0:
            return json.loads(done.stdout.splitlines()[-1])
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        failure = f"{job.get('contender', 'groundup')}, {kind}: {reason}"
        if failure not in self.failures:
            self.failures.append(failure)
            say(f"  FAILED {failure}")
        return None

    def rounds_of(
        self, kind: str, contenders: Sequence[str], job: Callable[[str], dict[str, Any]]
    ) -> dict[str, list[dict[str, Any]]]:
        """Each contender once a round, in turn: by contender, its rounds. A contender that fails is left out."""
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in contenders}
        for _ in range(self.rounds):
            for name in list(found):
                result = self.run(kind, job(name))
                if result is None:
                    del found[name]
                else:
                    found[name].append(result)
        return found

    def texts(self, name: str, texts: Any) -> str:
        """Write texts for the jobs to read; returns the path."""
        file = self.folder / f"{name}.texts.json"
        file.write_text(json.dumps(texts))
        return str(file)

    def vocabulary(self, name: str, ranks: Path, pattern: str) -> dict[str, Any]:
        """The part of a job that names a vocabulary; writes the ``tokenizer.json`` that Hugging Face reads."""
        from groundup import Tokenizer

        folder = self.folder / name
        Tokenizer.load(ranks, pattern=pattern).save(folder)
        return {
            "name": name,
            "pattern": pattern,
            "expression": pattern_regex(pattern),
            "ranks": str(ranks),
            "json": str(folder / "tokenizer.json"),
            "scheme": SCHEMES[name],
        }


def say(line: str) -> None:
    """Tell a person what is going on; standard output is for the result."""
    print(line, file=sys.stderr, flush=True)


def encode_part(
    bench: Bench, vocabulary: dict[str, Any], name: str, texts: list[str], threads: int, *, lists: bool = False,
    contenders: Sequence[str] = ("groundup", *PEERS),
) -> dict[str, Any]:  # fmt: skip
    """Cold and warm passes of each contender over one corpus, and in how many texts its ids are not tiktoken's."""
    place = bench.texts(name, texts)
    size = size_of(texts)
    of = {"threads": threads, "texts": place, "lists": lists, **vocabulary}

    def job(contender: str) -> dict[str, Any]:
        passes = 1 if contender in ("Hugging Face tokenizers", "rustbpe") else 3  # theirs take many seconds each
        return of | {"contender": contender, "passes": passes, "ids": str(bench.folder / f"{contender}.npz")}

    rounds = bench.rounds_of("encode", contenders, job)
    result: dict[str, Any] = {"bytes": size, "texts": len(texts), "threads": threads, "lists": lists, "rounds": rounds}
    result["different_texts"] = {
        contender: difference(bench.folder / "tiktoken.npz", bench.folder / f"{contender}.npz") for contender in rounds
    }
    for contender, times in rounds.items():
        rates = " / ".join(f"{size / 1e6 / median(one[phase] for one in times):6.1f}" for phase in ("cold", "warm"))
        wrong = result["different_texts"][contender]
        note = "" if not wrong else f"   ids differ from tiktoken's in {wrong} of {len(texts)} texts"
        say(f"  {name:<13} {threads} thread(s) {'lists ' if lists else 'arrays'} {contender:<24} {rates} MB/s{note}")
    return result


def difference(reference: Path, other: Path) -> int | None:
    """In how many texts two files of ids differ; None where one is missing."""
    if not (reference.exists() and other.exists()):
        return None
    with np.load(reference) as mine, np.load(other) as theirs:
        return measure.different_texts((mine["ids"], mine["offsets"]), (theirs["ids"], theirs["offsets"]))


def latency_part(
    bench: Bench, vocabulary: dict[str, Any], texts: list[str], strings: int, calls: int
) -> dict[str, Any]:
    """Microseconds of one call with one short string."""
    long_enough = [text for text in texts if len(text) >= max(LENGTHS)]
    step = max(1, len(long_enough) // strings)
    short = {length: [text[:length] for text in long_enough[::step][:strings]] for length in LENGTHS}
    place = bench.texts("short", short)
    rounds = bench.rounds_of(
        "latency", ("groundup", *PEERS), lambda name: {"contender": name, "texts": place, "calls": calls, **vocabulary}
    )
    for name, times in rounds.items():
        shown = "  ".join(f"{length}: {median(one[str(length)] for one in times):.2f} µs" for length in LENGTHS)
        say(f"  one string   {name:<24} {shown}")
    return {"strings": len(short[LENGTHS[0]]), "calls": calls, "rounds": rounds}


def train_part(bench: Bench, texts: list[str], vocab_size: int) -> dict[str, Any]:
    """Learning a vocabulary. gigatoken always cuts as GPT-2 does, so this package runs with both patterns."""
    file = bench.folder / "train.txt"
    write_texts(file, texts)
    contenders = {
        "groundup": ("groundup", "cl100k"),
        "rustbpe": ("rustbpe", "cl100k"),
        "groundup, gpt2": ("groundup", "gpt2"),
        "gigatoken, gpt2": ("gigatoken", "gpt2"),
        "Hugging Face tokenizers": ("Hugging Face tokenizers", "cl100k"),
    }

    def job(name: str) -> dict[str, Any]:
        contender, pattern = contenders[name]
        place = str(bench.folder / f"{name}.tokens.json")
        return {
            "contender": contender, "expression": PATTERNS[pattern], "file": str(file), "tokens": place,
            "vocab_size": vocab_size,
        }  # fmt: skip

    rounds = bench.rounds_of("train", list(contenders), job)
    learned = {name: json.loads(Path(job(name)["tokens"]).read_text()) for name in rounds}
    first_difference, in_common = {}, {}
    for name, tokens in learned.items():
        ours = learned.get("groundup, gpt2" if name.endswith("gpt2") else "groundup", [])
        # The 256 bytes may stand in any order; what is learned follows.
        pairs = enumerate(zip(ours[256:], tokens[256:], strict=False))
        first_difference[name] = next((number for number, (mine, other) in pairs if mine != other), None)
        in_common[name] = len(set(ours) & set(tokens))
        times = rounds[name]
        wall, peak = median(one["seconds"] for one in times), median(one["peak_bytes"] for one in times)
        alike = f"{in_common[name]:,} of {len(tokens):,} tokens are ours"
        say(f"  train {size_of(texts) / 1e6:5.1f} MB {name:<24} {wall:6.2f} s  peak {peak / 1e6:6.0f} MB  {alike}")
    return {
        "bytes": size_of(texts), "texts": len(texts), "vocab_size": vocab_size, "rounds": rounds,
        "first_difference": first_difference,
        "in_common": in_common,
    }  # fmt: skip


def start_part(bench: Bench, vocabulary: dict[str, Any], rounds: int) -> dict[str, Any]:
    """A new process up to its first ids: with compiled code in its cache, and with an empty cache."""
    found: dict[str, list[dict[str, Any]]] = {"cold compile": [], "warm": []}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory(dir=bench.folder) as cache:
            for kind in ("cold compile", "warm", "warm"):
                result, wall = start_once(bench, vocabulary, cache)
                if result is not None:
                    found[kind].append(result | {"process": wall})
    for kind, times in found.items():
        if times:
            parts = ", ".join(f"{key} {median(one[key] for one in times):.2f} s" for key in times[0])
            say(f"  start, {kind}: {parts}")
    return {"rounds": found}


def start_once(bench: Bench, vocabulary: dict[str, Any], cache: str) -> tuple[dict[str, Any] | None, float]:
    """One start. The parts are measured inside, the whole process from outside."""
    code = (
        "import json, sys, time; started = time.perf_counter()\n"
        f"{WITHOUT_HOOKS}\n"
        "from groundup import Tokenizer\n"
        "imported = time.perf_counter(); tok = Tokenizer.load(sys.argv[1], pattern=sys.argv[2])\n"
        "loaded = time.perf_counter(); tok.encode(sys.argv[3]); encoded = time.perf_counter()\n"
        "print(json.dumps({'import': imported - started, 'load': loaded - imported, 'encode': encoded - loaded}))"
    )
    command = [sys.executable, "-c", code, vocabulary["ranks"], vocabulary["pattern"], CODE]
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"NUMBA_CACHE_DIR": cache})
    wall = time.perf_counter() - started
    if done.returncode:
        failure = "start: " + (done.stderr.strip().splitlines() or ["no message"])[-1]
        if failure not in bench.failures:
            bench.failures.append(failure)
            say(f"  FAILED {failure}")
        return None, wall
    return json.loads(done.stdout), wall


def exact_part(bench: Bench, vocabularies: dict[str, dict[str, Any]], texts: list[str]) -> dict[str, Any]:
    """This package's ids beside tiktoken's on every byte of everything there is."""
    place = bench.texts("everything", texts)
    found: dict[str, int | None] = {}
    for name, vocabulary in vocabularies.items():
        result = bench.run("exact", {"contender": name, "texts": place, "threads": usable_cores(), **vocabulary})
        found[name] = result and result["different_texts"]
        say(f"  exact: {name}: ids differ from tiktoken's in {found[name]} of {len(texts)} texts")
    return {"bytes": size_of(texts), "texts": len(texts), "different_texts": found}


# ---- what it comes to


def ratio(rounds: dict[str, list[dict[str, Any]]], ours: str, theirs: str, key: str) -> dict[str, float] | None:
    """How many times longer ``theirs`` takes than ``ours``: the median over rounds, the lowest, the highest."""
    pairs = list(zip(rounds.get(ours, []), rounds.get(theirs, []), strict=False))
    if not pairs:
        return None
    ratios = [their[key] / our[key] for our, their in pairs]
    return {"median": median(ratios), "low": min(ratios), "high": max(ratios)}


def requirement(figure: str, against: str, bar: float, found: dict[str, float] | None, **more: Any) -> dict[str, Any]:
    """One row of the table of requirements."""
    met = None if found is None else found["median"] >= bar
    return {"figure": figure, "against": against, "bar": bar, "found": found, "met": met, **more}


def in_threads(threads: int | str) -> str:
    """ "1 thread", "2 threads"."""
    return f"{threads} thread{'' if int(threads) == 1 else 's'}"


def requirements(result: dict[str, Any]) -> list[dict[str, Any]]:
    """What issue and readers hold the package to, computed from the rounds."""
    rows = []
    encode = result.get("encode", {})

    def by_corpus(threads: int, peer: str, phase: str) -> dict[str, Any]:
        return {name: ratio(of[str(threads)]["rounds"], "groundup", peer, phase) for name, of in encode.items()}

    for threads, peer, phases, bar in (
        (1, "tiktoken", ("cold",), 12.0),
        (1, "gigatoken", ("cold", "warm"), 1.0),
        (2, "gigatoken", ("cold", "warm"), 1.15),
    ):
        for phase in phases if encode else ():
            each = by_corpus(threads, peer, phase)
            mixed = each.pop("mixed", None)
            figure = f"encode to arrays, {in_threads(threads)}, {phase}, mixed text"
            rows.append(requirement(figure, peer, bar, mixed, others=each))
    for length in LENGTHS if "latency" in result else ():
        found = ratio(result["latency"]["rounds"], "groundup", "tiktoken", str(length))
        rows.append(requirement(f"encode one string of {length} characters", "tiktoken", 1.0, found))
    for threads, of in result.get("lists", {}).items():
        for phase in ("cold", "warm"):
            found = ratio(of["rounds"], "groundup", "tiktoken", phase)
            figure = f"encode_batch to Python lists, {in_threads(threads)}, {phase}, mixed text"
            rows.append(requirement(figure, "tiktoken's encode_ordinary_batch", 6.0, found))
    for of in result.get("train", {}).values():
        rows += training_requirements(of)
    for kind, bar in (("warm", 1.0), ("cold compile", 8.0)):
        times = [one["process"] for one in result.get("start", {}).get("rounds", {}).get(kind, [])]
        if times:
            found = {"median": median(times), "low": min(times), "high": max(times)}
            row = requirement(f"import + first encode in a new process, {kind}", "", bar, found, unit="s, at most")
            rows.append(row | {"met": found["median"] < bar})
    if exact := result.get("exact"):
        for name, different in exact["different_texts"].items():
            figure = f"ids on all {exact['bytes'] / 1e6:.3g} MB, {name}: texts that differ"
            found = None if different is None else {"median": different, "low": different, "high": different}
            row = requirement(figure, "tiktoken", 0, found, unit="texts, at most")
            rows.append(row | {"met": None if different is None else different == 0})
    return rows


def training_requirements(of: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of one size: against the best peer in time and memory; from 50 MB on also against Hugging Face."""
    rounds, name = of["rounds"], f"train {of['vocab_size']:,} on {of['bytes'] / 1e6:.3g} MB"
    peers = {"rustbpe": "groundup", "gigatoken, gpt2": "groundup, gpt2"}
    present = [peer for peer, ours in peers.items() if rounds.get(peer) and rounds.get(ours)]
    rows = []
    if present:
        best = min(present, key=lambda peer: median(one["seconds"] for one in rounds[peer]))
        for peer in present:
            note = f"{peer}, the best peer" if peer == best else f"{peer}, not the best peer here"
            found = ratio(rounds, peers[peer], peer, "seconds")
            memory = ratio(rounds, peers[peer], peer, "peak_bytes")
            rows.append(requirement(f"{name}, time", note, 1.2, found, counts=peer == best))
            rows.append(requirement(f"{name}, peak memory", note, 1.0, memory, counts=peer == best))
    if of["bytes"] > 50e6:
        found = ratio(rounds, "groundup", "Hugging Face tokenizers", "seconds")
        rows.append(requirement(f"{name}, time", "Hugging Face tokenizers", 4.0, found))
    return rows


def machine() -> dict[str, Any]:
    """Where it was measured, and with what."""
    packages = ("groundup", "numpy", "numba", "tiktoken", "tokenizers", "gigatoken", "rustbpe")
    return {
        "cpu": cpu_name(),
        "cores": usable_cores(),
        "memory_bytes": memory_bytes(),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in packages},
        "commit": git_commit(),
    }


def measure_all(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Every part that was asked for."""
    quick, wanted = arguments.quick, set(arguments.only)
    bench = Bench(folder, arguments.rounds or (1 if quick else 5))
    corpora = make_corpora(arguments.data_dir / "pretrain", 200_000 if quick else 10_500_000)
    if quick:
        corpora = {"mixed": corpora["mixed"]}
    tokenizers = arguments.data_dir / "tokenizers"
    result: dict[str, Any] = {
        "benchmark": "tokenizer",
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "quick": quick,
        "machine": machine(),
        "corpora": {name: {"bytes": size_of(texts), "texts": len(texts)} for name, texts in corpora.items()},
        "load_before": os.getloadavg()[0],
    }
    vocabularies = {
        name: bench.vocabulary(name, tokenizers / f"{file}.tiktoken", CUT_BY[name])
        for name, file in VOCABULARIES.items()
    }
    cl100k = vocabularies["cl100k"]
    if "encode" in wanted:
        result["encode"] = {
            name: {str(threads): encode_part(bench, cl100k, name, texts, threads) for threads in (1, 2)}
            for name, texts in corpora.items()
        }
    if "lists" in wanted:
        result["lists"] = {
            str(threads): encode_part(bench, cl100k, "mixed", corpora["mixed"], threads, lists=True)
            for threads in (1, 2)
        }
    if "vocabularies" in wanted:
        result["vocabularies"] = {
            name: encode_part(bench, vocabularies[name], "mixed", corpora["mixed"], 1)
            for name in vocabularies
            if name != "cl100k"
        }
        result["vocabularies"]["rustbpe"] = rustbpe_part(bench, corpora["mixed"], 512 if quick else 8192)
    if "latency" in wanted:
        strings, calls = (50, 20) if quick else (500, 20)
        result["latency"] = latency_part(bench, cl100k, corpora["mixed"], strings, calls)
    if "train" in wanted:
        sizes = (300_000,) if quick else (10_000_000, 100_000_000)
        result["train"] = {
            str(size): train_part(
                bench, training_texts(arguments.data_dir / "pretrain", size), 2000 if quick else TRAIN_SIZE
            )
            for size in sizes
        }
    if "start" in wanted:
        result["start"] = start_part(bench, cl100k, 1 if quick else 3)
    if "exact" in wanted:
        everything = training_texts(arguments.data_dir / "pretrain", 300_000 if quick else 1 << 40)
        result["exact"] = exact_part(bench, vocabularies, everything)
    result["failures"] = bench.failures
    result["requirements"] = requirements(result)
    return result


def rustbpe_part(bench: Bench, texts: list[str], vocab_size: int) -> dict[str, Any]:
    """rustbpe loads no vocabulary, so here all contenders get one that it learned on the same text."""
    file, ranks, tokens = (bench.folder / f"rustbpe.{suffix}" for suffix in ("txt", "tiktoken", "tokens.json"))
    write_texts(file, texts)
    job = {"contender": "rustbpe", "expression": PATTERNS["cl100k"], "file": str(file), "vocab_size": vocab_size}
    if bench.run("train", job | {"tokens": str(tokens)}) is None:
        return {}
    learned = map(bytes.fromhex, json.loads(tokens.read_text()))
    ranks.write_bytes(b"".join(b"%s %d\n" % (b64encode(token), rank) for rank, token in enumerate(learned)))
    vocabulary = bench.vocabulary("rustbpe", ranks, "cl100k") | {"learned_from": str(file), "vocab_size": vocab_size}
    return encode_part(bench, vocabulary, "mixed", texts, 1, contenders=("groundup", "rustbpe", *PEERS))


def main() -> None:
    """Measure, keep, render."""
    parts = ["encode", "lists", "vocabularies", "latency", "train", "start", "exact"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, default=SHARED, help="the shared data: pretrain/ and tokenizers/")
    parser.add_argument("--quick", action="store_true", help="little text, one round; nothing is kept")
    parser.add_argument("--rounds", type=int, help="how often each contender runs (5)")
    parser.add_argument("--only", nargs="+", choices=parts, default=parts, help="only these parts; nothing is kept")
    parser.add_argument("--out", type=Path, help="write the result there instead of where it is kept")
    arguments = parser.parse_args()
    if not (arguments.data_dir / "pretrain").is_dir():
        parser.error(f"{arguments.data_dir}: no pretrain folder there. Give the shared data with --data-dir.")
    with tempfile.TemporaryDirectory() as folder:
        result = measure_all(arguments, Path(folder))
    import render

    say("\n".join(render.tokenizer(result)))
    whole = not arguments.quick and arguments.only == parts
    if arguments.out or whole:
        (arguments.out or RESULT).write_text(json.dumps(result, indent=1) + "\n")
    if whole and not arguments.out:
        render.write_page()
    print(json.dumps(result))


if __name__ == "__main__":
    main()
