"""Many prompts from a file of JSON lines to another: as many at once as the engine takes, and no work done twice."""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TextIO

from groundup.inference.language_model import LanguageModel
from groundup.inference.sampling import SamplingParams
from groundup.inference.text import Generation
from groundup.runtime import GroundupError, UsageError
from groundup.runtime.console import progress
from groundup.runtime.errors import os_errors
from groundup.runtime.files import write_atomic

IN_FLIGHT = 256  # prompts that the engine has at once
LONGEST_LINE = 1 << 24  # characters of a line
_FIELDS = {field.name for field in fields(SamplingParams)}


def generate_file(lm: LanguageModel, source: Path, target: Path, params: SamplingParams) -> dict[str, int]:
    """Continue every prompt of a file.

    A line of the source is a JSON string, or an object with ``prompt`` (or ``messages``, where the model has a chat
    template) and any fields of :class:`SamplingParams`, which count more than ``params``. Whatever else it has is
    carried over. A line of the target has the number of its prompt as ``line``, then ``text`` (``texts`` where several
    are asked for), ``finish`` and ``tokens``; or ``error``, which is that prompt's alone. Lines come as they end.

    When the target is there already, the prompts that it answers are not done again; an error is tried again. A line
    that is cut short at its end, as a killed process leaves it, is dropped.

    Returns:
        How many prompts were ``done`` now, how many were ``kept`` from before, and how many ``failed``.

    Raises:
        UsageError: the source is not UTF-8 text, or the target answers other prompts.
        GroundupError: a file cannot be read or written.
    """
    with os_errors(source, "cannot read"):
        total = sum(1 for _, _ in _lines(source))
    done = _answered(source, target)
    counts = {"done": 0, "kept": len(done), "failed": 0}
    with (
        os_errors(target, "cannot write"),
        open(target, "a", encoding="utf-8") as file,
        progress("prompts", total, "prompts") as bar,
    ):
        bar.update(len(done))
        waiting: deque[_Job] = deque()
        jobs = (job for job in _jobs(source, params) if job.line not in done)
        try:
            while True:
                while len(waiting) < IN_FLIGHT and (job := next(jobs, None)) is not None:
                    job.start(lm)
                    waiting.append(job)
                if not waiting:
                    break
                lm.engine.step()
                for job in [job for job in waiting if job.ended()]:
                    waiting.remove(job)
                    counts["failed" if job.write(file) else "done"] += 1
                    bar.advance()
        finally:
            for job in waiting:
                if job.generation is not None:
                    job.generation.request.end("cancelled")
            lm.engine.step()
    return counts


class _Job:
    """One prompt of the file."""

    def __init__(self, line: int, row: dict[str, Any], params: SamplingParams, digest: str) -> None:
        self.line, self.row, self.params, self.digest = line, row, params, digest
        self.generation: Generation | None = None
        self.error: str | None = None

    def start(self, lm: LanguageModel) -> None:
        if self.error is not None:
            return
        try:
            if "messages" in self.row:
                prompt: Any = lm.tokenizer.apply_chat_template(self.row["messages"], add_generation_prompt=True)
            else:
                prompt = self.row["prompt"]
            self.generation = lm.generation(prompt, self.params, live=False)
            lm.engine.add(self.generation.request)
        except GroundupError as error:
            self.error = str(error)

    def ended(self) -> bool:
        if self.generation is None:
            return True
        request = self.generation.request
        while request.events:
            self.generation.push(request.events.popleft())
        return request.finish is not None

    def write(self, file: TextIO) -> bool:
        """Write the answer; whether it is an error."""
        result: dict[str, Any] = {"line": self.line, "prompt_digest": self.digest}
        if isinstance(self.row, dict):
            result |= {key: value for key, value in self.row.items() if key not in _FIELDS | {"prompt", "messages"}}
        error = self.error
        if self.generation is not None and self.generation.request.error is not None:
            error = str(self.generation.request.error)
        if error is not None or self.generation is None:
            result["error"] = error
        else:
            result |= _answer(self.generation, self.params)
        file.write(json.dumps(result, ensure_ascii=False) + "\n")
        file.flush()
        return error is not None


def _answer(generation: Generation, params: SamplingParams) -> dict[str, Any]:
    texts = [
        {"text": one.text, "finish": one.finish, "tokens": len(one.tokens)}
        | ({"logprobs": one.logprobs} if params.logprobs is not None else {})
        | ({"score": one.score} if one.score is not None else {})
        for one in generation.answers()
    ]
    return texts[0] if params.n == 1 else {"texts": texts}


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines that are not empty, and their numbers from 1 on."""
    with open(path, encoding="utf-8", errors="strict") as file:
        try:
            for number, line in enumerate(iter(lambda: file.readline(LONGEST_LINE + 1), ""), start=1):
                if len(line) > LONGEST_LINE:
                    raise UsageError(f"{path}, line {number}: more than {LONGEST_LINE:,} characters.")
                if line.strip():
                    yield number, line
        except UnicodeDecodeError as error:
            raise UsageError(f"{path}: byte {error.start} is not UTF-8 text. Convert it first.") from error


def _jobs(path: Path, params: SamplingParams) -> Iterator[_Job]:
    for number, line in _lines(path):
        job = _Job(number, {}, params, _digest(line))
        try:
            row = json.loads(line)
            job.row = {"prompt": row} if isinstance(row, str) else row
            if not isinstance(job.row, dict) or not isinstance(
                job.row.get("prompt", job.row.get("messages")), str | list
            ):
                raise UsageError('a line is a text, or an object with "prompt" or "messages".')
            own = {key: value for key, value in job.row.items() if key in _FIELDS}
            if params.seed is not None and "seed" not in own:
                own["seed"] = params.seed + number - 1
            job.params = SamplingParams.of(**(asdict(params) | own))
        except (json.JSONDecodeError, RecursionError) as error:
            job.error = f"this is not JSON: {error}"
        except (GroundupError, TypeError) as error:
            job.error = str(error)
        yield job


def _digest(line: str) -> str:
    return hashlib.blake2b(line.strip().encode(), digest_size=8).hexdigest()


def _answered(source: Path, target: Path) -> set[int]:
    """The lines that an earlier run has answered; errors, and a last line that is cut short, are taken out."""
    if not target.exists():
        return set()
    with os_errors(target, "cannot read"):
        lines = target.read_bytes().split(b"\n")
    kept: list[bytes] = []
    found: dict[int, str] = {}
    for place, line in enumerate(lines):
        try:
            row = json.loads(line)
            number, digest = int(row["line"]), str(row["prompt_digest"])
        except (ValueError, KeyError, TypeError):
            if place == len(lines) - 1 or not line.strip():
                continue
            raise UsageError(
                f"{target}: this file holds no answers of groundup generate. Give another --output."
            ) from None
        if "error" not in row:
            kept.append(line)
            found[number] = digest
    digests = {number: _digest(line) for number, line in _lines(source)}
    other = next((number for number, digest in found.items() if digests.get(number) != digest), None)
    if other is not None:
        raise UsageError(f"{target}: it answers another prompt than line {other} of {source}. Give another --output.")
    write_atomic(target, b"".join(line + b"\n" for line in kept))
    return set(found)
