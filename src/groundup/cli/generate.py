"""``groundup generate MODEL "prompt"``: continue a prompt, or a file of them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from groundup.cli.arguments import call, read_stdin, second_as_flag
from groundup.inference.sampling import SamplingParams
from groundup.runtime import UsageError, say
from groundup.runtime.errors import os_errors

if TYPE_CHECKING:
    from groundup.inference import LanguageModel


def generate(
    model: str,
    prompt: str | None = None,
    sampling: SamplingParams = SamplingParams(),  # noqa: B008  it is frozen
    file: Path | None = None,
    input: Path | None = None,
    output: Path | None = None,
    guess: bool = False,
    adapter: tuple[str, ...] = (),
    device: str = "auto",
    dtype: str = "auto",
) -> None:
    """Continue a prompt with a model; the text is printed as it comes.

    Args:
        model: a run, a checkpoint, a Hugging Face folder, or hf:owner/name
        prompt: the text to continue; read from standard input when it is - or left out and something is piped in
        sampling: how tokens are chosen
        file: read the prompt from this file
        input: a file of prompts, a JSON string or object with "prompt" on each line; needs --output
        output: where their answers go, a line each; what is there already is not done again
        guess: guess tokens from what the text has said before (prompt lookup): the same text, sooner
        adapter: an adapter to put on it: a folder, a run or hf:owner/name; may be given several times, for their sum
        device: auto, cpu, cuda, cuda:1, mps
        dtype: of the weights; auto leaves them as they are stored; float32, bfloat16
    """
    if (input is None) != (output is None):
        raise UsageError(
            "--input and --output belong together: groundup generate MODEL --input in.jsonl --output out.jsonl"
        )
    if sum(given is not None for given in (prompt, file, input)) > 1:
        raise UsageError("give one of a prompt, --file and --input.")
    text = "" if input is not None else _prompt(prompt, file)
    from groundup.inference import PromptLookup, load

    drafter = PromptLookup() if guess else None
    lm = load(model, adapters=adapter, device=device, dtype=dtype, drafter=drafter)  # type: ignore[arg-type]
    if input is not None and output is not None:
        _file(lm, input, output, sampling)
        return
    if sampling.n > 1:
        for number, one in enumerate(lm.complete([text], params=sampling)[0], start=1):
            say(f"--- {number} of {sampling.n} ({one.finish})", style="dim")
            print(text + one.text)
        return
    print(text, end="", flush=True)
    for piece in lm.pieces(lm.generation(text, sampling)):
        print(piece, end="", flush=True)
    print()


def _prompt(prompt: str | None, file: Path | None) -> str:
    if file is not None:
        try:
            with os_errors(file, "cannot read"):
                return file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UsageError(f"{file}: byte {error.start} is not UTF-8 text. Convert it first.") from error
    if prompt is None and sys.stdin.isatty():
        raise UsageError('groundup generate needs a prompt: groundup generate MODEL "Once upon a time"')
    return read_stdin() if prompt in (None, "-") else prompt or ""


def _file(lm: LanguageModel, source: Path, target: Path, sampling: SamplingParams) -> None:
    from groundup.inference.batch import generate_file

    counts = generate_file(lm, source, target, sampling)
    say(f"{target}: {counts['done']} prompts answered, {counts['kept']} were there, {counts['failed']} failed.")


def main(arguments: Sequence[str]) -> None:
    """Parse the flags and generate."""
    call(generate, "generate", second_as_flag(arguments, "--prompt"))
