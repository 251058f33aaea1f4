"""``groundup generate MODEL "prompt"``: continue a prompt."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from groundup.cli.arguments import call, read_stdin, second_as_flag
from groundup.runtime import UsageError


def generate(
    model: str,
    prompt: str | None = None,
    max_tokens: int = 128,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float = 1.0,
    min_p: float = 0.0,
    stop: str | None = None,
    seed: int | None = None,
    device: str = "auto",
) -> None:
    """Continue a prompt with a model; the text is printed as it comes.

    Args:
        model: a run, a checkpoint, a Hugging Face folder, or hf:owner/name
        prompt: the text to continue; read from standard input when it is - or left out and something is piped in
        max_tokens: most tokens to generate
        temperature: 0 takes the likeliest token every time
        top_k: sample among the k likeliest tokens only
        top_p: sample among the likeliest tokens that together have this probability
        min_p: leave out tokens less likely than this fraction of the likeliest
        stop: end at this text
        seed: the same seed gives the same text
        device: auto, cpu, cuda, cuda:1, mps
    """
    if prompt is None and sys.stdin.isatty():
        raise UsageError('groundup generate needs a prompt: groundup generate MODEL "Once upon a time"')
    text = read_stdin() if prompt in (None, "-") else prompt
    from groundup.inference import load

    lm = load(model, device=device)
    pieces = lm.stream(
        text or "",
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        stop=[stop] if stop else [],
        seed=seed,
    )
    print(text or "", end="", flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
    print()


def main(arguments: Sequence[str]) -> None:
    """Parse the flags and generate."""
    call(generate, "generate", second_as_flag(arguments, "--prompt"))
